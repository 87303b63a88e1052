"""A stack belongs to the process that took it last; the one before writes nothing more."""

import errno
import logging

import pytest
import torch
from stack_runs import CASES, at_step, data, events_of, hashes, task

from bdl_train.files import write_json
from bdl_train.runs import read_json
from bdl_train.training import ownership
from bdl_train.training.checkpoints import LATEST
from bdl_train.training.ownership import OWNER_FILE, LostOwnershipError, Ownership
from bdl_train.training.train_stack import train_stack

NAME, CONFIG = CASES["deep_ensemble"]
EVERY_CALL = {**CONFIG, "trainer": {**CONFIG["trainer"], "checkpoint_every_s": 0}}


def test_the_last_one_to_take_a_stack_owns_it(tmp_path):
    first = Ownership(tmp_path / "000")
    first.check()
    second = Ownership(tmp_path / "000")
    second.check()
    with pytest.raises(LostOwnershipError, match=r"000 was taken over by process \d+ on"):
        first.check()


def test_a_worker_that_was_cut_off_writes_nothing_over_its_successor(run, straight, monkeypatch):
    target = run("cut off")

    def lose(state):
        # The successor takes the stack and gets as far as its own first checkpoint and event.
        Ownership(target.stack("s0"))
        torch.save({"successor": 1}, target.stack("s0") / LATEST)
        seen.append(len(events_of(target)))

    seen: list[int] = []
    at_step(monkeypatch, "deep_ensemble", 12, lose)
    with pytest.raises(LostOwnershipError):
        train_stack(task(), EVERY_CALL, data(NAME), target)
    assert torch.load(target.stack("s0") / LATEST, weights_only=True) == {"successor": 1}
    assert len(events_of(target)) == seen[0]
    assert not (target.stack("s0") / "result.json").exists()
    assert not list(target.posterior.glob("*"))
    (target.stack("s0") / LATEST).unlink()
    assert hashes(train_stack(task(), EVERY_CALL, data(NAME), target)) == hashes(straight("deep_ensemble"))


def test_ownership_that_cannot_be_written_is_said_and_costs_no_training(tmp_path, monkeypatch, caplog):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    Ownership(tmp_path)
    monkeypatch.setattr(ownership, "write_json", full)
    with caplog.at_level(logging.WARNING):
        late = Ownership(tmp_path)
    late.check()
    assert "another worker of the stack would go unnoticed" in caplog.text


def test_a_damaged_file_is_no_other_owner(tmp_path):
    mine = Ownership(tmp_path)
    (tmp_path / OWNER_FILE).write_text("{")
    mine.check()
    (tmp_path / OWNER_FILE).unlink()
    mine.check()
    write_json(tmp_path / OWNER_FILE, {"token": "of another"})
    with pytest.raises(LostOwnershipError):
        mine.check()


def test_it_says_where_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BDL_NODE", "n7")
    Ownership(tmp_path)
    assert read_json(tmp_path / OWNER_FILE)["node"] == "n7"

"""Cutting a stack into halves: its members, its checkpoint, and that the halves train on to the same weights."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bdl_train.distributed.follow_ups import halves
from bdl_train.distributed.split import split
from bdl_train.runs import RunDir, find_runs, read_json
from bdl_train.training.callbacks import Checkpoint
from bdl_train.training.checkpoints import save_checkpoint
from bdl_train.training.prepared import StackTask


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40, unique=True))
def test_halves_hold_every_member_once_in_order(members):
    task = StackTask(id="007", members=tuple(members), cpus=3, gpus=0.5, attempt=2)
    one, other = halves(task)
    assert one.members + other.members == tuple(members)
    assert abs(len(one.members) - len(other.members)) <= 1
    assert (one.id, other.id) == ("007a", "007b")
    assert {(half.cpus, half.gpus, half.attempt) for half in (one, other)} == {(3, 0.5, 2)}


def test_every_tensor_with_a_member_axis_is_cut_and_nothing_else(tmp_path):
    run, task = RunDir(tmp_path), StackTask(id="000", members=(4, 5, 6), cpus=1, gpus=0)
    content = {
        "identity": {"task": {"id": "000", "members": [4, 5, 6], "attempt": 0}, "num_data": 9},
        "state": {
            "flat": torch.arange(6.0).reshape(3, 2),
            "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.arange(3.0)[:, None]}}},
            "step": 7,
        },
        "early_stopping": None,
    }
    save_checkpoint(run.stack("000"), content)
    result = split(run, task, "it died")
    assert result == {"status": "split", "into": ["000a", "000b"], "reason": "it died"}
    assert read_json(run.stack("000") / "result.json") == result
    for half, rows in (("000a", [0]), ("000b", [1, 2])):
        cut = torch.load(run.stack(half) / "checkpoint.pt", weights_only=True)
        members = [4 + row for row in rows]
        assert cut["identity"] == {"task": {"id": half, "members": members, "attempt": 0}, "num_data": 9}
        torch.testing.assert_close(cut["state"]["flat"], content["state"]["flat"][rows])
        inner = cut["state"]["optimizer"]["state"][0]
        assert inner["exp_avg"].flatten().tolist() == rows
        assert inner["step"] == 7
        assert cut["early_stopping"] is None
    events = [json.loads(line) for line in (run.stack("000") / "events.jsonl").read_text().splitlines()]
    assert events[-1]["key"] == "split"


@pytest.mark.parametrize("content", [None, b"half of a zip"])
def test_without_a_readable_checkpoint_the_halves_begin_anew(content, tmp_path):
    run, task = RunDir(tmp_path), StackTask(id="000", members=(0, 1), cpus=1, gpus=0)
    if content is not None:
        run.stack("000").mkdir(parents=True)
        (run.stack("000") / "checkpoint.pt").write_bytes(content)
    assert split(run, task, "it died")["status"] == "split"
    assert not run.stack("000a").exists()


@pytest.mark.parametrize("method", ["swag", "deep_ensemble", "anchored"])
def test_halves_train_on_to_the_weights_of_the_whole(method, train, bdl, monkeypatch):
    words = (f"inference={method}", "num_members=3", "trainer.max_epochs=6", "trainer.steps_per_call=1")
    words += ("trainer.precision=64-true", "scheduler=cosine")
    whole = train(*words).run
    true_end = Checkpoint.on_train_batch_end

    def end(self, trainer, pl_module, *args):
        if pl_module.state.step == 41:
            self._stop_files[0].touch()
        return true_end(self, trainer, pl_module, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "on_train_batch_end", end)
        train(*words, status=75)
    run = find_runs("runs")[-1]
    split(run, StackTask(id="000", members=(0, 1, 2), cpus=1, gpus=0), "its worker died 3 times")
    said = bdl("train", f"resume={run.path}")
    assert said.status == 0, said.err
    assert "Stack 000a continues at step 41" in said.err
    assert "Stack 000b continues at step 41" in said.err
    manifest = read_json(run.manifest)
    assert [(one["id"], one["stack"]) for one in manifest["members"]] == [
        (0, "000a"),
        (1, "000b"),
        (2, "000b"),
    ]
    for member in manifest["members"]:
        mine, theirs = (load_file(one.posterior / member["file"]) for one in (run, whole))
        assert set(mine) == set(theirs)
        for name in mine:
            # The order of sums depends on how many members share a product.
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-8, atol=1e-10)

"""A disk that takes no more costs events and checkpoints, never the training; lost results are trained again."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stack_runs import CASES, at_step, data, events_of, hashes, task

from bdl_train.errors import UsageError
from bdl_train.files import write_bytes, write_json
from bdl_train.inference._descent import DescentState
from bdl_train.runs import RunDir, read_json
from bdl_train.training import callbacks, checkpoints
from bdl_train.training.checkpoints import LATEST, PREVIOUS, load_checkpoint, save_checkpoint
from bdl_train.training.train_stack import train_stack

CASE = "deep_ensemble"
NAME, CONFIG = CASES[CASE]
EVERY_CALL = {**CONFIG, "trainer": {**CONFIG["trainer"], "checkpoint_every_s": 0}}
FULL = OSError(28, "No space left on device")


class Disk:
    """Takes checkpoints, or refuses them while it is full."""

    def __init__(self) -> None:
        self.full, self.refused = True, 0

    def write_bytes(self, path: Path, content: bytes) -> None:
        if self.full:
            self.refused += 1
            raise FULL
        write_bytes(path, content)


@pytest.fixture
def expected(straight) -> list[str]:
    """Hashes of the undisturbed run, which must be trained before anything is broken."""
    return hashes(straight(CASE))


@pytest.fixture
def disk(expected, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(checkpoints, "write_bytes", made.write_bytes)
    return made


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[str], int]:
    caplog.set_level(logging.WARNING)
    return lambda text: sum(text in record.message for record in caplog.records)


def test_checkpoints_that_cannot_be_saved_cost_nothing_and_are_said_once(run, expected, disk, warnings):
    assert hashes(train_stack(task(), EVERY_CALL, data(NAME), run("full"))) == expected
    assert disk.refused > 5
    assert warnings("training goes on without") == 1


def test_a_stop_waits_until_its_checkpoint_is_saved(run, expected, disk, warnings, monkeypatch):
    monkeypatch.setattr(callbacks, "RETRY_S", 0.0)
    one = run("stopped")

    def ask(state: DescentState) -> None:
        one.path.mkdir(exist_ok=True)
        one.stop_file.touch()

    def make_room(state: DescentState) -> None:
        disk.full = False

    at_step(monkeypatch, CASE, 6, ask)
    at_step(monkeypatch, CASE, 12, make_room)
    assert train_stack(task(), CONFIG, data(NAME), one)["status"] == "stopped"
    assert disk.refused == 4  # at steps 7, 9, 10 (the end of an epoch) and 12
    assert warnings("the requested stop waits") == 1
    assert [event["step"] for event in events_of(one) if event["key"] == "stopped"] == [14]
    one.stop_file.unlink()
    assert hashes(train_stack(task(), CONFIG, data(NAME), one)) == expected


def test_a_stop_that_can_never_be_saved_trains_to_the_end(run, expected, disk, monkeypatch):
    one = run("never")
    at_step(monkeypatch, CASE, 6, lambda state: one.stop_file.touch())
    assert hashes(train_stack(task(), CONFIG, data(NAME), one)) == expected
    assert disk.refused == 1  # the next try would have been seconds later


@pytest.mark.parametrize("broken", ["flush", "close"])
def test_events_that_cannot_be_written_cost_nothing_and_are_said_once(
    broken: str, run, expected, warnings, monkeypatch
):
    calls = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        calls.append(broken)
        raise FULL

    monkeypatch.setattr(callbacks.EventWriter, broken, refuse)
    assert hashes(train_stack(task(), CONFIG, data(NAME), run("full"))) == expected
    assert len(calls) >= 1
    assert warnings("events are lost") == 1


def test_after_failed_saves_the_last_good_checkpoint_is_loaded_and_kept(tmp_path: Path, disk):
    def content(step: int) -> dict[str, Any]:
        return {"identity": {}, "step": step}

    def steps() -> dict[str, int]:
        found = {}
        for name in (LATEST, PREVIOUS):
            if (tmp_path / name).is_file():
                found[name] = checkpoints.torch.load(tmp_path / name, weights_only=True)["step"]
        return found

    disk.full = False
    save_checkpoint(tmp_path, content(1))
    save_checkpoint(tmp_path, content(2))
    disk.full = True
    for step in (3, 4):
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, content(step))
        assert load_checkpoint(tmp_path, {}, "cpu") == content(2)
    disk.full = False
    save_checkpoint(tmp_path, content(5))
    assert steps() == {LATEST: 5, PREVIOUS: 2}


# --- results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_stack_whose_member_is_lost_is_trained_again(damage: str, run, expected, warnings, monkeypatch):
    one: RunDir = run("lost")
    first = train_stack(task(), CONFIG, data(NAME), one)
    file = one.posterior / first["members"][1]["file"]
    seen = []
    at_step(monkeypatch, CASE, 0, lambda state: seen.append(state.step))
    assert train_stack(task(), CONFIG, data(NAME), one) == read_json(one.stack("s0") / "result.json")
    assert seen == []
    if damage == "missing":
        file.unlink()
    else:
        whole = bytearray(file.read_bytes())
        whole[-1] ^= 1
        file.write_bytes(whole)
    assert hashes(train_stack(task(), CONFIG, data(NAME), one)) == expected
    assert seen == [0]
    assert warnings("is not used") == warnings(file.name) == 1
    assert file.is_file()


@pytest.mark.parametrize("result", [[], {"members": 3}, {"members": [{"status": "done"}]}])
def test_a_damaged_result_is_named(result: Any, run):
    one = run("damaged")
    write_json(one.stack("s0") / "result.json", result)
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
        train_stack(task(), CONFIG, data(NAME), one)

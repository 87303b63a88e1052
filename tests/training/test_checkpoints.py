"""Checkpoints: whole, atomic, of this work only, and loaded without unpickling code."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from bdl_train.training.checkpoints import (
    LATEST,
    PREVIOUS,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)

IDENTITY = {"task": {"id": "s0", "members": [0, 1]}, "num_data": 26}


def content(step: int, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    state = {"flat": torch.full((2, 3), float(step)), "step": step, "names": ["a", None], "done": False}
    return {"identity": identity or IDENTITY, "state": state}


def step_of(folder: Path) -> int | None:
    found = load_checkpoint(folder, IDENTITY, "cpu")
    return None if found is None else found["state"]["step"]


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path: Path):
    save_checkpoint(tmp_path, content(1))
    save_checkpoint(tmp_path, content(2))
    found = load_checkpoint(tmp_path, IDENTITY, "cpu")
    assert found is not None
    assert torch.equal(found["state"]["flat"], torch.full((2, 3), 2.0))
    assert found["state"]["names"] == ["a", None]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LATEST, PREVIOUS])


def test_no_checkpoint_is_none(tmp_path: Path):
    assert step_of(tmp_path) is None
    assert step_of(tmp_path / "missing") is None


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "gone"])
def test_a_damaged_newest_falls_back_to_the_one_before_with_a_warning(tmp_path: Path, damage: str, caplog):
    save_checkpoint(tmp_path, content(1))
    save_checkpoint(tmp_path, content(2))
    path = tmp_path / LATEST
    whole = path.read_bytes()
    if damage == "gone":  # the process died between the two renames
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"x" * 100, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert step_of(tmp_path) == 1
    assert damage == "gone" or f"{LATEST} cannot be read" in caplog.text
    (tmp_path / PREVIOUS).write_bytes(b"")
    path.unlink(missing_ok=True)
    assert step_of(tmp_path) is None


@pytest.mark.parametrize(
    "foreign",
    [
        {"task": {"id": "s0", "members": [0, 2]}, "num_data": 26},
        {"task": IDENTITY["task"], "num_data": 25},
        {},
    ],
)
def test_a_checkpoint_of_other_work_is_not_used(tmp_path: Path, foreign: dict[str, Any], caplog):
    torch.save({**content(3), "identity": foreign}, tmp_path / LATEST)
    with caplog.at_level(logging.WARNING):
        assert step_of(tmp_path) is None
    assert "belongs to other settings" in caplog.text


class Payload:
    """Runs code when unpickled, if anyone lets it."""

    ran = False

    def __reduce__(self):
        return _run, ()


def _run() -> int:
    Payload.ran = True
    return 0


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, caplog):
    save_checkpoint(tmp_path, content(1))
    save_checkpoint(tmp_path, content(2))
    torch.save({**content(9), "extra": Payload()}, tmp_path / LATEST)
    with caplog.at_level(logging.WARNING):
        assert step_of(tmp_path) == 1
    assert not Payload.ran
    assert "cannot be read" in caplog.text


def test_a_finished_stack_keeps_none(tmp_path: Path):
    save_checkpoint(tmp_path, content(1))
    save_checkpoint(tmp_path, content(2))
    remove_checkpoints(tmp_path)
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []

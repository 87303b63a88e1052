"""What a run leaves beside its steps: events, and checkpoints by the clock."""

import pytest
import torch
from stack_runs import BATCHES, CASES, at_step, data, events_of, hashes, task
from tiny_problems import config_of

from bdl_train.inference._descent import DescentState
from bdl_train.training.train_stack import train_stack


def test_events_are_json_lines_with_five_keys_even_when_a_member_diverges(run, monkeypatch):
    def diverge(state: DescentState) -> None:
        state.stack.flat[2] = torch.nan

    at_step(monkeypatch, "deep_ensemble", 12, diverge)
    config = config_of(inference={"patience": 50}, **BATCHES)
    train_stack(task((5, 6, 7)), config, data(), run("one"))
    events = events_of(run("one"))
    assert all(set(event) == {"time", "member", "step", "key", "value"} for event in events)
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    curve = [(e["step"], e["member"]) for e in events if e["key"] == "train/nll"]
    assert [member for step, member in curve if step == 5] == [5, 6, 7]
    assert [member for step, member in curve if step == 30] == [5, 6]
    assert {e["step"] for e in events if e["key"] == "val/nll"} == {5, 10, 15, 20, 25, 30}
    assert {e["member"]: e["value"] for e in events if e["key"] == "member"} == {
        5: "done",
        6: "done",
        7: "failed",
    }
    progress = [event["value"] for event in events if event["key"] == "progress"]
    assert progress[-1]["step"] == progress[-1]["num_steps"] == 30
    assert (progress[-1]["active"], progress[-1]["failed"]) == (2, 1)


@pytest.mark.parametrize("case", ["swag", "early_stopping_conv"])
def test_a_crash_is_continued_from_the_last_checkpoint_bit_for_bit(case: str, run, straight, monkeypatch):
    name, config = CASES[case]
    config = {**config, "trainer": {**config["trainer"], "checkpoint_every_s": 0}}

    def crash(state: DescentState) -> None:
        raise OSError("the node is gone")

    with monkeypatch.context() as patched:
        at_step(patched, config["inference"]["_target_"].split(".")[2], 8, crash)
        with pytest.raises(OSError, match="the node is gone"):
            train_stack(task(), config, data(name), run("crashed"))
    seen = []
    at_step(
        monkeypatch, config["inference"]["_target_"].split(".")[2], 7, lambda state: seen.append(state.step)
    )
    assert hashes(train_stack(task(), config, data(name), run("crashed"))) == hashes(straight(case))
    assert seen == [7]  # the checkpoint after the call of steps 5 and 6

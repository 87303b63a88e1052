"""Phases as one line of steps and epochs, and the feed and the stack that follow it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stack_runs import BATCHES, data, events_of, hashes, task
from tiny_problems import config_of, example, work

from bdl_train.inference import Phase, Problem, Setting, StepLog
from bdl_train.inference._descent import DescentState, descend
from bdl_train.inference.deep_ensemble import DeepEnsemble
from bdl_train.potential import Batch
from bdl_train.training.feed import PhaseFeed, StepFeed
from bdl_train.training.timeline import Timeline
from bdl_train.training.train_stack import train_stack

PHASES = [
    Phase("a", "shuffled", 3, 4),
    Phase("b", "all", 2, 5),
    Phase("c", "once", 1, 5),
    Phase("d", "shuffled", 2, 4),
]
SEEN: list[tuple[int, int, tuple[int, ...], bool]] = []


@dataclass(frozen=True, kw_only=True)
class InPhases(DeepEnsemble):
    """Early-stopped descent, then steps on all rows, then each row once: notes what it is handed."""

    def phases(self, setting: Setting) -> list[Phase]:
        size = -(-setting.num_data // setting.batch_size)
        return [*super().phases(setting), Phase("whole", "all", 2, 3), Phase("pass", "once", 1, size)]

    def init(self, problem: Problem) -> DescentState:
        SEEN.clear()
        return super().init(problem)

    def enter(self, state: DescentState) -> None:
        SEEN.append((state.phase, -1, tuple(state.active.tolist()), True))

    def step(self, state: DescentState, batch: Batch) -> StepLog:
        SEEN.append((state.phase, state.step, tuple(batch.index.shape), batch.shared))
        return descend(state, batch, 1.0)


def position(phase: int, step: int) -> DescentState:
    state = DescentState(work(example("mlp"), [0, 1]).problem)
    state.phase, state.step = phase, step
    return state


def test_steps_and_epochs_count_over_all_phases():
    line = Timeline(PHASES)
    assert (line.num_steps, line.num_epochs) == (12 + 10 + 5 + 8, 8)
    state = position(3, 5)
    assert (line.step(state), line.shuffled_step(state), line.epoch(state)) == (32, 17, 7)
    assert not line.at_epoch_end(state)
    assert line.at_epoch_end(position(1, 5))
    assert line.is_last(state)
    assert not line.is_last(position(0, 0))


def test_a_phase_is_over_at_its_last_step_or_when_nobody_is_left():
    line = Timeline(PHASES)
    assert not line.is_over(position(1, 9))
    assert line.is_over(position(1, 10))
    state = position(1, 3)
    state.active[:] = False
    assert line.is_over(state)


def calls(phase: int, step: int, steps_per_call: int = 3) -> list[Any]:
    state, line = position(phase, step), Timeline(PHASES)
    feed = StepFeed((3, 4), 19, 4, steps_per_call, lambda: line.shuffled_step(state))
    return list(PhaseFeed(feed, line, state))


def test_the_feed_gives_what_the_phase_asks_for_from_where_it_stands():
    assert [len(call) for call in calls(0, 4)] == [3, 1]
    assert calls(1, 0) == [3, 2]
    assert calls(1, 6) == [3, 1]
    once = calls(2, 0)
    assert [tuple(call.shape) for call in once] == [(1, 2, 4)] * 4 + [(1, 2, 3)]
    assert torch.cat(once, 2)[0, 1].tolist() == list(range(19))
    assert [tuple(call.shape) for call in calls(2, 3)] == [(1, 2, 4), (1, 2, 3)]
    # A later phase of shuffled batches goes on with new orders.
    assert not torch.equal(calls(3, 0)[0], calls(0, 0)[0])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_stack_goes_through_the_phases_and_a_resumed_one_through_the_rest(
    run, monkeypatch, fraction: float
):
    monkeypatch.setenv("BDL_ALLOW", __name__)
    inference = {"_target_": f"{__name__}.InPhases", "patience": 1}
    trainer = {"max_epochs": 40, "member_fraction": fraction}
    config = config_of(inference=inference, trainer=trainer, optimizer={"lr": 0.1}, **BATCHES)
    straight = train_stack(task(), config, data(), run("straight"))
    rows = round(26 * fraction)
    tail = SEEN[SEEN.index((1, -1, (True, True, True), True)) :]
    warm = SEEN[: -len(tail)]
    assert 0 < len(warm) < 40 * (rows // 5)
    assert {shape for phase, _, shape, _ in warm} == {(3, 5)}
    whole = ((rows,), True) if fraction == 1 else ((3, rows), False)
    assert tail[1:7] == [(1, step, *whole) for step in range(6)]
    assert tail[7] == (2, -1, (True, True, True), True)
    assert [shape[1] for _, _, shape, _ in tail[8:]] == [5] * (rows // 5) + [rows % 5] * (rows % 5 > 0)
    assert straight["steps"] == 40 * (rows // 5) + 6 + -(-rows // 5)
    for phase, step in ((0, 3), (1, 0), (1, 4), (2, 1)):
        target = run(f"resumed-{phase}-{step}")
        stop_before(monkeypatch, phase, step, lambda file=target.stop_file: file.touch())
        target.path.mkdir()
        assert train_stack(task(), config, data(), target)["status"] == "stopped"
        monkeypatch.undo()
        monkeypatch.setenv("BDL_ALLOW", __name__)
        target.stop_file.unlink()
        assert hashes(train_stack(task(), config, data(), target)) == hashes(straight)
    progress: list[Mapping[str, Any]] = [
        e["value"] for e in events_of(run("straight")) if e["key"] == "progress"
    ]
    assert progress[-1]["phase"] == "pass"
    assert progress[-1]["num_epochs"] == progress[-1]["epoch"] == 40 + 2 + 1


def stop_before(monkeypatch, phase: int, step: int, act: Any) -> None:
    plain, done = InPhases.step, []

    def watched(self: Any, state: Any, batch: Any) -> Any:
        if (state.phase, state.step) == (phase, step) and not done:
            done.append(step)
            act()
        return plain(self, state, batch)

    monkeypatch.setattr(InPhases, "step", watched)

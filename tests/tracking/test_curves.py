"""The ensemble's curves from events made by hand, against numpy over the whole table of values."""

import time

import numpy as np
import pytest

from bdl_train.tracking.curves import EnsembleCurves


def event(key, value, member=None, step=0):
    return {"key": key, "member": member, "step": step, "value": value}


def losses(key, step, values):
    return [event(key, value, member, step) for member, value in values.items()]


def feed(curves, stack, events):
    return [point for one in events for point in curves.take(stack, one)]


def test_a_step_is_complete_when_every_stack_is_beyond_it():
    curves = EnsembleCurves({"000": [0, 1], "001": [2]})
    assert feed(curves, "000", losses("train/nll", 10, {0: 1.0, 1: 2.0})) == []
    assert feed(curves, "000", losses("train/nll", 20, {0: 3.0, 1: 4.0})) == []
    assert feed(curves, "001", losses("train/nll", 10, {2: 6.0})) == []
    (point,) = feed(curves, "001", losses("train/nll", 20, {2: 8.0}))
    assert (point.key, point.step, point.num_members) == ("train/nll", 10, 3)
    assert point.mean == 3.0
    assert point.std == pytest.approx(np.std([1.0, 2.0, 6.0]))
    assert [one.step for one in curves.rest()] == [20]


def test_every_order_of_stacks_gives_the_same_points():
    random = np.random.default_rng(0)
    table = random.normal(size=(6, 5))  # members, steps
    stacks = {"000": [0, 1, 2], "001": [3], "002": [4, 5]}
    queues = {
        stack: [one for s in range(5) for one in losses("val/nll", 10 * s, {m: table[m, s] for m in members})]
        for stack, members in stacks.items()
    }
    for _ in range(20):
        left, curves, points = (
            {stack: list(queue) for stack, queue in queues.items()},
            EnsembleCurves(stacks),
            [],
        )
        while left:
            stack = random.choice(sorted(left))
            points += curves.take(stack, left[stack].pop(0))
            left = {name: queue for name, queue in left.items() if queue}
        points += curves.rest()
        assert [one.step for one in points] == [0, 10, 20, 30, 40]
        np.testing.assert_allclose([one.mean for one in points], table.mean(0))
        np.testing.assert_allclose([one.std for one in points], table.std(0))


def test_members_of_a_stack_that_was_planned_later_are_taken_in():
    curves = EnsembleCurves({"000": [0, 1]})
    assert feed(curves, "000", losses("val/nll", 10, {0: 1.0, 1: 2.0})) == []
    first = feed(curves, "000", [event("member", "done", 0), event("member", "done", 1)])
    assert [(one.step, one.num_members) for one in first] == [(10, 2)]
    feed(curves, "001", [event("started", {"members": [2, 7]})])
    # Of a step that was given before, its members come too late; beyond it they make the curve.
    late = feed(
        curves, "001", [*losses("val/nll", 10, {2: 8.0, 7: 9.0}), *losses("val/nll", 20, {2: 3.0, 7: 5.0})]
    )
    assert [(one.step, one.mean, one.num_members) for one in [*late, *curves.rest()]] == [(20, 4.0, 2)]


def test_a_stack_that_ended_is_not_waited_for_and_its_members_leave_the_mean():
    curves = EnsembleCurves({"000": [0], "001": [1]})
    feed(curves, "000", [*losses("train/nll", 10, {0: 1.0}), event("member", "done", 0, 10)])
    (first,) = feed(curves, "001", [*losses("train/nll", 10, {1: 3.0}), *losses("train/nll", 20, {1: 4.0})])
    (second,) = feed(curves, "001", [event("member", "failed", 1, 20)])
    assert (first.step, first.mean, first.num_members) == (10, 2.0, 2)
    assert (second.step, second.mean, second.num_members) == (20, 4.0, 1)


def test_a_stack_that_goes_back_to_its_checkpoint_counts_once():
    curves = EnsembleCurves({"000": [0], "001": [1]})
    feed(curves, "000", [*losses("train/nll", 10, {0: 1.0}), *losses("train/nll", 20, {0: 2.0})])
    feed(curves, "000", [event("started", {"members": [0]}), *losses("train/nll", 10, {0: 1.0})])
    points = feed(curves, "001", losses("train/nll", 10, {1: 3.0})) + feed(
        curves, "001", losses("train/nll", 20, {1: 4.0})
    )
    points += feed(curves, "000", losses("train/nll", 20, {0: 2.0})) + list(curves.rest())
    assert [(one.step, one.mean, one.num_members) for one in points] == [(10, 2.0, 2), (20, 3.0, 2)]


def test_the_halves_of_a_stack_that_was_cut_are_waited_for():
    curves = EnsembleCurves({"000": [0, 1], "001": [2]})
    feed(curves, "001", [*losses("train/nll", 10, {2: 6.0}), *losses("train/nll", 20, {2: 6.0})])
    assert feed(curves, "000", [event("split", ["000a", "000b"])]) == []
    for half, member in (("000a", 0), ("000b", 1)):
        points = feed(
            curves,
            half,
            [
                event("started", {"members": [member]}),
                *losses("train/nll", 10, {member: 3.0}),
                event("x", None),
            ],
        )
    assert [(one.step, one.mean, one.num_members) for one in points] == [(10, 4.0, 3)]


def test_no_value_is_no_number_of_the_mean():
    curves = EnsembleCurves({"000": [0, 1]})
    feed(
        curves,
        "000",
        [event("train/nll", None, 0, 1), event("train/nll", True, 1, 1), event("x", None, None, 2)],
    )
    assert curves.rest() == []


def test_a_thousand_stacks_cost_no_more_than_their_events():
    stacks = {f"{m:04d}": [m] for m in range(1000)}
    curves, start, points = EnsembleCurves(stacks), time.process_time(), []
    for step in range(50):
        for stack, (member,) in stacks.items():
            points += curves.take(stack, event("train/nll", 1.0, member, step))
    assert [one.step for one in points] == list(range(49))
    assert time.process_time() - start < 10  # 0.2 s; looking at every stack for every event takes minutes

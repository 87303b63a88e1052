"""Curves from events, and who is worse than the median."""

import math

import pytest

from bdl_train.sweeps.pruning import Curve, best, why_prune


def events(*nll: float | None, steps_per_epoch: int = 12, num_epochs: int = 20):
    yield {"key": "progress", "step": 0, "value": {"num_steps": steps_per_epoch * num_epochs}}
    for epoch, value in enumerate(nll, 1):
        yield {"key": "val/stack_nll", "step": epoch * steps_per_epoch, "value": value}


DONE = {"key": "member", "step": 24, "member": 0, "value": "done"}


def curve_of(**stacks) -> Curve:
    curve = Curve(20)
    for stack, its_events in stacks.items():
        for event in its_events:
            curve.take(stack, event)
    return curve


def test_a_curve_is_the_best_so_far_at_each_epoch():
    assert curve_of(a=events(0.5, 0.3, 0.4, None)).points() == [(1, 0.5), (2, 0.3), (3, 0.3), (4, 0.3)]


def test_what_is_not_finite_is_worse_than_all():
    assert curve_of(a=events(None, None)).points() == [(1, math.inf), (2, math.inf)]


def test_the_mean_is_over_the_stacks_that_have_come_as_far():
    # The second stack waits for its turn, and the first has stopped early when it passes.
    found = curve_of(a=[*events(0.5, 0.3), DONE], b=events(0.9, 0.7, 0.6)).points()
    assert found == [(1, pytest.approx(0.7)), (2, pytest.approx(0.5)), (3, pytest.approx(0.45))]


def test_a_stack_that_started_late_is_not_held_against_epochs_it_has_not_seen():
    falling = [1 / epoch for epoch in range(1, 11)]
    others = [curve_of(s0=[*events(*falling), DONE], s1=[*events(*falling), DONE]).points()] * 3
    for seen in range(1, 11):  # the same trial, its second stack behind the first
        own = curve_of(s0=events(*falling), s1=events(*falling[:seen])).points()
        assert own[-1][0] == seen
        assert not judged(own, others)
    own = curve_of(s0=[*events(*falling), DONE], s1=events(*[9.0] * 5)).points()
    assert judged(own, others)


def test_halves_stand_for_the_stack_that_was_cut():
    found = curve_of(**{"000": events(0.9), "000a": events(0.5, 0.3), "000b": events(0.3, 0.1)}).points()
    assert found == [(1, pytest.approx(0.4)), (2, pytest.approx(0.2))]


def test_epochs_are_the_trials_own_whatever_its_batch_size():
    small = curve_of(a=events(0.5, 0.4, steps_per_epoch=100)).points()
    assert small == curve_of(a=events(0.5, 0.4, steps_per_epoch=3)).points()


def test_a_stack_that_starts_again_changes_nothing():
    assert curve_of(a=[*events(0.5, 0.3), *events(0.5, 0.3, 0.2)]).points() == [(1, 0.5), (2, 0.3), (3, 0.2)]


def judged(own, finished=(), running=(), *, after_trials=1, after_epochs=0) -> bool:
    return bool(why_prune(own, finished, running, after_trials=after_trials, after_epochs=after_epochs))


def test_only_what_is_worse_than_the_median_is_pruned():
    others = [[(1, 0.1)], [(1, 0.2)], [(1, 0.3)]]
    assert not judged([(1, 0.2)], others)
    assert judged([(1, 0.21)], others)
    assert judged([(1, math.inf)], others)
    assert not judged([(1, math.inf)], [[(1, math.inf)]])


def test_everybody_is_given_some_epochs_and_some_company():
    others = [[(9, 0.1)], [(9, 0.1)]]
    assert judged([(9, 1.0)], others, after_trials=2, after_epochs=9)
    assert not judged([(9, 1.0)], others, after_trials=3, after_epochs=9)
    assert not judged([(9, 1.0)], others, after_trials=2, after_epochs=10)
    assert not judged([], others)


def test_trials_are_compared_at_the_same_epoch():
    # The others are better in the end, and were not at epoch 2.
    others = [[(1, 0.9), (2, 0.8), (30, 0.1)]] * 3
    assert not judged([(1, 0.9), (2, 0.7)], others)
    # One that runs says nothing of epochs that it has not reached; one that has ended stays where it was.
    short = [[(1, 0.1)]]
    assert not judged([(1, 0.5), (2, 0.5)], running=short)
    assert judged([(1, 0.5), (2, 0.5)], finished=short)


def test_best_is_nan_before_the_first_value():
    assert math.isnan(best([(2, 0.1)], 1))

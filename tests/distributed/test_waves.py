"""The rule by which members are added, by values, and what a plan.json says of it."""

import json
import math
from dataclasses import replace

import pytest
import yaml

from bdl_train.build import build
from bdl_train.distributed import Launcher, Resources
from bdl_train.distributed.budget import Budget, Spent
from bdl_train.distributed.inline import Inline
from bdl_train.distributed.plan import Plan
from bdl_train.distributed.share import Share
from bdl_train.distributed.waves import (
    CHOICES,
    Decision,
    Estimate,
    Wave,
    decide,
    following,
    plan_for,
    wave_size,
    waves_of,
)
from bdl_train.errors import UsageError
from bdl_train.schema import shipped

SHIPPED = yaml.safe_load((shipped() / "budget" / "default.yaml").read_text())
INLINE = Inline(members_per_stack=None, cpus_per_stack=1, gpus_per_stack=0)


class Machines(Launcher):
    """A cluster of so many CPUs, one for each stack, that trains nothing."""

    cpus_per_stack, gpus_per_stack, ranks_per_stack = None, 0.0, 1

    def __init__(
        self, cpus: int, members_per_stack: int | None = None, num_workers: int | None = None
    ) -> None:
        self._cpus, self.members_per_stack, self.num_workers = cpus, members_per_stack, num_workers

    def resources(self) -> Resources:
        return Resources(self._cpus, 0)

    def launch(self, *args):
        raise NotImplementedError


def budget(**settings) -> Budget:
    return build({**SHIPPED, "tolerance": 0.01, "max_members": 40, **settings}, Budget, key="budget")


def wave(count: int, gain: Estimate | None, disagreement: Estimate | None) -> Wave:
    return Wave(tuple(range(count)), Spent(wall_s=10.0, device_s=10.0), gain, disagreement)


SMALL, LARGE = Estimate(0.004, 0.005), Estimate(0.008, 0.003)


# --- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "disagreement", "choice"),
    [
        (SMALL, SMALL, "tolerance"),
        (SMALL, LARGE, "go on"),
        (LARGE, SMALL, "go on"),
        (Estimate(0.0, 0.0), Estimate(-1e-9, 0.0), "tolerance"),
        (Estimate(math.nan, 0.0), SMALL, "go on"),
        (SMALL, Estimate(0.0, math.inf), "go on"),
        (None, SMALL, "go on"),
        (None, None, "go on"),
    ],
)
def test_both_gains_with_their_errors_must_be_below_the_tolerance(gain, disagreement, choice):
    decision = decide(budget(), [wave(8, gain, disagreement)], lost_in_a_row=0, next_size=8)
    assert decision.choice == choice
    assert decision.ends == (choice != "go on")


@pytest.mark.parametrize(
    ("settings", "sizes", "lost", "choice"),
    [
        ({}, [8], 8, "lost"),
        ({}, [4, 2, 2], 4, "lost"),
        ({}, [8], 3, "tolerance"),
        ({"min_members": 9}, [8], 8, "go on"),
        ({"min_members": 8}, [8], 0, "tolerance"),
        ({"min_members": 8}, [4, 4], 0, "tolerance"),
        ({"max_members": 8, "min_members": 8}, [8], 0, "tolerance"),  # the better reason of two
    ],
)
def test_what_else_decides_although_gains_are_small(settings, sizes, lost, choice):
    waves = [wave(size, SMALL, SMALL) for size in sizes]
    assert decide(budget(**settings), waves, lost_in_a_row=lost, next_size=8).choice == choice


@pytest.mark.parametrize(
    ("settings", "next_size", "choice"),
    [
        ({"max_members": 16}, 0, "max_members"),
        ({"max_members": 17}, 1, "go on"),
        ({"wall_time_s": 29}, 8, "budget"),  # two waves of 10 s are spent, a third would make 30
        ({"wall_time_s": 30}, 8, "go on"),
        ({"wall_time_s": 30}, 9, "budget"),
        ({"wall_time_s": 29}, 4, "budget"),  # half as many need not be faster by the clock
        ({"device_hours": 25.0 / 3600}, 4, "go on"),  # but take half of the devices' time
        ({"device_hours": 25.0 / 3600}, 5, "budget"),
    ],
)
def test_limits_end_what_gains_would_go_on_with(settings, next_size, choice):
    waves = [wave(8, LARGE, LARGE), wave(8, LARGE, SMALL)]
    decision = decide(budget(**settings), waves, lost_in_a_row=0, next_size=next_size)
    assert decision.choice == choice
    assert "lower the validation NLL by 0.008 ± 0.003 nats" in decision.reason


def test_every_choice_can_be_stored():
    assert Decision.__annotations__["choice"].__args__ == CHOICES


# --- which members come next --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "settings", "before", "size"),
    [
        (INLINE, {}, 0, 4),
        (INLINE, {"min_members": 7}, 0, 7),
        (INLINE, {"min_members": 7}, 7, 4),
        (INLINE, {"wave": 1}, 4, 1),
        (INLINE, {"max_members": 10}, 8, 2),
        (INLINE, {"max_members": 10}, 10, 0),
        (Machines(1, members_per_stack=1), {}, 4, 2),  # 2 at least
        (Machines(3), {}, 4, 12),
        (Machines(3, num_workers=2), {}, 4, 8),
        (Machines(16, members_per_stack=2), {}, 0, 32),
        (Share(Machines(8, members_per_stack=1), 2), {}, 4, 4),
    ],
)
def test_a_wave_is_what_trains_at_a_time(cluster, settings, before, size):
    assert wave_size(budget(**settings), cluster, before) == size


def test_later_stacks_are_numbered_on():
    first = plan_for(5, Machines(2, members_per_stack=2))
    first = replace(first, stacks=(*first.stacks[:2], replace(first.stacks[2], id="002")))
    more = following(first, plan_for(3, Machines(2, members_per_stack=2)))
    assert [(task.id, task.members) for task in more.stacks] == [("003", (5,)), ("004", (6, 7))]
    whole = Plan((*first.stacks, *more.stacks), 2, ())
    stored = json.loads(json.dumps(whole.to_json(7)))
    # The same networks as in one plan of 8: seeds follow from the number of a member.
    at_once = plan_for(8, Machines(2, members_per_stack=2)).to_json(7)
    assert [seed for one in stored["stacks"] for seed in one["seeds"]] == [
        seed for one in at_once["stacks"] for seed in one["seeds"]
    ]
    assert Plan.from_json(stored, "auto").stacks == whole.stacks
    del stored["stacks"][1]
    with pytest.raises(UsageError, match=r"plan.json is damaged"):
        Plan.from_json(stored, "auto")


# --- plan.json ----------------------------------------------------------------------------------------------------

STORED = [
    Wave((0, 1, 2), Spent(1.5, 2.5), LARGE, Estimate(math.nan, 0.1), Decision("go on", "because")),
    Wave((3, 4), Spent(), None, None, Decision("budget", "none left"), ({"members": 1, "nll": 0.5},)),
]


def test_waves_survive_their_json():
    stored = {"waves": json.loads(json.dumps([one.to_json() for one in STORED], allow_nan=False))}
    assert stored["waves"][0]["reason"] == "because"
    found = waves_of(stored, 5)
    assert found[1] == STORED[1]
    assert (found[0].members, found[0].spent, found[0].gain) == ((0, 1, 2), Spent(1.5, 2.5), LARGE)
    assert found[0].disagreement is not None
    assert math.isnan(found[0].disagreement.value)
    assert found[0].disagreement.se == 0.1
    begun = Wave((0, 1))
    assert waves_of({"waves": [begun.to_json()]}, 2) == (begun,)


@pytest.mark.parametrize(
    "damage",
    [
        lambda waves: waves.clear(),
        lambda waves: waves.pop(),
        lambda waves: waves[0].update(members=[0, 1, 1]),
        lambda waves: waves[0].update(members=3),
        lambda waves: waves[0].update(decision="perhaps"),
        lambda waves: waves[0].update(decision=None),
        lambda waves: waves[0].update(decision="tolerance"),
        lambda waves: waves[0].update(reason=None),
        lambda waves: waves[0].update(gain="much"),
        lambda waves: waves[0].update(wall_time_s=-1),
        lambda waves: waves[0].update(wall_time_s="1"),
        lambda waves: waves[0].pop("device_time_s"),
        lambda waves: waves[0].update(curve=3),
        lambda waves: waves.append(3),
    ],
)
def test_damaged_waves_are_refused(damage):
    stored = [one.to_json() for one in STORED]
    damage(stored)
    with pytest.raises(UsageError, match=r"plan.json is damaged"):
        waves_of({"waves": stored}, 5)
    with pytest.raises(UsageError, match=r"plan.json is damaged"):
        waves_of({}, 5)

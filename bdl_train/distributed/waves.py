"""How many members: waves of stacks that are planned one after another, and the rule by which no more are added.

Pure functions from values to values. What a run decided stands in its `plan.json`: a resumed one goes on with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bdl_train.distributed import Cluster
from bdl_train.distributed.budget import Budget, Spent
from bdl_train.distributed.plan import Plan, count, plan
from bdl_train.errors import UsageError
from bdl_train.files import to_json

AUTO = "auto"
"""The value of `num_members` that leaves it to the budget."""
PER_WORKER = 4
"""Members that a worker adds to a wave where `cluster.members_per_stack` is null."""

Choice = Literal["go on", "tolerance", "max_members", "budget", "lost"]
CHOICES = ("go on", "tolerance", "max_members", "budget", "lost")


NOTHING = Spent()


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error."""

    value: float
    se: float

    @property
    def upper(self) -> float:
        return self.value + self.se

    def __str__(self) -> str:
        return f"{self.value:.2g} ± {self.se:.1g}"


@dataclass(frozen=True)
class Decision:
    """What is decided after a wave, and why."""

    choice: Choice
    reason: str

    @property
    def ends(self) -> bool:
        return self.choice != "go on"


@dataclass(frozen=True)
class Wave:
    """Members that were added together.

    Attributes:
        members: Ensemble indices.
        spent: On them, of all sessions that are over.
        gain, disagreement: What one more member would add to the validation NLL and to the disagreement, nats a row;
            None while that is not known, or with too few members to say.
        decision: After it; None while it is not over.
        curve: Of the last wave: rows of `evaluation.member_gain.curve`.
    """

    members: tuple[int, ...]
    spent: Spent = NOTHING
    gain: Estimate | None = None
    disagreement: Estimate | None = None
    decision: Decision | None = None
    curve: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        def of(estimate: Estimate | None) -> list[float | None]:
            return [None, None] if estimate is None else [estimate.value, estimate.se]

        gain, gain_se = of(self.gain)
        disagreement, disagreement_se = of(self.disagreement)
        found = {
            "members": list(self.members),
            "wall_time_s": self.spent.wall_s,
            "device_time_s": self.spent.device_s,
            "gain": gain,
            "gain_se": gain_se,
            "disagreement": disagreement,
            "disagreement_se": disagreement_se,
            "decision": None if self.decision is None else self.decision.choice,
            "reason": None if self.decision is None else self.decision.reason,
        }
        return to_json({**found, "curve": list(self.curve)} if self.curve else found)

    @classmethod
    def from_json(cls, stored: Any) -> "Wave":
        """The inverse of `to_json`; KeyError, TypeError or ValueError for what is none."""
        decision = None
        if stored["decision"] is not None:
            if stored["decision"] not in CHOICES or not isinstance(stored["reason"], str):
                raise ValueError(f"decision {stored['decision']!r} of a wave")
            decision = Decision(stored["decision"], stored["reason"])
        spent = [stored["wall_time_s"], stored["device_time_s"]]
        if not all(type(one) in (int, float) and 0 <= one < math.inf for one in spent):
            raise ValueError(f"times {spent} of a wave")
        rows = tuple(dict(row) for row in stored.get("curve", ()))
        return cls(
            tuple(stored["members"]),
            Spent(*spent),
            _estimate(stored["gain"], stored["gain_se"]),
            _estimate(stored["disagreement"], stored["disagreement_se"]),
            decision,
            rows,
        )


def _estimate(value: Any, se: Any) -> Estimate | None:
    """A pair of nulls is none; a null alone was not finite."""
    if value is None and se is None:
        return None
    return Estimate(*(math.nan if one is None else float(one) for one in (value, se)))


def waves_of(stored: Any, num_members: int) -> tuple[Wave, ...]:
    """The waves of a plan.json, which anyone may have written.

    Args:
        stored: What the file holds.
        num_members: That its stacks hold.

    Raises:
        UsageError: missing or misshapen, or waves that do not hold the members of the stacks one after another.
    """
    try:
        waves = tuple(Wave.from_json(one) for one in stored["waves"])
        held = [member for wave in waves for member in wave.members]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"plan.json is damaged: its waves, {type(error).__name__} {error}.") from error
    ended = [wave.decision is not None and wave.decision.ends for wave in waves]
    if not waves or held != list(range(num_members)) or not all(wave.members for wave in waves):
        raise UsageError(
            f"plan.json is damaged: its waves must hold the members 0 to {num_members - 1} of its stacks in order."
        )
    if any(ended[:-1]) or any(wave.decision is None for wave in waves[:-1]):
        raise UsageError("plan.json is damaged: a wave follows one after which none was decided.")
    return waves


# --- which members come next --------------------------------------------------------------------------------------


def plan_for(num_members: int, cluster: Cluster, members_per_stack: int | None = None) -> Plan:
    """What `plan` says for so many members on this cluster.

    Args:
        num_members: M.
        cluster: Where they train.
        members_per_stack: Instead of the cluster's own, which may be null.
    """
    return plan(
        num_members,
        cluster.resources(),
        num_workers=cluster.num_workers,
        members_per_stack=members_per_stack or cluster.members_per_stack,
        cpus_per_stack=cluster.cpus_per_stack,
        gpus_per_stack=cluster.gpus_per_stack,
        ranks_per_stack=cluster.ranks_per_stack,
    )


def wave_size(budget: Budget, cluster: Cluster, num_before: int) -> int:
    """Members of the next wave: as `budget.wave` says or as many as train at a time, 2 at least; the first wave has at
    least `budget.min_members`, and the last one ends at `budget.max_members`.

    Args:
        budget: Of the run.
        cluster: Where they train.
        num_before: Members of the waves before.
    """
    size = budget.wave
    if size is None:
        each = cluster.members_per_stack or PER_WORKER
        # With a stack for every worker that there might be, the plan says how many there are.
        size = max(2, each * plan_for(each * budget.max_members, cluster, each).num_workers)
    if num_before == 0:
        size = max(size, budget.min_members)
    return min(size, budget.max_members - num_before)


def following(recorded: Plan, more: Plan) -> Plan:
    """The stacks of `more`, whose members and ids count from 0, as they follow those of a plan.

    Args:
        recorded: All stacks so far.
        more: Of the next wave.
    """
    first = sum(len(task.members) for task in recorded.stacks)
    number = 1 + max(int(task.id.rstrip("abr")) for task in recorded.stacks)
    stacks = tuple(
        replace(task, id=f"{number + i:03d}", members=tuple(first + member for member in task.members))
        for i, task in enumerate(more.stacks)
    )
    return Plan(stacks, more.num_workers, more.reasons)


# --- whether they are added ---------------------------------------------------------------------------------------


def decide(
    budget: Budget,
    waves: Sequence[Wave],
    *,
    lost_in_a_row: int,
    next_size: int,
) -> Decision:
    """Whether another wave is added. The first of these that holds decides:

    1. As many as `min_members` were lost, one after another to the last: others would be lost too (`lost`).
    2. There are `min_members`, and one more would gain less than `tolerance`, in validation NLL and in disagreement,
       the standard error added to each (`tolerance`). A gain that is not known or not finite is not below it.
    3. There are `max_members` (`max_members`).
    4. A limit is spent, or has no room for what the next wave would take, by what the last one took (`budget`).
    5. Else it goes on (`go on`).

    Args:
        budget: Of the run.
        waves: So far; the last one has its estimates and what was spent on it.
        lost_in_a_row: Members that are not usable, from the last one back to the first that is.
        next_size: Members of the next wave.
    """
    last, trained = waves[-1], sum(len(wave.members) for wave in waves)
    if lost_in_a_row >= budget.min_members:
        return Decision("lost", f"the last {count(lost_in_a_row, 'member')} were all lost")
    small = [one is not None and one.upper < budget.tolerance for one in (last.gain, last.disagreement)]
    against = f"tolerance {budget.tolerance:g}"
    if trained >= budget.min_members and all(small):
        return Decision("tolerance", f"{_words(last)}, with their standard errors below {against}")
    if trained >= budget.max_members:
        return Decision(
            "max_members", f"budget.max_members={budget.max_members} are trained; {_words(last)}, {against}"
        )
    spent = sum((wave.spent for wave in waves), NOTHING)
    share = next_size / len(last.members)
    # Members train side by side: fewer of them need not be faster by the clock.
    expected = Spent(last.spent.wall_s * max(1.0, share), last.spent.device_s * share)
    if why_not := budget.why_not(spent, expected):
        return Decision("budget", f"{why_not}; {_words(last)}, {against}")
    return Decision("go on", f"{_words(last)}, {against}")


def _words(wave: Wave) -> str:
    if wave.gain is None or wave.disagreement is None:
        return "too few members or validation rows to say what one more would add"
    return (
        f"one more member would lower the validation NLL by {wave.gain} nats and raise the disagreement of members by "
        f"{wave.disagreement}"
    )

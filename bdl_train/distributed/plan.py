"""The plan: which members share a stack, what each stack gets, and why. Pure functions from values to values."""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from bdl_train.distributed import Resources
from bdl_train.errors import UsageError
from bdl_train.seeds import Stream, member_seed
from bdl_train.training.prepared import StackTask

MEMBERS_PER_STACK = 20
"""Most members of one stack unless asked otherwise: past it a step gains little and a crash costs more."""

_ID = re.compile(r"[0-9]{3,}[abr]*")
"""Of a stack, also its folder; letters tell the halves of one that was cut, and a retry."""


@dataclass(frozen=True)
class Plan:
    """Stacks in the order in which they start.

    Attributes:
        stacks: One task each.
        num_workers: How many run at the same time.
        reasons: What was decided, and why.
    """

    stacks: tuple[StackTask, ...]
    num_workers: int
    reasons: tuple[str, ...]

    def to_json(self, run_seed: int) -> dict[str, Any]:
        stacks = []
        for task in self.stacks:
            seeds = [member_seed(run_seed, m, Stream.INIT, task.attempt) for m in task.members]
            stacks.append({**asdict(task), "members": list(task.members), "seeds": seeds})
        return {"num_workers": self.num_workers, "reasons": list(self.reasons), "stacks": stacks}

    @classmethod
    def from_json(cls, stored: Any, num_members: int | str) -> "Plan":
        """The inverse of `to_json`, of a file that anyone may have written: ids become folders, members seeds.

        Args:
            stored: What the file holds.
            num_members: M of the run's config; where that is a text, `auto`, the stacks themselves say how many.

        Raises:
            UsageError: missing or misshapen entries, or stacks that do not hold each member once.
        """
        try:
            stacks = tuple(_task_from_json(one) for one in stored["stacks"])
            made = cls(stacks, stored["num_workers"], tuple(stored["reasons"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"plan.json is damaged: {type(error).__name__} {error}.") from error
        if not _is_int(made.num_workers, 1) or not all(isinstance(reason, str) for reason in made.reasons):
            raise UsageError("plan.json is damaged: num_workers must be 1 or more and reasons must be text.")
        if len({task.id for task in stacks}) < len(stacks):
            raise UsageError("plan.json is damaged: two stacks have the same id.")
        held = [member for task in stacks for member in task.members]
        expected = len(held) if isinstance(num_members, str) else num_members
        if len(held) != expected or set(held) != set(range(expected)):
            raise UsageError(
                f"plan.json is damaged: its stacks must hold each of the config's {expected} members "
                f"(num_members) once, they hold {len(held)} entries with {len(set(held))} different members."
            )
        return made


def _task_from_json(stored: Any) -> StackTask:
    """One stack of `Plan.to_json`; KeyError, TypeError or ValueError for what is none."""
    task = StackTask(
        id=stored["id"],
        members=tuple(stored["members"]),
        cpus=stored["cpus"],
        gpus=stored["gpus"],
        attempt=stored["attempt"],
        ranks=stored.get("ranks", 1),
        together=stored.get("together"),
    )
    if not isinstance(task.id, str) or not _ID.fullmatch(task.id):
        raise ValueError(f"id {task.id!r} of a stack must be three or more digits")
    if not task.members or not all(_is_int(member, 0) for member in task.members):
        raise ValueError(f"members of stack {task.id} must be whole numbers, one or more")
    if not _is_int(task.attempt, 0):
        raise ValueError(f"attempt of stack {task.id} must be 0 or more, got {task.attempt!r}")
    if not _is_int(task.ranks, 1):
        raise ValueError(f"ranks of stack {task.id} must be 1 or more, got {task.ranks!r}")
    if not isinstance(task.together, str | None):
        raise ValueError(f"together of stack {task.id} must be text or null, got {task.together!r}")
    if not _is_int(task.cpus, 1):
        raise ValueError(f"cpus of stack {task.id} must be 1 or more, got {task.cpus!r}")
    # `type`, not `isinstance`: a bool is an int.
    if type(task.gpus) not in (int, float) or not 0 <= task.gpus < math.inf:
        raise ValueError(f"gpus of stack {task.id} must be 0 or more, got {task.gpus!r}")
    return task


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def assign_members(num_members: int, num_stacks: int) -> list[range]:
    """Give each stack a contiguous share; shares differ by at most one member."""
    bounds = [num_members * stack // num_stacks for stack in range(num_stacks + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def plan(
    num_members: int,
    resources: Resources,
    *,
    num_workers: int | None,
    members_per_stack: int | None,
    cpus_per_stack: int | None,
    gpus_per_stack: float,
    ranks_per_stack: int = 1,
    together: str | None = None,
) -> Plan:
    """Decide stacks and their shares of the machine.

    Args:
        num_members: M.
        resources: What exists.
        num_workers: Stacks at the same time; None = as many as fit.
        members_per_stack: None = members are spread over the workers, at most 20 in a stack.
        cpus_per_stack: Threads a stack, or of each of its ranks; None = an equal share of all.
        gpus_per_stack: Share of a GPU of a stack, or of each of its ranks, 0 to 1.
        ranks_per_stack: Processes that split the batches of one stack.
        together: Why all members must be in one stack; None = each is on its own.

    Raises:
        UsageError: no members, a stack that no resource can ever hold, or several for members that interact.
    """
    if num_members < 1:
        raise UsageError(f"num_members must be 1 or more, got {num_members}.")
    if together is not None and members_per_stack is not None and members_per_stack < num_members:
        raise UsageError(
            f"cluster.members_per_stack={members_per_stack} would cut {count(num_members, 'member')} into several "
            f"stacks, and they must be in one: {together}. Set it to {num_members} or more, or to null."
        )
    if ranks_per_stack > 1 and 0 < gpus_per_stack < 1:
        raise UsageError(
            f"cluster.gpus_per_stack={gpus_per_stack} with cluster.ranks_per_stack={ranks_per_stack}: ranks cannot "
            "share a GPU, set cluster.gpus_per_stack to 1, or to 0 for CPUs."
        )
    fit = room(resources, cpus_per_stack or 1, gpus_per_stack) // ranks_per_stack
    if fit == 0:
        raise UsageError(_too_much(resources, cpus_per_stack, gpus_per_stack, ranks_per_stack))
    reasons = []
    slots = fit if num_workers is None else num_workers
    if slots > fit:
        reasons.append(
            f"{fit} of {count(slots, 'worker')} fit into {count(resources.cpus, 'CPU')} and "
            f"{count(resources.gpus, 'GPU')}"
        )
        slots = fit
    if together is not None:
        size = num_members
        reasons.append(f"all {count(num_members, 'member')} in one stack: {together}")
    elif members_per_stack is None:
        size = min(MEMBERS_PER_STACK, math.ceil(num_members / slots))
        reasons.append(
            f"up to {count(size, 'member')} in a stack: {count(num_members, 'member')} over "
            f"{count(slots, 'worker')}, at most {MEMBERS_PER_STACK} in one stack"
        )
    else:
        size = members_per_stack
        reasons.append(f"up to {count(size, 'member')} in a stack: cluster.members_per_stack={size}")
    shares = assign_members(num_members, math.ceil(num_members / size))
    slots = min(slots, len(shares))
    cpus = cpus_per_stack or _most_cpus(resources, slots * ranks_per_stack, gpus_per_stack)
    share = f"{count(cpus, 'CPU')} and {count(gpus_per_stack, 'GPU')}"
    if ranks_per_stack > 1:
        share = f"{ranks_per_stack} ranks of {share}"
    if len(shares) == 1:
        reasons.append(f"1 stack with {share}")
    else:
        line = "" if slots == len(shares) else "; the others wait for their turn"
        reasons.append(f"{len(shares)} stacks, {slots} at a time, each with {share}{line}")
    width = max(3, len(str(len(shares) - 1)))
    stacks = tuple(
        StackTask(
            id=f"{i:0{width}d}",
            members=tuple(share),
            cpus=cpus,
            gpus=gpus_per_stack,
            ranks=ranks_per_stack,
            together=together,
        )
        for i, share in enumerate(shares)
    )
    return Plan(stacks, slots, tuple(reasons))


def room(resources: Resources, cpus: int, gpus: float) -> int:
    """How many shares of this size the machines hold; none lies on two machines."""
    held = 0
    for its_cpus, its_gpus in resources.machines:
        here = its_cpus // cpus
        if gpus > 0:
            # A share lies on one GPU: two of 0.4 fit on each, the rest of it serves nobody.
            here = min(here, int(its_gpus) * math.floor(1 / gpus + 1e-9))
        held += here
    return held


def _most_cpus(resources: Resources, shares: int, gpus: float) -> int:
    """The most CPUs a share can have when so many are to fit."""
    most = max(1, resources.cpus // shares)
    return next((cpus for cpus in range(most, 1, -1) if room(resources, cpus, gpus) >= shares), 1)


def _too_much(resources: Resources, cpus: int | None, gpus: float, ranks: int) -> str:
    asked = f"cluster.cpus_per_stack={cpus} and " if cpus is not None else ""
    asked += f"cluster.gpus_per_stack={gpus:g}"
    if ranks > 1:
        asked += f" for each of cluster.ranks_per_stack={ranks}"
    each = Counter(resources.machines).most_common()
    there = ", ".join(
        f"{count(n, 'machine')} with {count(c, 'CPU')} and {count(g, 'GPU')}" for (c, g), n in each
    )
    return f"{asked} asks for more than there is: {there}. Lower it, or use a larger cluster."


def refit(recorded: Plan, today: Plan) -> Plan:
    """The recorded stacks with today's shares of the machine: a run may be resumed on another one.

    Args:
        recorded: The plan of the run; its stacks, members and attempts stay.
        today: What `plan` says for as many members here and now.

    Raises:
        UsageError: the recorded plan cuts members that must be in one stack.
    """
    share = today.stacks[0]
    if share.together is not None and len(recorded.stacks) > 1:
        raise UsageError(
            f"plan.json is damaged: it has {len(recorded.stacks)} stacks for members that must be in one: "
            f"{share.together}."
        )
    stacks = tuple(
        replace(task, cpus=share.cpus, gpus=share.gpus, ranks=share.ranks, together=share.together)
        for task in recorded.stacks
    )
    if stacks == recorded.stacks:
        return recorded
    held = f"{count(share.cpus, 'CPU')} and {count(share.gpus, 'GPU')}"
    whose = "the recorded stack" if len(stacks) == 1 else f"each of the {len(stacks)} recorded stacks"
    return Plan(stacks, today.num_workers, (*recorded.reasons, f"resumed with {held} for {whose}"))


def count(number: float, noun: str) -> str:
    return f"{number:.10g} {noun}" if number == 1 else f"{number:.10g} {noun}s"

"""Trains the members of a run: all at once, or with `num_members=auto` in waves until no more are worth it."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bdl_train.data import Data
from bdl_train.distributed import Cluster, Job, Launcher
from bdl_train.distributed.budget import Budget, Spent, device_seconds
from bdl_train.distributed.outcome import member_entries, write_posterior
from bdl_train.distributed.plan import Plan
from bdl_train.distributed.waves import AUTO, NOTHING, Wave, decide, following, plan_for, wave_size, waves_of
from bdl_train.errors import UsageError
from bdl_train.evaluation.member_gain import LEAST_MEMBERS, curve, gain_of_one_more
from bdl_train.evaluation.member_views import MemberViews, member_views, some_rows
from bdl_train.files import write_json
from bdl_train.inference import Method
from bdl_train.posteriors.artefact import Artefact, read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, read_json
from bdl_train.training.prepared import StackTask
from bdl_train.verbs._unused import no_budget

if TYPE_CHECKING:
    from bdl_train.verbs.train import Terminal, Work

Results = dict[str, dict[str, Any]]


# --- what is refused ----------------------------------------------------------------------------------------------


def check_auto(
    num_members: int | str, budget: Budget, method: Method[Any], data: Data, cluster: Cluster
) -> None:
    """Refuse what does not go with a number of members that is chosen, or with a fixed one.

    Raises:
        UsageError: names the keys to change.
    """
    if num_members != AUTO:
        for name, value in budget.limits.items():
            raise UsageError(no_budget(f"budget.{name}={value:g}", num_members))
        return
    name = type(method).__module__.rpartition(".")[2]
    if method.members_interact is not None:
        raise UsageError(
            f"num_members=auto adds members later, and those of inference={name} must train together: "
            f"{method.members_interact}. Set num_members to a number."
        )
    if len(data.val) < 2:
        raise UsageError(
            f"num_members=auto looks at what members add on the validation part, and {data.name} has "
            f"{len(data.val)} rows there: set data.val_fraction above 0, or num_members to a number."
        )
    if cluster.needs_whole_plan:
        kind = type(cluster).__module__.rpartition(".")[2]
        raise UsageError(
            f"num_members=auto plans members as it goes, and cluster={kind} as it is set needs all stacks beforehand: "
            "set num_members to a number, or use cluster.shape=ray with slurm."
        )


# --- training -----------------------------------------------------------------------------------------------------


def first_size(num_members: int | str, budget: Budget, cluster: Cluster) -> int:
    """Members that are planned before anything is trained: all of them, or the first wave."""
    return num_members if isinstance(num_members, int) else wave_size(budget, cluster, 0)


def first_waves(the_plan: Plan) -> list[dict[str, Any]]:
    """The entry `waves` of a new plan.json."""
    return [Wave(_members(the_plan.stacks)).to_json()]


def trained(
    run_dir: RunDir,
    work: "Work",
    the_plan: Plan,
    launcher: Launcher,
    terminal: "Terminal",
    tick: Callable[[], None],
) -> tuple[Plan, Results]:
    """Train what the plan holds and, with `num_members=auto`, what is decided upon then.

    Returns:
        The plan with all its stacks, and their results by id; one of them is `stopped` if the run was asked to stop.
    """
    job = Job(work.config, work.data, run_dir)
    if work.settings.num_members != AUTO:
        return the_plan, launcher.launch(the_plan.stacks, job, tick)
    return _Waves(run_dir, work, job, launcher, terminal, tick).carry_out(the_plan)


def chosen(run_dir: RunDir, budget: Budget) -> dict[str, Any] | None:
    """How the number of members was chosen, for the manifest; None where it was given."""
    stored = read_json(run_dir.plan)
    if "waves" not in stored:
        return None
    waves = waves_of(stored, sum(len(one["members"]) for one in stored["stacks"]))
    decision = waves[-1].decision
    assert decision is not None
    return {
        "decision": decision.choice,
        "reason": decision.reason,
        "tolerance": budget.tolerance,
        "limits": {"max_members": budget.max_members, **budget.limits},
        "spent": budget.used(sum((wave.spent for wave in waves), NOTHING)),
        "curve": list(waves[-1].curve),
        "waves": [replace(wave, curve=()).to_json() for wave in waves],
    }


@dataclass
class _Waves:
    run_dir: RunDir
    work: "Work"
    job: Job
    launcher: Launcher
    terminal: "Terminal"
    tick: Callable[[], None]
    _results: Results = field(default_factory=dict)
    _views: dict[int, MemberViews] = field(
        default_factory=dict
    )  # by number of the wave, if it has usable members

    def carry_out(self, the_plan: Plan) -> tuple[Plan, Results]:
        stacks = the_plan.stacks
        waves = list(waves_of(read_json(self.run_dir.plan), len(_members(stacks))))
        while True:
            start = time.monotonic()
            self._results |= self.launcher.launch(stacks, self.job, self.tick)
            if any(result["status"] == "stopped" for result in self._results.values()):
                self._record([*waves[:-1], self._charged(the_plan, waves[-1], start)])
                return the_plan, self._results
            if waves[-1].decision is None:
                waves[-1] = self._decided(the_plan, waves, start)
                self._say(waves)
            if waves[-1].decision is not None and waves[-1].decision.ends:
                self._record(waves)
                return the_plan, self._results
            more = self._next(the_plan)
            stacks = more.stacks
            waves.append(Wave(_members(stacks)))
            the_plan = replace(the_plan, stacks=(*the_plan.stacks, *stacks))
            self._record(waves, more)

    def _next(self, the_plan: Plan) -> Plan:
        before = len(_members(the_plan.stacks))
        size = wave_size(self.work.budget, self.launcher, before)
        more = following(the_plan, plan_for(size, self.launcher))
        where = f"members {before} to {before + size - 1}"
        more = replace(more, reasons=tuple(f"{where}: {reason}" for reason in more.reasons))
        for reason in more.reasons:
            self.terminal.say(f"plan: {reason}")
        return more

    def _charged(self, the_plan: Plan, wave: Wave, start: float) -> Wave:
        """With what this session spent on it."""
        stacks = [task for task in the_plan.stacks if task.members[0] in wave.members]
        wall_s = wave.spent.wall_s + time.monotonic() - start
        return replace(wave, spent=Spent(wall_s, device_seconds(stacks, self._results)))

    def _decided(self, the_plan: Plan, waves: Sequence[Wave], start: float) -> Wave:
        """The last wave, with what its members showed and what follows from it."""
        work, wave = self.work, waves[-1]
        entries = member_entries(the_plan, self._results)
        usable = {entry["id"] for entry in entries if entry["status"] == "done"}
        seen = None
        if usable:
            with self.terminal.computing():
                write_posterior(self.run_dir, work.config, work.recipe, work.data, entries, self._results)
                seen = self._seen(waves, usable)
                if len(seen) >= LEAST_MEMBERS:
                    gain = gain_of_one_more(seen)
                    wave = replace(wave, gain=gain.nll, disagreement=gain.disagreement)
        wave = self._charged(the_plan, wave, start)
        decision = decide(
            work.budget,
            [*waves[:-1], wave],
            lost_in_a_row=len(entries) - 1 - max(usable, default=-1),
            next_size=wave_size(work.budget, self.launcher, len(entries)),
        )
        if not decision.ends or seen is None:
            return replace(wave, decision=decision)
        rows = curve(seen, work.settings.seed).to_dict("records")
        named = tuple({str(name): value for name, value in row.items()} for row in rows)
        return replace(wave, decision=decision, curve=named)

    def _seen(self, waves: Sequence[Wave], usable: set[int]) -> MemberViews:
        """What all usable members say of the validation rows, each wave by itself: a resumed run sees the same bits."""
        data = self.work.data
        rows = some_rows(data.val, max(1, len(data.target.classes)))
        artefact: Artefact | None = None
        for number, wave in enumerate(waves):
            members = [member for member in wave.members if member in usable]
            if number not in self._views and members:
                artefact = artefact or read_artefact(self.run_dir.posterior)
                some = replace(artefact, posterior=artefact.posterior.only(*members))
                self._views[number] = member_views(Predictor(some), rows, data.target)
        return MemberViews.joined([self._views[number] for number in sorted(self._views)])

    def _say(self, waves: Sequence[Wave]) -> None:
        decision, trained_so_far = waves[-1].decision, sum(len(wave.members) for wave in waves)
        assert decision is not None
        then = "no more are added" if decision.ends else "more are added"
        self.terminal.say(f"{trained_so_far} members: {decision.reason}: {then}")

    def _record(self, waves: Sequence[Wave], more: Plan | None = None) -> None:
        """Bring plan.json up to date; what it holds of stacks stays."""
        stored = read_json(self.run_dir.plan)
        if more is not None:
            added: Mapping[str, Any] = more.to_json(self.work.settings.seed)
            stored["stacks"] += added["stacks"]
            stored["reasons"] += added["reasons"]
        write_json(self.run_dir.plan, {**stored, "waves": [wave.to_json() for wave in waves]})


def _members(stacks: Iterable[StackTask]) -> tuple[int, ...]:
    return tuple(member for task in stacks for member in task.members)

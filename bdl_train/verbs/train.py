"""Train a Bayesian ensemble and score its posterior predictive.

A stopped or killed run is finished by `resume=<run>`: its own config and plan decide, and beside it only cluster.*,
tracking.* and, while none of its stacks has finished, a larger trainer.max_epochs may be given.

Examples:
    bdl train
    bdl train data=uci data.name=energy likelihood=heteroscedastic_gaussian inference=deep_ensemble num_members=5
    bdl train num_members=auto budget.tolerance=0.001 budget.wall_time_s=3600
    bdl train -m data=uci data.split=0,1,2 likelihood=heteroscedastic_gaussian inference=deep_ensemble,swag
    bdl train resume=runs/breast_cancer/20260101-120000-a1b2c3
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from bdl_train.build import build, settings_of
from bdl_train.config import MASK, Options, leaves, mask_secrets
from bdl_train.data import Data
from bdl_train.distributed import Cluster, Launcher
from bdl_train.distributed.budget import Budget
from bdl_train.distributed.outcome import member_entries, run_status, write_manifest, write_posterior
from bdl_train.distributed.plan import Plan, plan, refit
from bdl_train.distributed.waves import AUTO
from bdl_train.errors import WORSE, Exit, RunFailedError, UsageError, guarded
from bdl_train.evaluation.compare import show
from bdl_train.evaluation.diagnostics_chapter import Diagnosis, diagnose
from bdl_train.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from bdl_train.evaluation.table import show_metrics
from bdl_train.files import sha256, write_bytes, write_json
from bdl_train.locks import locked
from bdl_train.posteriors.artefact import read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import KEEP_STOP, RunDir, read_json
from bdl_train.tracking import Follower, Tracker
from bdl_train.tracking.progress import Progress
from bdl_train.training.problem import Recipe
from bdl_train.verbs._prior_run import check_prior_run
from bdl_train.verbs._resume import check_longer, check_unchanged, resumed_config
from bdl_train.verbs._runs import load_data
from bdl_train.verbs._signals import stop_on_signal
from bdl_train.verbs._unused import refuse_unused, tell_unused
from bdl_train.verbs._waves import check_auto, chosen, first_size, first_waves, trained
from bdl_train.verbs.compare import compare_runs

MULTIRUN = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/train.yaml` that belong to no group."""

    num_members: Annotated[int, Field(ge=1)] | Literal["auto"]
    seed: Annotated[int, Field(ge=0)]
    output_dir: str
    name: str | None
    resume: str | None
    plan_only: bool
    check_prior: bool
    allow: list[str]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        return settings_of(
            cls, {one.name: config[one.name] for one in fields(cls) if one.name in config}, key=""
        )


@dataclass(frozen=True)
class Work:
    """One run, checked and ready to be launched.

    Attributes:
        inputs: What the run depends on beside its config: the data's fingerprint, the run behind its prior.
        tracker: Beside the progress view.
        budget: Ends an ensemble of `num_members=auto`.
        plan: What `plan` says for these members, or the first wave of them, here and now.
        start: `time.monotonic()` at the beginning.
    """

    config: dict[str, Any]
    settings: Settings
    recipe: Recipe
    data: Data
    inputs: dict[str, Any]
    tracker: Tracker
    budget: Budget
    plan: Plan
    start: float


class Terminal:
    """How a training meets the process around it: what it prints, shows and does on a signal, here in the main thread.

    Attributes:
        parts: Of the data, that are scored in the end.
    """

    parts: Sequence[str] = ("test",)

    def check(self, work: Work) -> None:
        """Called before anything is written.

        Raises:
            UsageError: this run is none that is wanted here.
        """

    def say(self, text: str) -> None:
        print(text, flush=True)

    def listeners(self, the_plan: Plan) -> list[Tracker]:
        """What follows the events of the stacks, beside the run's own tracker."""
        return [Progress({task.id: len(task.members) for task in the_plan.stacks})]

    def stopping(self, run_dir: RunDir) -> AbstractContextManager[None]:
        """Around the training: turns a wish to stop into the run's STOP file."""
        return stop_on_signal(run_dir.stop_file.exists, run_dir.stop_file.touch, "members")

    def computing(self) -> AbstractContextManager[Any]:
        """Around what this process computes itself: torch's global generator is not for several threads at once."""
        return nullcontext()

    def show(self, title: str, evaluation: Evaluation) -> None:
        show_metrics(title, evaluation.metrics)


def run(config: dict[str, Any], options: Options) -> Exit:
    """Train one run."""
    settled = _settled(config, options)
    launcher = _launcher(settled)
    try:
        return train(settled, launcher)[0]
    finally:
        launcher.close()


def run_many(configs: list[dict[str, Any]], options: Options) -> Exit:
    """Train one run a job, sharing one launcher where the jobs agree on it, then print them side by side."""
    worst, finished = Exit.DONE, []
    launchers: dict[str, Launcher] = {}
    try:
        for i, (config, words) in enumerate(zip(configs, options.jobs, strict=True)):
            label = f"[{i + 1}/{len(configs)}] {' '.join(words)}"
            print(f"\n{label}")
            one = replace(options, overrides=words, multirun_index=i)

            def job(config: dict[str, Any] = config, one: Options = one) -> Exit:
                settled = _settled(config, one)
                key = repr(settled["cluster"])
                launchers[key] = launchers.get(key) or _launcher(settled)
                status, run_dir = train(settled, launchers[key])
                if run_dir is not None and run_dir.metrics.is_file():
                    finished.append(run_dir)
                return status

            status = guarded(f"bdl train {label}", job)
            worst = max(worst, status, key=WORSE.index)
            if status is Exit.STOPPED:
                break
    finally:
        for launcher in launchers.values():
            launcher.close()
    if finished:
        show(
            compare_runs(finished, None),
            f"{len(finished)} of {len(configs)} runs: mean ± standard error over splits",
        )
    return worst


def _launcher(config: Mapping[str, Any]) -> Launcher:
    cluster = build(config["cluster"], Cluster, key="cluster")
    if not isinstance(cluster, Launcher):
        name = type(cluster).__module__.rpartition(".")[2]
        raise UsageError(
            f"cluster={name} is a queue: hand it the run with `bdl submit`, or train from here with cluster=ray_local, "
            "ray_cluster or inline."
        )
    return cluster


def _settled(config: dict[str, Any], options: Options) -> dict[str, Any]:
    if config["resume"] is not None:
        return resumed_config(config, options)
    refuse_unused(config, options.overrides)
    return config


def train(
    config: dict[str, Any], launcher: Launcher, terminal: Terminal | None = None, run_name: str | None = None
) -> tuple[Exit, RunDir | None]:
    """One run from its config to its metrics; everything that can be refused is refused before a worker starts.

    Args:
        config: Composed and settled.
        launcher: Carries out the plan; several trainings may share it, in threads if it is `concurrent`.
        terminal: What is around this training; None = the main thread of a process of its own.
        run_name: Of the new run directory; None = made up.
    """
    terminal = terminal or Terminal()
    resume = Settings.of(config).resume
    if resume is not None and RunDir(Path(resume)).status() == "complete":
        terminal.say(f"{resume} is complete: nothing to resume.")
        return Exit.DONE, RunDir(Path(resume))
    with terminal.computing():
        work = checked(config, launcher)
    terminal.check(work)
    if resume is not None:
        return _resume(RunDir(Path(resume)), work, launcher, terminal)
    run_dir = new_run(work, run_name)
    try:
        with _full_disk_said(run_dir), locked(run_dir.lock):
            return _carry_out(run_dir, work, work.plan, launcher, terminal)
    except UsageError:
        remove_untrained(run_dir)
        raise


def checked(config: dict[str, Any], cluster: Cluster) -> Work:
    """A config with its data loaded, its parts built and its members planned; nothing is written.

    Raises:
        UsageError: whatever can be refused before a worker starts.
    """
    start = time.monotonic()
    settings = Settings.of(config)
    config = _with_absolute_paths(config)
    data = load_data(config)
    data.require_train()
    _refuse_secrets(config)
    check_prior_run(config, data)
    recipe = Recipe.of(config, data)
    tell_unused(config)
    budget = build(config["budget"], Budget, key="budget")
    check_auto(settings.num_members, budget, recipe.method, data, cluster)
    today = plan(
        first_size(settings.num_members, budget, cluster),
        cluster.resources(),
        num_workers=cluster.num_workers,
        members_per_stack=cluster.members_per_stack,
        cpus_per_stack=cluster.cpus_per_stack,
        gpus_per_stack=cluster.gpus_per_stack,
        ranks_per_stack=cluster.ranks_per_stack,
        together=recipe.method.members_interact,
    )
    recipe.check_ranks(data, cluster.ranks_per_stack)
    _check_device(recipe.trainer.accelerator, cluster.gpus_per_stack)
    tracker = build(config["tracking"], Tracker, key="tracking")
    tracker.check(budget.max_members if settings.num_members == AUTO else settings.num_members)
    return Work(config, settings, recipe, data, inputs_of(config, data), tracker, budget, today, start)


def new_run(work: Work, name: str | None = None) -> RunDir:
    """A new run directory that holds the config and the plan: enough for `bdl train resume=RUN`."""
    run_dir = RunDir.create(work.settings.output_dir, _experiment(work.settings, work.data), name)
    try:
        _write_config(run_dir, work.config)
        planned = {**work.plan.to_json(work.settings.seed), "inputs": work.inputs}
        if work.settings.num_members == AUTO:
            planned["waves"] = first_waves(work.plan)
        write_json(run_dir.plan, planned)
    except UsageError:
        remove_untrained(run_dir)
        raise
    return run_dir


def _resume(run_dir: RunDir, work: Work, launcher: Launcher, terminal: Terminal) -> tuple[Exit, RunDir]:
    with _full_disk_said(run_dir), locked(run_dir.lock):
        check_unchanged(run_dir, work.inputs)
        check_longer(run_dir, work.recipe.method, work.recipe.setting(work.data))
        # From here on the run is unfinished again: its old manifest would contradict the config that is written now.
        run_dir.manifest.unlink(missing_ok=True)
        recorded = Plan.from_json(read_json(run_dir.plan), work.settings.num_members)
        _write_config(run_dir, work.config)
        return _carry_out(run_dir, work, refit(recorded, work.plan), launcher, terminal)


def _carry_out(
    run_dir: RunDir, work: Work, the_plan: Plan, launcher: Launcher, terminal: Terminal
) -> tuple[Exit, RunDir]:
    for reason in (*the_plan.reasons, _work_of_a_member(work)):
        terminal.say(f"plan: {reason}")
    if work.settings.plan_only:
        terminal.say(f"plan written to {run_dir.plan}; train it with: bdl train resume={run_dir.path}")
        return Exit.DONE, run_dir
    if work.settings.check_prior:
        from bdl_train.evaluation.prior_check import check_prior

        check_prior(run_dir, work.recipe, work.data)
    old = run_dir.path.glob(f"stacks/*/{run_dir.stop_file.name}")
    for stop_file in (*([] if os.environ.get(KEEP_STOP) else [run_dir.stop_file]), *old):
        stop_file.unlink(missing_ok=True)
    run_dir.pruned_file.unlink(missing_ok=True)
    follower = Follower(run_dir, [*terminal.listeners(the_plan), work.tracker])
    follower.start(_stored(work.config))
    status, metrics, entries, evaluation, diagnosis = "failed", {}, [], None, None
    try:
        with terminal.stopping(run_dir):
            the_plan, results = trained(run_dir, work, the_plan, launcher, terminal, follower.tick)
        if any(result["status"] == "stopped" for result in results.values()):
            status = "stopped"
        else:
            entries = member_entries(the_plan, results)
            with terminal.computing():
                status, evaluation, diagnosis, metrics = _collect(
                    run_dir, work, the_plan, entries, results, terminal
                )
    except KeyboardInterrupt:
        terminal.say(f"interrupted; finish it with: bdl train resume={run_dir.path}")
        raise
    finally:
        follower.finish(status, metrics)
    if status == "stopped":
        terminal.say(f"stopped on request; finish it with: bdl train resume={run_dir.path}")
        return Exit.STOPPED, run_dir
    _report(run_dir, work.data, entries, evaluation, diagnosis, terminal)
    return {"complete": Exit.DONE, "partial": Exit.PARTIAL, "failed": Exit.FAILED}[status], run_dir


def _work_of_a_member(work: Work) -> str:
    """What each member has before it, in steps of its method."""
    setting = work.recipe.setting(work.data)
    sizes = {"shuffled": setting.batch_size, "all": setting.num_data, "once": setting.batch_size}
    parts = [
        f"{phase.name}, {'up to ' * phase.early_stopping}{phase.num_steps:,} steps of {sizes[phase.rows]:,} examples"
        for phase in work.recipe.method.phases(setting)
        if phase.num_steps
    ]
    return f"each member: {'; '.join(parts)}"


def _collect(
    run_dir: RunDir,
    work: Work,
    the_plan: Plan,
    entries: list[dict[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    terminal: Terminal,
) -> tuple[str, Evaluation | None, Diagnosis | None, dict[str, float | None]]:
    """Write posterior, evaluation and, last, the manifest; returns status, evaluation, diagnosis and flat metrics."""
    status, evaluation, diagnosis, metrics = run_status(entries), None, None, {}
    if status != "failed":
        write_posterior(run_dir, work.config, work.recipe, work.data, entries, results)
        artefact = read_artefact(run_dir.posterior)
        predictor = Predictor(artefact)
        for name in terminal.parts:
            part = getattr(work.data, name)
            terminal.say(f"scoring {len(part)} {name} rows")
            scored = evaluate(predictor, part, work.data.target)
            found = diagnose(artefact, predictor, part, scored.members)
            chapters = [found.section] if found.has_chains else []
            metrics |= write_evaluation(run_dir, name, scored, name, chapters, diagnostics=found.metrics)
            if name == "test":
                evaluation, diagnosis = scored, found
        write_json(run_dir.metrics, metrics)
    write_manifest(
        run_dir,
        status=status,
        entries=entries,
        tasks=the_plan.stacks,
        results=results,
        data=work.data,
        inputs={name: value for name, value in work.inputs.items() if name != "data"},
        temperature=work.recipe.method.target_temperature,
        seconds=time.monotonic() - work.start,
        num_members=chosen(run_dir, work.budget),
    )
    return status, evaluation, diagnosis, metrics


def _report(
    run_dir: RunDir,
    data: Data,
    entries: list[dict[str, Any]],
    evaluation: Evaluation | None,
    diagnosis: Diagnosis | None,
    terminal: Terminal,
) -> None:
    lost = [entry for entry in entries if entry["status"] != "done"]
    for entry in lost:
        terminal.say(f"member {entry['id']} failed: {entry['reason']}")
    if evaluation is not None:
        members = (
            f"{len(entries) - len(lost)} of {len(entries)} members" if lost else f"{len(entries)} members"
        )
        terminal.show(f"\n{data.name}: test metrics of {members} ({len(data.test)} rows)", evaluation)
    if diagnosis is not None and diagnosis.has_chains:
        mark = "warning: " if diagnosis.section.level == "warn" else ""
        terminal.say(f"\n{mark}{diagnosis.section.verdict}")
    terminal.say(f"\nrun: {run_dir.path}")


# --- the run directory ------------------------------------------------------------------------------------------


def _experiment(settings: Settings, data: Data) -> str:
    name = settings.name or data.name
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        key = "data.name" if settings.name is None else "name"
        raise UsageError(
            f"{key}={name!r} names the folder of the experiment inside output_dir: give it another `name`."
        )
    return name


def _with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Workers, and later verbs, may stand in another folder than this process."""

    def absolute(key: str, value: Any) -> Any:
        if key not in ("root", "path", "test_path", "cache", "run") or not isinstance(value, str):
            return value
        path = Path(value).expanduser().absolute()
        # A path that is not here may be meant relative to data.root.
        return str(path) if key == "root" or path.exists() else value

    groups = {
        name: {key: absolute(key, one) for key, one in config[name].items()} for name in ("data", "prior")
    }
    return {**config, **groups}


def inputs_of(config: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """What a run depends on beside its config: the data's fingerprint, the posterior behind its prior."""
    earlier = config["prior"].get("run")
    if earlier is None:
        return {"data": data.fingerprint()}
    digest = sha256(RunDir(Path(earlier)).posterior / "posterior.json")
    return {"data": data.fingerprint(), "prior_run": {"path": earlier, "posterior_sha256": digest}}


def _check_device(accelerator: str, gpus_per_stack: float) -> None:
    if accelerator == "gpu" and gpus_per_stack == 0:
        raise UsageError(
            "trainer.accelerator=gpu, but cluster.gpus_per_stack=0 gives no stack a GPU: set it above 0."
        )
    if accelerator == "cpu" and gpus_per_stack > 0:
        raise UsageError(
            f"trainer.accelerator=cpu would leave cluster.gpus_per_stack={gpus_per_stack:g} unused: set one of them."
        )


def _refuse_secrets(config: Mapping[str, Any]) -> None:
    """The posterior stores these groups whole, and a resumed run needs them whole: no place for a secret."""
    groups = ("model", "likelihood", "prior", "inference", "optimizer", "scheduler")
    given = {group: config[group] for group in groups}
    hidden = [key for key, value in leaves(mask_secrets(given)) if value == MASK]
    if hidden:
        raise UsageError(
            f"{hidden[0]} is named like a secret, and this group is written into the run directory: let your class "
            "read it from the environment instead."
        )


def _stored(config: Mapping[str, Any]) -> dict[str, Any]:
    return mask_secrets({key: value for key, value in config.items() if key not in ("resume", "allow")})


def _write_config(run_dir: RunDir, config: Mapping[str, Any]) -> None:
    write_bytes(run_dir.config, yaml.safe_dump(_stored(config), sort_keys=False, allow_unicode=True).encode())


def remove_untrained(run_dir: RunDir) -> None:
    """A run that was refused before any member was trained leaves nothing behind."""
    if not any(run_dir.posterior.glob("*")) and not any(run_dir.path.glob("stacks/*/checkpoint.pt")):
        shutil.rmtree(run_dir.path, ignore_errors=True)
        with suppress(OSError):  # other runs of the experiment
            run_dir.path.parent.rmdir()


@contextmanager
def _full_disk_said(run_dir: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFailedError(
            f"the disk of {run_dir.path} is full ({error.strerror}). What was saved before is whole: free some space, "
            f"then finish it with: bdl train resume={run_dir.path}"
        ) from error

"""Train a Bayesian ensemble and score its posterior predictive.

Examples:
    bdl train
    bdl train data=uci data.name=energy likelihood=heteroscedastic_gaussian inference=deep_ensemble num_members=5
    bdl train -m data=uci data.split=0,1,2 likelihood=heteroscedastic_gaussian inference=deep_ensemble,swag
    bdl train resume=runs/breast_cancer/20260101-120000-a1b2c3
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bdl_train.build import build
from bdl_train.config import Options, mask_secrets, override_key
from bdl_train.data import Data
from bdl_train.distributed import Job, Launcher
from bdl_train.distributed.collect import member_entries, run_status, write_manifest, write_posterior
from bdl_train.distributed.plan import Plan, plan
from bdl_train.errors import WORSE, Exit, UsageError, guarded
from bdl_train.evaluation.compare import show
from bdl_train.evaluation.evaluate import evaluate, write_evaluation
from bdl_train.evaluation.table import show_metrics
from bdl_train.posteriors.artefact import read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, locked, read_json, write_bytes, write_json
from bdl_train.tracking import Follower, Tracker
from bdl_train.tracking.progress import Progress
from bdl_train.training.problem import Recipe
from bdl_train.verbs._runs import load_data, read_config
from bdl_train.verbs.compare import compare_runs

MULTIRUN = True

RESUMABLE = ("resume", "allow", "tracking", "cluster", "trainer.max_epochs")
"""What may be given beside `resume=`: where the work runs, and a larger budget."""


def run(config: dict[str, Any], options: Options) -> Exit:
    """Train one run."""
    launcher = _launcher(_settings(config, options))
    try:
        return train(config, options, launcher)[0]
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
                key = repr(config["cluster"])
                launchers.setdefault(key, _launcher(config))
                status, run_dir = train(config, one, launchers[key])
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
    return build(config["cluster"], Launcher, key="cluster")


def _settings(config: dict[str, Any], options: Options) -> dict[str, Any]:
    """The config to train with: the given one, or that of the run to resume."""
    if config["resume"] is None:
        return config
    given = {override_key(text) for text in options.overrides}
    for key in sorted(given):
        if not any(key == one or key.startswith(f"{one}.") for one in RESUMABLE):
            raise UsageError(
                f"{key} cannot change when a run is resumed: its config and plan decide. Beside resume=, only "
                f"{', '.join(RESUMABLE[1:])} may be given."
            )
    run = RunDir.open(config["resume"], key="resume")
    stored = read_config(run)
    for group in ("cluster", "tracking"):
        if any(key == group or key.startswith(f"{group}.") for key in given):
            stored[group] = config[group]
    if "trainer.max_epochs" in given:
        if config["trainer"]["max_epochs"] < stored["trainer"]["max_epochs"]:
            raise UsageError(
                f"trainer.max_epochs={config['trainer']['max_epochs']} is below the run's "
                f"{stored['trainer']['max_epochs']}: a resumed run can only train longer."
            )
        stored["trainer"]["max_epochs"] = config["trainer"]["max_epochs"]
    return {**stored, "resume": config["resume"], "plan_only": False, "check_prior": False}


def train(config: dict[str, Any], options: Options, launcher: Launcher) -> tuple[Exit, RunDir | None]:
    """One run from its config to its metrics; everything that can be refused is refused before a worker starts."""
    config = _settings(config, options)
    start = time.monotonic()
    data = load_data(config)
    data.require_train()
    recipe = Recipe.of(config, data)
    if config["resume"] is None:
        the_plan = plan(
            config["num_members"],
            launcher.resources(),
            num_workers=launcher.num_workers,
            members_per_stack=launcher.members_per_stack,
            cpus_per_stack=launcher.cpus_per_stack,
            gpus_per_stack=launcher.gpus_per_stack,
        )
        run = RunDir.create(config["output_dir"], config["name"] or data.name)
        write_bytes(run.config, yaml.safe_dump(_stored(config), sort_keys=False, allow_unicode=True).encode())
        write_json(run.plan, the_plan.to_json(config["seed"]))
    else:
        run = RunDir(Path(config["resume"]))
        the_plan = Plan.from_json(read_json(run.plan))
        if run.manifest.is_file() and run.status() == "complete":
            print(f"{run.path} is complete: nothing to resume.")
            return Exit.DONE, run
    with locked(run):
        return _train(config, run, the_plan, recipe, data, launcher, start)


def _stored(config: Mapping[str, Any]) -> dict[str, Any]:
    return mask_secrets({key: value for key, value in config.items() if key not in ("resume", "allow")})


def _train(
    config: dict[str, Any],
    run: RunDir,
    the_plan: Plan,
    recipe: Recipe,
    data: Data,
    launcher: Launcher,
    start: float,
) -> tuple[Exit, RunDir]:
    for reason in the_plan.reasons:
        print(f"plan: {reason}")
    if config["plan_only"]:
        print(f"plan written to {run.plan}")
        return Exit.DONE, run
    if config["check_prior"]:
        from bdl_train.evaluation.prior_check import check_prior

        check_prior(run, recipe, data)
    run.stop_file.unlink(missing_ok=True)
    progress = Progress({task.id: len(task.members) for task in the_plan.stacks})
    listeners: list[Tracker] = [progress, build(config["tracking"], Tracker, key="tracking")]
    follower = Follower(run, listeners)
    for listener in listeners:
        listener.start(run, _stored(config))
    status, metrics, evaluation = "failed", {}, None
    try:
        with _stop_on_signal(run):
            results = launcher.launch(the_plan.stacks, Job(config, data, run), follower.tick)
        entries = member_entries(the_plan, results)
        if any(result["status"] == "stopped" for result in results.values()):
            status = "stopped"
            print(f"stopped on request; finish it with: bdl train resume={run.path}")
            return Exit.STOPPED, run
        status = run_status(entries)
        if status != "failed":
            write_posterior(run, config, recipe, data, entries, results)
            evaluation = evaluate(Predictor(read_artefact(run.posterior)), data.test, data.target)
            metrics = write_evaluation(run, "test", evaluation, "test")
            write_json(run.metrics, metrics)
        write_manifest(
            run, status=status, entries=entries, results=results, data=data, seconds=time.monotonic() - start
        )
    finally:
        for listener in listeners:
            listener.finish(status, metrics)
    lost = [entry for entry in entries if entry["status"] != "done"]
    for entry in lost:
        print(f"member {entry['id']} failed: {entry['reason']}")
    if evaluation is not None:
        members = (
            f"{len(entries) - len(lost)} of {len(entries)} members" if lost else f"{len(entries)} members"
        )
        show_metrics(f"\n{data.name}: test metrics of {members} ({len(data.test)} rows)", evaluation.metrics)
    print(f"\nrun: {run.path}")
    return {"complete": Exit.DONE, "partial": Exit.PARTIAL, "failed": Exit.FAILED}[status], run


@contextmanager
def _stop_on_signal(run: RunDir) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the stacks to save and stop; the second ends at once."""

    def stop(signum: int, frame: Any) -> None:
        if run.stop_file.exists():
            raise KeyboardInterrupt
        run.stop_file.touch()
        os.write(2, b"\nstopping: members save their state (once more to end at once)\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

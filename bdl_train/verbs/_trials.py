"""Carries out the trials of a sweep: threads of one process that share one launcher, so Ray is started once."""

import logging
import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from bdl_train.build import allowed_packages, allowing
from bdl_train.distributed import Launcher
from bdl_train.distributed.plan import Plan
from bdl_train.errors import Exit, RunFailedError, UsageError, unknown_choice
from bdl_train.evaluation.evaluate import Evaluation
from bdl_train.files import write_bytes
from bdl_train.runs import RunDir, is_run, read_json
from bdl_train.sweeps.pruning import Curve, why_prune
from bdl_train.sweeps.record import Definition, SweepDir, Trial
from bdl_train.sweeps.view import SweepView, TrialLine
from bdl_train.tracking import Tracker
from bdl_train.verbs.train import Terminal, Work, train

log = logging.getLogger(__name__)

TICK_S = 0.25
THREAD = "trial "
_computing = threading.Lock()
"""Data modules and networks are made under seeds of torch's global generator: one trial at a time."""


@dataclass
class Outcome:
    """What a training came to."""

    status: Exit
    run: RunDir | None = None
    reason: str = ""


class _CurveListener(Tracker):
    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def start(self, run: RunDir, config: Any) -> None:
        pass

    def past(self, stack: str, event: Any) -> None:
        self._curve.take(stack, event)

    def event(self, stack: str, event: Any) -> None:
        self._curve.take(stack, event)

    def finish(self, status: str, metrics: Any) -> None:
        pass


class TrialTerminal(Terminal):
    """A training in a thread of a sweep: silent, stopped by the sweep, and scored on the validation part too."""

    parts = ("val", "test")

    def __init__(self, max_epochs: int) -> None:
        self.curve = Curve(max_epochs)
        self.line: TrialLine | None = None

    def check(self, work: Work) -> None:
        require_validation(work)

    def say(self, text: str) -> None:
        log.debug(text)

    def listeners(self, the_plan: Plan) -> list[Tracker]:
        self.line = TrialLine({task.id: len(task.members) for task in the_plan.stacks})
        return [self.line, _CurveListener(self.curve)]

    def stopping(self, run_dir: RunDir) -> AbstractContextManager[None]:
        return nullcontext()

    def computing(self) -> AbstractContextManager[Any]:
        return _computing

    def show(self, title: str, evaluation: Evaluation) -> None:
        pass


def require_validation(work: Work) -> None:
    """Refuse data without a validation part: the test part must not choose.

    Raises:
        UsageError: it has no rows.
    """
    if len(work.data.val) == 0:
        raise UsageError(
            f"{work.data.name} has no validation part, and the objective of a sweep comes from there: set "
            "data.val_fraction above 0, or declare a part `val` in the data."
        )


@dataclass
class _Flight:
    trial: Trial
    terminal: TrialTerminal
    thread: threading.Thread | None = None
    outcome: Outcome | None = None
    judged: int = 0


@dataclass
class Trials:
    """The loop of a sweep.

    Args:
        folder: Its record.
        definition: What is swept.
        launcher: Shared by the trials, opened.
        max_parallel: Trials at the same time.
        prune: Whether trials are pruned by the median.
        next_trial: The next trial that has to be carried out, recorded, or None.
        config_of: The settled config of its training.
        view: What is shown.
    """

    folder: SweepDir
    definition: Definition
    launcher: Launcher
    max_parallel: int
    prune: bool
    next_trial: Callable[[dict[int, Trial]], Trial | None]
    config_of: Callable[[Trial], dict[str, Any]]
    num_trials: int
    view: SweepView
    stop: threading.Event = field(default_factory=threading.Event)
    record: dict[int, Trial] = field(default_factory=dict)
    _flights: list[_Flight] = field(default_factory=list)

    def carry_out(self) -> None:
        """Until every trial has ended, or a stop was asked for and everything has saved its state.

        Raises:
            UsageError: the objective is no metric of these runs.
        """
        self.record = self.folder.trials()
        packages = allowed_packages()
        try:
            while True:
                while not self.stop.is_set() and len(self._flights) < self.max_parallel:
                    trial = self.next_trial(self.record)
                    if trial is None:
                        break
                    self._start(trial, packages)
                if not self._flights:
                    return
                self._flights[0].thread.join(TICK_S)  # pyright: ignore[reportOptionalMemberAccess]
                if self.prune and not self.stop.is_set():
                    self._judge()
                self._ask_to_stop()
                self.view.show(self._total(), {self._name(one): self._line(one) for one in self._flights})
                for flight in [one for one in self._flights if one.outcome is not None]:
                    self._flights.remove(flight)
                    self._end(flight)
        except UsageError:
            self._finish_flights()
            raise

    def run_of(self, trial: Trial) -> RunDir:
        return RunDir(self.folder.path / trial.run)

    def _save(self, trial: Trial) -> None:
        self.folder.save(trial)
        self.record[trial.number] = trial

    def _start(self, trial: Trial, packages: Sequence[str]) -> None:
        self._save(trial)
        run = self.run_of(trial)
        resumes = is_run(run.path)
        if not resumes:  # what a driver left that was killed while it made it
            shutil.rmtree(run.path, ignore_errors=True)
        try:
            config = self.config_of(trial)
        except UsageError as error:
            self._save(replace(trial, status="failed", reason=str(error), exit=int(Exit.USAGE)))
            self.view.say(f"{THREAD}{trial.number} failed: {error}")
            return
        flight = _Flight(trial, TrialTerminal(config["trainer"]["max_epochs"]))
        self.view.say(
            f"{THREAD}{trial.number} {'goes on' if resumes else 'starts'}: {' '.join(trial.words)}  [{trial.run}]"
        )

        def work() -> None:
            with allowing(packages):
                flight.outcome = self._train(config, flight)

        # Daemons, so that a second Ctrl-C need not wait for them.
        flight.thread = threading.Thread(target=work, name=f"{THREAD}{trial.number}", daemon=True)
        self._flights.append(flight)
        flight.thread.start()

    def _train(self, config: dict[str, Any], flight: _Flight) -> Outcome:
        try:
            return Outcome(*train(config, self.launcher, flight.terminal, flight.trial.run))
        except UsageError as error:
            return Outcome(Exit.USAGE, reason=str(error))
        except RunFailedError as error:
            return Outcome(Exit.FAILED, reason=str(error))
        except BaseException as error:  # whatever it is, the sweep waits for an outcome
            log.error("%s", traceback.format_exc())
            return Outcome(Exit.FAILED, reason=f"{type(error).__name__}: {error}")

    def _judge(self) -> None:
        """Prune what is not worth its time."""
        running = [one for one in self._flights if one.trial.is_open]
        points = {one.trial.number: one.terminal.curve.points() for one in running}
        ended = [trial.curve for trial in self.record.values() if not trial.is_open and trial.curve]
        for flight in running:
            number = flight.trial.number
            if len(points[number]) == flight.judged:
                continue
            flight.judged = len(points[number])
            why = why_prune(
                points[number],
                ended,
                [one for other, one in points.items() if other != number],
                after_trials=self.definition.prune_after_trials,
                after_epochs=self.definition.prune_after_epochs,
            )
            if why:
                # Recorded first: a driver that is killed now must not take it up again.
                flight.trial = replace(flight.trial, status="pruned", reason=why, curve=tuple(points[number]))
                self._save(flight.trial)
                with suppress(OSError):
                    write_bytes(self.run_of(flight.trial).pruned_file, f"{why}\n".encode())
                self.view.say(f"{THREAD}{number} pruned: {why}")

    def _ask_to_stop(self) -> None:
        """Again at every tick: a training that has just begun removes the STOP file of an earlier session."""
        for flight in self._flights:
            run = self.run_of(flight.trial)
            if (self.stop.is_set() or not flight.trial.is_open) and run.config.is_file():
                with suppress(OSError):
                    run.stop_file.touch()

    def _end(self, flight: _Flight) -> None:
        outcome, trial = flight.outcome, flight.trial
        assert outcome is not None
        if outcome.status is Exit.STOPPED:
            if trial.is_open:
                self.view.say(f"{THREAD}{trial.number} stopped, its state is saved")
            return
        run = outcome.run
        metrics = read_json(run.metrics) if run is not None and run.metrics.is_file() else None
        reason = outcome.reason
        if run is not None and run.manifest.is_file():
            lost = [one for one in read_json(run.manifest)["members"] if one["status"] != "done"]
            reason = f"{len(lost)} members lost: {lost[0].get('reason')}" if lost else ""
        if outcome.status in (Exit.DONE, Exit.PARTIAL) and self.definition.objective not in (metrics or {}):
            known = [key for key in metrics or {} if key.startswith("val/")]
            raise UsageError(unknown_choice("objective", self.definition.objective, known))
        status = {Exit.DONE: "complete", Exit.PARTIAL: "partial"}.get(outcome.status, "failed")
        ended = replace(
            trial,
            status=status,
            objective=(metrics or {}).get(self.definition.objective) if status != "failed" else None,
            reason=reason,
            exit=int(outcome.status),
            curve=tuple(flight.terminal.curve.points()),
            metrics=metrics,
        )
        self._save(ended)
        result = (
            f"{self.definition.objective} {ended.objective:.4g}" if ended.objective is not None else reason
        )
        self.view.say(f"{THREAD}{trial.number} {status}: {result}")

    def _finish_flights(self) -> None:
        """After an error: what runs saves its state."""
        self.stop.set()
        while any(one.thread is not None and one.thread.is_alive() for one in self._flights):
            self._ask_to_stop()
            self._flights[0].thread.join(TICK_S)  # pyright: ignore[reportOptionalMemberAccess]
            self._flights.append(self._flights.pop(0))

    # --- words ------------------------------------------------------------------------------------------------

    def _name(self, flight: _Flight) -> str:
        return f"{THREAD}{flight.trial.number}"

    def _line(self, flight: _Flight) -> str:
        line = flight.terminal.line
        return line.text if line is not None else "reads its data"

    def _total(self) -> str:
        ended = [trial for trial in self.record.values() if not trial.is_open]
        parts = [f"{len(ended)}/{self.num_trials} trials"]
        counts = {name: sum(trial.status == name for trial in ended) for name in ("pruned", "failed")}
        parts += [f"{count} {name}" for name, count in counts.items() if count]
        ranked = [trial.objective for trial in ended if trial.is_ranked and trial.objective is not None]
        if ranked:
            best = max(ranked) if self.definition.direction == "maximize" else min(ranked)
            parts.append(f"best {self.definition.objective} {best:.4g}")
        return ", ".join(parts)

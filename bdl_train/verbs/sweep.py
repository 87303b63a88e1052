"""Train a grid or a search of settings; the validation part chooses.

Every key of bdl train may be given. One with several values is swept: a list (a,b,c), range(1,5), choice(a,b), and in
searches interval(0,1), int(interval(1,8)) and tag(log,interval(1e-4,1e-1)). Trials share one start of the cluster.
The same words again, or resume=<folder>, go on after a stop or a crash with what is missing; beside resume= only
num_trials, max_parallel, allow, cluster.* and tracking.* may be given. A trial that failed is tried again when its
file in <folder>/trials is removed.

Examples:
    bdl sweep optimizer.lr=0.001,0.01 inference=deep_ensemble,swag
    bdl sweep sampler=tpe num_trials=30 'optimizer.lr=tag(log,interval(1e-4,1e-1))' 'prior.scale=interval(0.2,2)'
    bdl sweep resume=runs/sweep-0a1b2c3d num_trials=60
    bdl compare runs='runs/sweep-0a1b2c3d/*'
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bdl_train.build import build, settings_of
from bdl_train.config import MASK, Options, compose, mask_secrets, override_key
from bdl_train.distributed import Launcher
from bdl_train.distributed.share import Share, room
from bdl_train.errors import WORSE, Exit, UsageError
from bdl_train.locks import locked
from bdl_train.overrides import Axis, split_axes
from bdl_train.runs import RunDir, is_run
from bdl_train.sweeps.ranking import ranked, show, write_report
from bdl_train.sweeps.record import Definition, SweepDir, Trial
from bdl_train.sweeps.samplers import Sampler, check_axes, grid_size, probes, space_size, suggest
from bdl_train.sweeps.view import SweepView
from bdl_train.verbs._resume import resumed_config
from bdl_train.verbs._signals import stop_on_signal
from bdl_train.verbs._trials import THREAD, Trials, require_validation
from bdl_train.verbs._unused import refuse_unused
from bdl_train.verbs.train import checked

log = logging.getLogger(__name__)

ELSEWHERE = ("cluster", "tracking")
"""Groups that say where the work is done: they may change when a sweep goes on."""
RESUMABLE = ("resume", "num_trials", "max_parallel", "allow", *ELSEWHERE)
ONE_TRAINING = ("plan_only", "check_prior")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/sweep.yaml` that are its own, and where runs are made."""

    sampler: Sampler
    num_trials: Annotated[int, Field(ge=1)] | None
    objective: Annotated[str, Field(pattern=r"^val/\w+$")]
    direction: Literal["minimize", "maximize"]
    prune: Literal["auto", "none", "median"]
    prune_after_trials: Annotated[int, Field(ge=1)]
    prune_after_epochs: Annotated[int, Field(ge=0)]
    max_parallel: Annotated[int, Field(ge=1)]
    sweep_seed: Annotated[int, Field(ge=0)]
    name: str | None
    resume: str | None
    output_dir: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        objective = config["objective"]
        if isinstance(objective, str) and not objective.startswith("val/"):
            raise UsageError(
                f"objective={objective} is no metric of the validation part, and no other part may choose: "
                "val/nll, val/rmse, val/accuracy ..."
            )
        return settings_of(cls, {one.name: config[one.name] for one in fields(cls)}, key="")


@dataclass(frozen=True)
class Words:
    """The command line of a sweep, sorted.

    Attributes:
        fixed: Of the training, one value each.
        axes: Swept.
        elsewhere: Of `cluster` and `tracking`.
        allow: Packages that the user trusts; never stored.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    elsewhere: tuple[str, ...]
    allow: tuple[str, ...]

    @classmethod
    def of(cls, overrides: Sequence[str], config_dir: Path | None) -> "Words":
        """Sort the overrides.

        Raises:
            UsageError: several values for a key of the sweep itself, a secret, a key of a single training.
        """
        own = {one.name for one in fields(Settings)}
        given, axes = split_axes(overrides, config_dir)
        for axis in axes:
            if _root(axis.word) in {*own, *ELSEWHERE, "allow"}:
                raise UsageError(
                    f"'{axis.word}' has several values, but all trials of a sweep share this one."
                )
        for word in (*given, *(axis.word for axis in axes)):
            name, _, value = word.partition("=")
            if _root(word) in ONE_TRAINING and value != "false":
                raise UsageError(f"'{word}' is for one training: bdl train {word} with the same words.")
            if mask_secrets({override_key(word).rpartition(".")[2]: value}) == {
                override_key(word).rpartition(".")[2]: MASK
            }:
                raise UsageError(
                    f"{name} is named like a secret, and a sweep stores what it was asked for: let your class read it "
                    "from the environment instead."
                )
        training = [word for word in given if _root(word) not in own]
        return cls(
            fixed=tuple(word for word in training if _root(word) not in (*ELSEWHERE, "allow")),
            axes=tuple(axes),
            elsewhere=tuple(word for word in training if _root(word) in ELSEWHERE),
            allow=tuple(word for word in training if _root(word) == "allow"),
        )


def run(config: dict[str, Any], options: Options) -> Exit:
    """Carry out the trials that are missing, then print them best first."""
    settings = Settings.of(config)
    if settings.resume is not None:
        folder, definition, words, settings = _taken_up(SweepDir(Path(settings.resume)), settings, options)
    else:
        words = Words.of(options.overrides, options.config_dir)
        definition = _definition(settings, words)
        folder = SweepDir(Path(settings.output_dir) / _folder_name(settings.name or definition.name()))
    axes = words.axes
    check_axes(axes, settings.sampler, settings.num_trials)
    size = space_size(axes) if settings.sampler != "grid" else grid_size(axes)
    num_trials = settings.num_trials or grid_size(axes)
    if size is not None and num_trials > size:
        log.info("num_trials=%d: there are %d different settings, each is tried once", num_trials, size)
        num_trials = size
    _check_folder(folder, definition)
    in_train = replace(options, verb="train")
    for words_of_trial in probes(axes):
        config = _composed(folder, words, words_of_trial, in_train)
        refuse_unused(config, [*words.fixed, *words_of_trial])
        if words_of_trial == [axis.first for axis in axes]:
            first = config
    launcher = build(first["cluster"], Launcher, key="cluster")
    try:
        at_a_time = (
            max(1, min(settings.max_parallel, num_trials, room(launcher))) if launcher.concurrent else 1
        )
        share = Share(launcher, at_a_time)
        require_validation(checked(first, share))
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{folder.path} cannot be made ({error.strerror}): change output_dir."
            ) from error
        with locked(RunDir(folder.path).lock):
            folder.write(definition, words.elsewhere, settings.num_trials)
            sweep = Trials(
                folder=folder,
                definition=definition,
                launcher=share,
                max_parallel=at_a_time,
                prune=definition.prune == "median",
                next_trial=_Missing(axes, settings, num_trials),
                config_of=lambda trial: _config_of(folder, words, trial, in_train),
                num_trials=num_trials,
                view=SweepView(),
            )
            return _carry_out(sweep, launcher)
    finally:
        launcher.close()


def _carry_out(sweep: Trials, launcher: Launcher) -> Exit:
    folder, definition, view = sweep.folder, sweep.definition, sweep.view
    view.say(
        f"{folder.path}: {sweep.num_trials} trials, {sweep.max_parallel} at a time, sampler {definition.sampler}, "
        f"pruning {definition.prune}"
    )
    known = folder.trials()
    if ended := sum(not one.is_open for one in known.values()):
        view.say(f"{ended} of them are done already")
    if len(known) < sweep.num_trials or any(one.is_open for one in known.values()):
        launcher.open()
    with stop_on_signal(sweep.stop.is_set, sweep.stop.set, "trials"), _labelled_logs():
        view.start()
        try:
            sweep.carry_out()
        finally:
            view.stop()
    trials = ranked(sweep.record.values(), definition.direction)
    write_report(folder, definition, trials)
    show(definition, trials, f"\n{folder.path}: by {definition.objective}, best first")
    if trials and trials[0].is_ranked:
        print(f"\nbest: trial {trials[0].number}, run: {folder.path / trials[0].run}")
    print(f"written: {folder.report}")
    print(f"side by side: bdl compare runs='{folder.path}/*'")
    if any(trial.is_open for trial in trials) or len(trials) < sweep.num_trials:
        print(f"stopped on request; finish it with: bdl sweep resume={folder.path}")
        return Exit.STOPPED
    if definition.sampler != "grid":
        print(f"more trials: bdl sweep resume={folder.path} num_trials={2 * sweep.num_trials}")
    return max((Exit(trial.exit) for trial in trials), key=WORSE.index, default=Exit.DONE)


# --- what is asked for ------------------------------------------------------------------------------------------


def _root(word: str) -> str:
    return override_key(word).replace("/", ".").partition(".")[0].partition("@")[0]


def _definition(settings: Settings, words: Words) -> Definition:
    prune = settings.prune
    if prune == "auto":
        prune = "none" if settings.sampler == "grid" else "median"
    return Definition(
        fixed=tuple(sorted(words.fixed)),
        axes=tuple(axis.word for axis in words.axes),
        sampler=settings.sampler,
        sweep_seed=settings.sweep_seed,
        objective=settings.objective,
        direction=settings.direction,
        prune=prune,
        prune_after_trials=settings.prune_after_trials,
        prune_after_epochs=settings.prune_after_epochs,
    )


def _taken_up(
    folder: SweepDir, settings: Settings, options: Options
) -> tuple[SweepDir, Definition, Words, Settings]:
    for word in options.overrides:
        if _root(word) not in RESUMABLE:
            raise UsageError(
                f"{override_key(word)} cannot change when a sweep goes on: its {folder.definition.name} decides. "
                f"Beside resume=, only {', '.join(RESUMABLE[1:])} may be given."
            )
    definition, elsewhere, num_trials = folder.read()
    given = Words.of(options.overrides, options.config_dir)
    stored = Words.of([*definition.fixed, *definition.axes], options.config_dir)
    words = replace(stored, elsewhere=(*elsewhere, *given.elsewhere), allow=given.allow)
    asked = settings_of(
        Settings,
        {
            **{one.name: getattr(settings, one.name) for one in fields(Settings)},
            **{
                one.name: getattr(definition, one.name)
                for one in fields(Settings)
                if hasattr(definition, one.name)
            },
            "num_trials": settings.num_trials or num_trials,
            "name": None,
        },
        key="",
    )
    return folder, definition, words, asked


def _folder_name(name: str) -> str:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise UsageError(
            f"name={name!r} names the folder of the sweep inside output_dir: give it another one."
        )
    return name


def _check_folder(folder: SweepDir, definition: Definition) -> None:
    if folder.definition.is_file():
        before = folder.read()[0]
        if different := definition.differences(before):
            raise UsageError(
                f"{folder.path} holds another sweep ({'; '.join(different)}): give this one a name of its own, name=..."
            )
    elif folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise UsageError(f"{folder.path} exists and is no sweep: give it another name, name=...")


# --- trials -----------------------------------------------------------------------------------------------------


class _Missing:
    """The next trial that has to be carried out: those that were cut off first, then new ones by number."""

    def __init__(self, axes: Sequence[Axis], settings: Settings, num_trials: int) -> None:
        self._axes, self._settings, self._num_trials = axes, settings, num_trials
        self._given: set[int] = set()

    def __call__(self, record: dict[int, Trial]) -> Trial | None:
        cut_off = [trial for trial in record.values() if trial.is_open and trial.number not in self._given]
        if cut_off:
            trial = min(cut_off, key=lambda one: one.number)
        else:
            number = next((i for i in range(self._num_trials) if i not in record), None)
            if number is None:
                return None
            words = suggest(
                self._axes,
                self._settings.sampler,
                self._settings.sweep_seed,
                number,
                record,
                maximize=self._settings.direction == "maximize",
            )
            trial = Trial(number=number, words=tuple(words), run=RunDir.new_name())
        self._given.add(trial.number)
        return trial


def _composed(folder: SweepDir, words: Words, of_trial: Sequence[str], options: Options) -> dict[str, Any]:
    given = (*words.fixed, *words.elsewhere, *words.allow, *of_trial)
    config = compose("train", given, options.config_dir)
    return {**config, "output_dir": str(folder.path.parent), "name": folder.path.name, "resume": None}


def _config_of(folder: SweepDir, words: Words, trial: Trial, options: Options) -> dict[str, Any]:
    run_dir = RunDir(folder.path / trial.run)
    if not is_run(run_dir.path):
        return _composed(folder, words, trial.words, options)
    given = (*words.elsewhere, *words.allow, f"resume={run_dir.path}")
    config = compose("train", given, options.config_dir)
    return resumed_config(config, replace(options, overrides=given))


# --- the process ------------------------------------------------------------------------------------------------


@contextmanager
def _labelled_logs() -> Iterator[None]:
    """What trials log says which one it was; what is only informative is left out."""

    def label(record: logging.LogRecord) -> bool:
        name = record.threadName or ""
        if not name.startswith(THREAD) or threading.current_thread().name != name:
            return True
        record.msg, record.args = f"{name}: {record.getMessage()}", None
        return record.levelno >= logging.WARNING

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(label)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(label)

"""The sweep folder: what was asked for, and one small file a trial. It alone decides what is still to be done.

<folder>/sweep.json            the definition
<folder>/trials/0007.json      a trial, from its suggestion to its result
<folder>/<run>/                its run directory
<folder>/sweep.md, results.json    the table, when the trials have ended
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bdl_train.errors import UsageError
from bdl_train.files import write_json
from bdl_train.runs import read_json

OPEN = "running"
"""Of a trial that has no result: it runs, or was cut off."""
ENDED = ("complete", "partial", "failed", "pruned")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a sweep.

    Attributes:
        number: From 0.
        words: One override for each axis.
        run: Name of its run directory inside the sweep folder.
        status: `running`, or how it ended: `complete`, `partial`, `failed`, `pruned`.
        objective: Its value; None = no result, or not finite.
        reason: Why it failed or was pruned.
        exit: Exit status of its training.
        curve: (epoch, validation NLL) as far as it came.
        metrics: Of its run.
    """

    number: int
    words: tuple[str, ...]
    run: str
    status: str = OPEN
    objective: float | None = None
    reason: str = ""
    exit: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float | None] | None = None

    @property
    def is_open(self) -> bool:
        return self.status == OPEN

    @property
    def is_ranked(self) -> bool:
        return self.objective is not None and self.status in ("complete", "partial")


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What makes two sweeps the same. Where it runs and how many trials it has may change.

    Attributes:
        fixed: Overrides with one value, of the training only.
        axes: Overrides with several values.
        sampler, sweep_seed, objective, direction, prune, prune_after_trials, prune_after_epochs: Keys of the config.
    """

    fixed: tuple[str, ...]
    axes: tuple[str, ...]
    sampler: str
    sweep_seed: int
    objective: str
    direction: str
    prune: str
    prune_after_trials: int
    prune_after_epochs: int

    def name(self) -> str:
        """A folder name that the same words lead to again."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def differences(self, other: "Definition") -> list[str]:
        return [
            f"{one.name} {getattr(other, one.name)!r} is now {getattr(self, one.name)!r}"
            for one in fields(self)
            if getattr(self, one.name) != getattr(other, one.name)
        ]


@dataclass(frozen=True)
class SweepDir:
    """Paths and files of one sweep folder."""

    path: Path

    @property
    def definition(self) -> Path:
        return self.path / "sweep.json"

    @property
    def report(self) -> Path:
        return self.path / "sweep.md"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    def trial(self, number: int) -> Path:
        return self.path / "trials" / f"{number:04d}.json"

    def write(self, definition: Definition, elsewhere: Sequence[str], num_trials: int | None) -> None:
        """Store what is asked for.

        Args:
            definition: Of the sweep.
            elsewhere: Overrides of `cluster` and `tracking`, with which it was started last.
            num_trials: Asked for last.
        """
        stored = {**asdict(definition), "elsewhere": list(elsewhere), "num_trials": num_trials}
        write_json(self.definition, stored)

    def read(self) -> tuple[Definition, list[str], int | None]:
        """What `write` stored.

        Raises:
            UsageError: no sweep, or a damaged one.
        """
        if not self.definition.is_file():
            raise UsageError(f"{self.path} holds no sweep: {self.definition.name} is missing.")
        stored = read_json(self.definition)
        try:
            settings = {one.name: stored[one.name] for one in fields(Definition)}
            settings |= {name: tuple(map(str, stored[name])) for name in ("fixed", "axes")}
            return Definition(**settings), [str(one) for one in stored["elsewhere"]], stored["num_trials"]
        except (TypeError, KeyError) as error:
            raise UsageError(f"{self.definition} is damaged: {type(error).__name__} {error}.") from error

    def save(self, trial: Trial) -> None:
        write_json(self.trial(trial.number), asdict(trial))

    def trials(self) -> dict[int, Trial]:
        """All recorded trials by number.

        Raises:
            UsageError: a damaged record.
        """
        found = {}
        for path in sorted((self.path / "trials").glob("*.json")):
            stored = read_json(path)
            try:
                known = {one.name for one in fields(Trial)}
                trial = Trial(**{name: value for name, value in stored.items() if name in known})
                trial = replace(
                    trial,
                    words=tuple(map(str, trial.words)),
                    curve=tuple((int(epoch), _number(value)) for epoch, value in trial.curve),
                )
                if trial.number != int(path.stem) or trial.status not in (OPEN, *ENDED):
                    raise ValueError(f"number {trial.number}, status {trial.status}")
                if Path(trial.run).name != trial.run:
                    raise ValueError(f"run {trial.run!r}")
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise UsageError(f"{path} is damaged: {error}. Remove it to try that trial again.") from error
            found[trial.number] = trial
        return found


def _number(value: Any) -> float:
    return float("inf") if value is None else float(value)

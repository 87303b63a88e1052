"""The run directory: its layout, its state, and what a listing reads of it.

Imports nothing heavy, so that a listing is quick.
"""

import json
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from bdl_train.errors import UsageError
from bdl_train.locks import lock_is_held

DEEPEST_CONFIG = 50
"""Levels of a config that a listing reads."""


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    path: Path

    @classmethod
    def create(cls, output_dir: str, experiment: str, name: str | None = None) -> "RunDir":
        """Make a new, empty run directory `<output_dir>/<experiment>/<name>`; None = a `new_name`."""
        path = Path(output_dir) / experiment / (name or cls.new_name())
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"The run directory {path} cannot be made ({error.strerror}): change output_dir."
            ) from error
        return cls(path)

    @staticmethod
    def new_name() -> str:
        """`<timestamp>-<6 hex>`."""
        return f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"

    @classmethod
    def open(cls, path: str | Path, *, key: str = "run") -> "RunDir":
        """An existing run directory.

        Raises:
            UsageError: it does not exist or holds no run.
        """
        if str(path) == "":
            raise UsageError(f"{key}= is empty: `bdl runs` lists the runs.")
        run = cls(Path(path))
        if not run.path.is_dir():
            raise UsageError(f"{key}={path} is not a directory. `bdl runs` lists the runs.")
        if not run.config.is_file():
            below = find_runs(run.path)
            if below:
                raise UsageError(
                    f"{key}={path} is a folder of runs: name one, the newest is {below[-1].path}."
                )
            raise UsageError(f"{key}={path} holds no run: {run.config.name} is missing.")
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def posterior(self) -> Path:
        return self.path / "posterior"

    @property
    def submission(self) -> Path:
        """What `bdl submit` queued."""
        return self.path / "submission.json"

    @property
    def driver_events(self) -> Path:
        """What the driver decided about stacks, in the format of their own events: `launched`, `retry`, `split` ..."""
        return self.path / "driver.jsonl"

    @property
    def tracking(self) -> Path:
        """What of the events which tracker has been handed."""
        return self.path / "tracking.json"

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    @property
    def pruned_file(self) -> Path:
        """Why a sweep ended this run early; gone when somebody goes on with it."""
        return self.path / "PRUNED"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    def stack(self, stack_id: str) -> Path:
        return self.path / "stacks" / stack_id

    def evaluation(self, name: str) -> Path:
        return self.path / "evaluation" / name

    def status(self) -> str:
        """`complete`, `partial` or `failed` from the manifest, else `running` from the lock.

        Without a process that works on it a run that a sweep ended early is `pruned`; one that never began is `queued`
        if it was submitted, else `planned`; any other is `interrupted`.
        """
        if self.manifest.is_file():
            manifest = read_json(self.manifest)
            if not isinstance(manifest, dict) or "status" not in manifest:
                raise UsageError(f"{self.manifest} has no status: the run directory is damaged.")
            return str(manifest["status"])
        if lock_is_held(self.lock):
            return "running"
        if self.pruned_file.is_file():
            return "pruned"
        if self.driver_events.is_file() or any(self.path.glob("stacks/*/events.jsonl")):
            return "interrupted"
        if self.submission.is_file():
            return "queued"
        return "planned" if self.plan.is_file() else "interrupted"


KEEP_STOP = "BDL_KEEP_STOP"
"""Environment variable, not empty: a stop file that is there when the driver starts is meant for it, and stands."""


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and ((path / "plan.json").is_file() or (path / "stacks").is_dir())


def find_runs(root: str | Path) -> list[RunDir]:
    """All run directories below `root`, oldest first."""
    found = {path.parent for path in Path(root).rglob("config.yaml") if is_run(path.parent)}
    return [RunDir(path) for path in sorted(found, key=_started)]


def _started(path: Path) -> tuple[str, int, str]:
    """The time stamp in the name, and within one second the time of the plan, which is written once."""
    plan = path / "plan.json"
    return path.name.rpartition("-")[0], plan.stat().st_mtime_ns if plan.is_file() else 0, str(path)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UsageError: missing or not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing: the run is unfinished or damaged.{_to_finish(path)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}. The run directory is damaged.") from error


def _to_finish(path: Path) -> str:
    """How to finish the run that the file would belong to, if it is one that was begun and not finished."""
    runs = [RunDir(folder) for folder in path.parents]
    begun = [run for run in runs if run.plan.is_file() and not run.manifest.is_file()]
    return f" Finish it with: bdl train resume={begun[0].path}" if begun else ""


def glance_at_config(run: RunDir) -> dict[str, Any]:
    """The stored config for a listing, which shows what it can: {} where it cannot be read.

    libyaml builds nested nodes by recursion in C and would overflow the stack on a hostile file: the depth is counted
    on its events first, which do not nest.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text, depth = run.config.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_CONFIG:
                return {}
        found = yaml.load(text, loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

"""Hand the events, metrics and tables of a run to a tracker, also after the run: of a node without network, for one.

What the tracker was handed before is not handed over twice; `again=true` forgets that, for a run that was deleted
there.

Examples:
    bdl track run=runs/energy/20260101-120000-a1b2c3 tracking.mode=online
    bdl track run=runs/energy/20260101-120000-a1b2c3 follow=true
"""

import fcntl
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bdl_train.build import build, settings_of
from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError
from bdl_train.locks import lock_is_held
from bdl_train.runs import RunDir, read_json
from bdl_train.tracking import Follower, Tracker
from bdl_train.tracking.outcome import planned_stacks
from bdl_train.verbs._runs import read_config

log = logging.getLogger(__name__)

TICK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/track.yaml` that belong to no group."""

    run: str
    follow: bool
    again: bool
    allow: list[str]


def run(config: dict[str, Any], options: Options) -> Exit:
    """Replay the run into the tracker; with `follow`, until the run ends."""
    settings = settings_of(
        Settings, {key: config[key] for key in ("run", "follow", "again", "allow")}, key=""
    )
    run_dir = RunDir.open(settings.run)
    stored = read_config(run_dir)
    tracker = build(config["tracking"], Tracker, key="tracking")
    if lock_is_held(run_dir.lock) and stored["tracking"].get("_target_") == config["tracking"]["_target_"]:
        raise UsageError(
            f"{run_dir.path} is running and tracks itself with {type(tracker).__name__}: wait for its end."
        )
    tracker.check(sum(map(len, planned_stacks(run_dir).values())))
    with _alone(run_dir):
        if settings.again:
            run_dir.tracking.unlink(missing_ok=True)
        follower = Follower(run_dir, [tracker])
        follower.start(stored)
        follower.tick()
        while settings.follow and not follower.lost and _status(run_dir) == "running":
            time.sleep(TICK_S)
            follower.tick()
        status = _status(run_dir)
        follower.tick()
        follower.finish(status, _metrics(run_dir))
    if follower.lost:
        return Exit.FAILED
    print(f"tracked: {run_dir.path} ({status})")
    return Exit.DONE


def _status(run_dir: RunDir) -> str:
    """`running` also while a run that has ended writes its last files: its lock is let go after the manifest."""
    return "running" if lock_is_held(run_dir.lock) else run_dir.status()


def _metrics(run_dir: RunDir) -> Mapping[str, float | None]:
    return read_json(run_dir.metrics) if run_dir.metrics.is_file() else {}


@contextmanager
def _alone(run_dir: RunDir) -> Iterator[None]:
    """One `bdl track` of a run at a time: two would hand over the same events."""
    with (run_dir.path / ".track.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"Another bdl track is at work on {run_dir.path}: wait for it.") from error
        except OSError as error:  # some network file systems have no such locks
            log.warning(
                "%s cannot be locked (%s): start no second bdl track of this run", run_dir.path, error
            )
        yield

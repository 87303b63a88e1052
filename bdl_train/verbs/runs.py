"""List run directories, newest first.

Examples:
    bdl runs
    bdl runs root=runs/energy status=partial
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bdl_train.build import settings_of
from bdl_train.config import Options
from bdl_train.distributed.queues import states_of
from bdl_train.errors import Exit
from bdl_train.runs import RunDir, find_runs, glance_at_config

Status = Literal[
    "complete", "partial", "failed", "running", "planned", "queued", "requeued", "interrupted", "pruned",
]  # fmt: skip
HEADLINES = ("test/nll", "test/rmse", "test/accuracy")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/runs.yaml`."""

    root: str
    status: Status | None
    limit: Annotated[int, Field(ge=1)] | None


def run(config: dict[str, Any], options: Options) -> Exit:
    """Print one line a run: path, status, members, method, split, seed, headline metrics."""
    settings = settings_of(Settings, config, key="")
    found = find_runs(settings.root)[::-1]
    rows = list(zip(found, _statuses(found), strict=True))
    rows = [(one, status) for one, status in rows if settings.status in (None, status)]
    if not rows:
        kind = "" if settings.status is None else f"{settings.status} "
        print(f"no {kind}runs below {settings.root}: start one with bdl train")
        return Exit.DONE
    shown = rows[: settings.limit]
    lines = [(str(one.path), status, _members(one), *_what(one), _headline(one)) for one, status in shown]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{cell:{width}}" for cell, width in zip(line, widths, strict=True) if width]
        print("  ".join(cells).rstrip())
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown)} more: limit=null shows all")
    return Exit.DONE


def _statuses(runs: Sequence[RunDir]) -> list[str]:
    statuses = [_status(one) for one in runs]
    asked = [
        i
        for i, one in enumerate(runs)
        if statuses[i] in ("queued", "interrupted") and one.submission.is_file()
    ]
    for i, state in zip(asked, states_of([_json(runs[i].submission) for i in asked]), strict=True):
        statuses[i] = _in_queue(state, statuses[i])
    return statuses


def _status(run_dir: RunDir) -> str:
    try:
        return run_dir.status()
    except (ValueError, KeyError, TypeError):
        return "damaged"


def _in_queue(state: str, status: str) -> str:
    """What the queue says of a run on which no driver works now."""
    if state == "queued":
        return "queued" if status == "queued" else "requeued"
    if state == "running":
        return "running"  # a driver that is starting, or the tasks of an array
    return "interrupted" if state == "ended" else status


def _members(run_dir: RunDir) -> str:
    try:
        total = sum(len(stack["members"]) for stack in _json(run_dir.plan)["stacks"])
        manifest = _json(run_dir.manifest)
        if not manifest:
            return f"{total} members"
        done = sum(entry["status"] == "done" for entry in manifest["members"])
        return f"{done}/{total} members"
    except (KeyError, TypeError):
        return "? members"


def _what(run_dir: RunDir) -> tuple[str, str, str]:
    """Method, data split and seed as the config has them; what it lacks is blank."""
    config = glance_at_config(run_dir)
    target, split, seed = (
        _at(config, "inference", "_target_"),
        _at(config, "data", "split"),
        _at(config, "seed"),
    )
    method = target.split(".")[-2] if isinstance(target, str) and "." in target else ""
    return (
        method,
        f"split {split}" if isinstance(split, int) else "",
        f"seed {seed}" if isinstance(seed, int) else "",
    )


def _at(node: Any, *path: str) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _headline(run_dir: RunDir) -> str:
    metrics = _json(run_dir.metrics)
    shown = [(key, metrics[key]) for key in HEADLINES if isinstance(metrics.get(key), float)]
    return "  ".join(f"{key} {value:.4g}" for key, value in shown)


def _json(path: Path) -> dict[str, Any]:
    """A listing shows what it can: a damaged file is an empty cell here, and an error in the verb that needs it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

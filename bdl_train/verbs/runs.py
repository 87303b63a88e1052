"""List run directories, newest first.

Examples:
    bdl runs
    bdl runs root=runs/energy status=partial
"""

import json
from typing import Any

from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError, unknown_choice
from bdl_train.runs import RunDir, find_runs

STATUSES = ("complete", "partial", "failed", "running", "queued", "interrupted")
HEADLINES = ("test/nll", "test/rmse", "test/accuracy")


def run(config: dict[str, Any], options: Options) -> Exit:
    """Print one line a run: path, status, members, headline metrics."""
    wanted = config["status"]
    if wanted is not None and wanted not in STATUSES:
        raise UsageError(unknown_choice("status", wanted, STATUSES))
    rows = [(one, one.status()) for one in reversed(find_runs(config["root"]))]
    rows = [(one, status) for one, status in rows if wanted in (None, status)][: config["limit"]]
    if not rows:
        print(f"no runs below {config['root']}: start one with bdl train")
        return Exit.DONE
    width = max(len(str(one.path)) for one, _ in rows)
    for one, status in rows:
        print(f"{one.path!s:{width}}  {status:11}  {_members(one)}  {_headline(one)}".rstrip())
    return Exit.DONE


def _members(run_dir: RunDir) -> str:
    plan = _json(run_dir.plan)
    total = sum(len(stack["members"]) for stack in plan.get("stacks", []))
    manifest = _json(run_dir.manifest)
    if not manifest:
        return f"{total} members"
    done = sum(entry["status"] == "done" for entry in manifest["members"])
    return f"{done}/{total} members"


def _headline(run_dir: RunDir) -> str:
    metrics = _json(run_dir.metrics)
    shown = [(key, metrics[key]) for key in HEADLINES if metrics.get(key) is not None]
    return "  ".join(f"{key} {value:.4g}" for key, value in shown)


def _json(path: Any) -> dict[str, Any]:
    """A listing shows what it can: a damaged file is an empty cell here, and an error in the verb that needs it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}

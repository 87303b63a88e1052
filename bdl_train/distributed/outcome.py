"""From the results of the stacks to the posterior artefact and the manifest, which is written last."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bdl_train import __version__
from bdl_train.data import Data
from bdl_train.distributed.budget import device_seconds
from bdl_train.distributed.follow_ups import in_the_end
from bdl_train.distributed.plan import Plan
from bdl_train.files import sha256, write_json
from bdl_train.posteriors.artefact import (
    MEMBER_ROWS,
    ROWS_FILE,
    read_members,
    write_meta,
    write_moments,
    write_tensors,
)
from bdl_train.runs import RunDir
from bdl_train.seeds import Stream, run_seed
from bdl_train.training.prepared import StackTask
from bdl_train.training.problem import Recipe

PACKAGES = ("torch", "pytorch-lightning", "ray", "hydra-core", "numpy", "scikit-learn", "safetensors")


def member_entries(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a member, in ensemble order: what its stack reported, or why there is nothing."""
    entries = {}
    for task, result in in_the_end(plan.stacks, results):
        if result["status"] == "done":
            found = [{**entry, "stack": task.id} for entry in result["members"]]
        else:
            reason = result.get("reason", result["status"])
            found = [{"id": m, "stack": task.id, "status": "failed", "reason": reason} for m in task.members]
        entries |= {entry["id"]: entry for entry in found}  # a retry stands for the try before it
    return [entries[member] for member in sorted(entries)]


def run_status(entries: list[dict[str, Any]]) -> str:
    """`complete`, `partial` (some members lost, the posterior is valid) or `failed`."""
    done = sum(entry["status"] == "done" for entry in entries)
    return "complete" if done == len(entries) else "partial" if done else "failed"


def write_posterior(
    run: RunDir,
    config: Mapping[str, Any],
    recipe: Recipe,
    data: Data,
    entries: list[dict[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `posterior/`: side files first, `posterior.json` last."""
    some = next(result for result in results.values() if result["status"] == "done")
    names = {"status", "id", "seed", "reason", "file", "sha256", "_target_", "best_epoch"}
    rows = {name: getattr(data, name).rows for name in ("train", "val")}
    own = recipe.member_rows(data, [entry["id"] for entry in entries])
    if own is not None:
        rows[MEMBER_ROWS] = data.train.rows[own]
    train_rows = "train" if own is None else MEMBER_ROWS
    members = [
        {**{k: v for k, v in entry.items() if k in names}, "train_rows": train_rows} for entry in entries
    ]
    meta = {
        "num_data": recipe.num_data(data),
        "temperature": recipe.method.target_temperature,
        "method": dict(config["inference"]),
        "prior": dict(config["prior"]),
        "architecture": dict(config["model"]),
        "likelihood": dict(config["likelihood"]),
        "inputs": data.inputs.to_json(),
        "target": data.target.to_json(),
        "transform": None if data.transform is None else data.transform.to_json(),
        "batch_norm": some["batch_norm"],
        "layout": some["layout"],
        "dtype": str(recipe.trainer.dtype).removeprefix("torch."),
        "num_draws": recipe.method.num_draws,
        "draw_seed": run_seed(recipe.seed, Stream.DRAWS),
        "members": members,
    }
    tensors = {name: torch.from_numpy(ids) for name, ids in rows.items()}
    meta["files"] = {
        ROWS_FILE: write_tensors(run.posterior, ROWS_FILE, tensors),
        "moments.safetensors": write_moments(run.posterior, read_members(run.posterior, meta)),
    }
    write_meta(run.posterior, meta)


def write_manifest(
    run: RunDir,
    *,
    status: str,
    entries: list[dict[str, Any]],
    tasks: Sequence[StackTask],
    results: Mapping[str, Mapping[str, Any]],
    data: Data,
    inputs: Mapping[str, Any],
    temperature: float,
    seconds: float,
    num_members: Mapping[str, Any] | None = None,
) -> None:
    """Write `manifest.json`: after it the run is finished.

    Args:
        run: The run.
        status: `complete`, `partial` or `failed`.
        entries: One a member.
        tasks: The stacks as planned.
        results: By stack id.
        data: What the run was trained on.
        inputs: What else went into it: `prior_run`, or nothing.
        temperature: T of the posterior.
        seconds: Of this session, from its start to the end.
        num_members: How their number was chosen, where it was.
    """
    steps = {stack: result.get("steps") for stack, result in results.items()}
    write_json(
        run.manifest,
        {
            "status": status,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "members": entries,
            **({} if num_members is None else {"num_members": num_members}),
            # What the potential used, trainer.member_fraction included; all of it where nothing was trained.
            "num_data": next((r["num_data"] for r in results.values() if "num_data" in r), len(data.train)),
            "data": {
                "name": data.name,
                "fingerprint": data.fingerprint(),
                "augment": data.augment,
                **data.notes,
            },
            **inputs,
            "temperature": temperature,
            "hashes": {
                file.relative_to(run.path).as_posix(): sha256(file)
                for file in (run.config, run.plan, run.posterior / "posterior.json")
                if file.is_file()
            },
            "code": {"version": __version__, **_git_state()},
            "packages": {name: _version(name) for name in PACKAGES},
            "hardware": {
                "machine": platform.machine(),
                "cpus": len(os.sched_getaffinity(0)),
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            },
            "wall_time_s": seconds,
            "device_time_s": device_seconds(tasks, results),
            "steps": steps,
        },
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any]:
    """Commit and cleanliness of the checkout this package runs from; empty for an installed wheel."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return {}
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "clean": not changed}

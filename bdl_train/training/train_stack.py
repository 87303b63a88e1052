"""Train one stack from start, or from its checkpoint, to posterior files and a result."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdl_train.data import Data
from bdl_train.errors import UsageError
from bdl_train.files import sha256, write_json
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.artefact import write_member
from bdl_train.runs import RunDir, read_json
from bdl_train.seeds import Stream, member_seed
from bdl_train.training.callbacks import Checkpoint, StackEvents, WriteEvents
from bdl_train.training.checkpoints import remove_checkpoints
from bdl_train.training.finalise import finalise, has_batch_norm
from bdl_train.training.ownership import Ownership, whereabouts
from bdl_train.training.prepared import Prepared, StackTask
from bdl_train.training.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

RESULT = "result.json"
STOPPED = {"status": "stopped"}
DIVERGED = "its potential or gradient became NaN or infinite"


def train_stack(
    task: StackTask, config: Mapping[str, Any], data: Data, run: RunDir, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Train the stack; the result is also `stacks/<id>/result.json`, written last.

    Idempotent: a stack with a result returns it if its members' files are as they were written, a stack with a
    checkpoint continues from it bit for bit. Of several ranks the first one writes all files.

    Returns:
        `status` done or stopped; for done: a list `members` with one entry each (id, status, reason, file, sha256),
        `again`, the members that diverged and are to be trained once more, `steps`, `seconds` over all sessions,
        `device`, `executor`. Of ranks other than the first: the status.

    Raises:
        LostOwnershipError: another process was given the stack while this one trained it.
    """
    result = stored_result(task, run)
    if result is not None:
        return result
    folder = run.stack(task.id)
    torch.set_num_threads(task.cpus)
    start = time.monotonic()
    owner = Ownership(folder) if ranks.is_first else None
    stack = Prepared.of(task, config, data, ranks)
    state, timeline, trainer = stack.state, stack.module.timeline, stack.recipe.trainer
    before = stack.load(folder)
    if before is not None:
        log.info("Stack %s continues at step %d", task.id, timeline.step(state))
    if ranks.decide(timeline.step(state), stack.device) != timeline.step(state):
        raise RuntimeError(f"Ranks of stack {task.id} loaded different checkpoints: does each see {folder}?")

    def spent() -> float:
        return (before or 0.0) + time.monotonic() - start

    # A stack may be a job of its own, with a stop of its own.
    stop_files = (run.stop_file, folder / run.stop_file.name)
    checkpoint = Checkpoint(
        folder, owner, lambda: stack.content(spent()), trainer.checkpoint_every_s, stop_files, ranks
    )
    if owner is None:
        stack.fit([checkpoint])
        return dict(STOPPED) if checkpoint.stopped else {"status": "done"}

    events = StackEvents(folder / "events.jsonl", owner)
    started = {"members": list(task.members), "executor": stack.executor, "device": str(stack.device)}
    events.write(
        "started", [(None, {**started, "ranks": ranks.world, **whereabouts()})], step=timeline.step(state)
    )
    try:
        write_events = WriteEvents(events, list(task.members), stack.module.timeline, data.target.scale)
        stack.fit([write_events, checkpoint])
        if checkpoint.stopped:
            events.write("stopped", [(None, "on request")], step=timeline.step(state))
            return {**STOPPED, "seconds": spent()}
        owner.check()
        entries, batch_norm = _write_members(task, stack, data, run)
        for entry in entries:
            events.write("member", [(entry["id"], entry["status"])], step=timeline.step(state))
        again = []
        if trainer.on_divergence == "retry" and task.attempt == 0:
            again = [
                member for member, failed in zip(task.members, state.failed.tolist(), strict=True) if failed
            ]
        if again:
            events.write("again", [(None, {"members": again})], step=timeline.step(state))
    finally:
        events.close()
    result = {
        "status": "done",
        "members": entries,
        "again": again,
        "layout": {
            "names": list(state.stack.layout.names),
            "shapes": [list(s) for s in state.stack.layout.shapes],
        },
        "batch_norm": batch_norm,
        "num_data": stack.problem.potential.num_data,
        "steps": timeline.step(state),
        "seconds": spent(),
        "device": str(stack.device),
        "executor": stack.executor,
    }
    owner.check()
    write_json(folder / RESULT, result)
    remove_checkpoints(folder)
    return result


def _write_members(
    task: StackTask, stack: Prepared, data: Data, run: RunDir
) -> tuple[list[dict[str, Any]], str]:
    """Write each usable member's posterior; one entry a member, in stack order, and the batch-norm policy."""
    state, stopping = stack.state, stack.early_stopping
    # Members that diverged before a posterior could be formed must not hide why.
    failed = state.failed.tolist()
    posteriors = [] if all(failed) else stack.recipe.method.posterior(state)
    entries = []
    normed = has_batch_norm(stack.problem.potential.network.template)
    batch_norm = "running statistics of training" if normed else "none"
    for m, member in enumerate(task.members):
        entry = {"id": member, "seed": member_seed(stack.recipe.seed, member, Stream.INIT, task.attempt)}
        diverged = f"{DIVERGED}: {stack.recipe.method.when_diverged}"
        reason = diverged if failed[m] else _why_unusable(posteriors[m])
        if reason is None:
            posterior = _finalised(posteriors[m], stack, data, m, member)
            if posterior is not posteriors[m]:
                batch_norm = "re-estimated for every draw"
            entry |= {"status": "done", **write_member(run.posterior, member, posterior)}
            if stopping is not None:
                entry["best_epoch"] = int(stopping.best_epoch[m])
        else:
            entry |= {"status": "failed", "reason": reason}
        entries.append(entry)
    return entries, batch_norm


def stored_result(task: StackTask, run: RunDir) -> dict[str, Any] | None:
    """The result that the stack already has, if its members' files are as they were written.

    Raises:
        UsageError: the result is damaged.
    """
    path = run.stack(task.id) / RESULT
    if not path.is_file():
        return None
    result = read_json(path)
    lost = _lost_files(result, run, path)
    if lost:
        log.warning(
            "The result of stack %s is not used: %s missing or not as it was written",
            task.id,
            ", ".join(lost),
        )
    return None if lost else result


def _lost_files(result: Any, run: RunDir, result_file: Path) -> list[str]:
    """The members' files that are missing or differ from what the result says of them."""
    try:
        done = [entry for entry in result.get("members", []) if entry["status"] == "done"]
        written = {run.posterior / entry["file"]: entry["sha256"] for entry in done}
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{result_file} is damaged: {type(error).__name__} {error}.") from error
    return [path.name for path, digest in written.items() if not path.is_file() or sha256(path) != digest]


def _finalised(
    posterior: MemberPosterior, stack: Prepared, data: Data, m: int, member: int
) -> MemberPosterior:
    recipe, network = stack.recipe, stack.problem.potential.network
    own_statistics = posterior.num_atoms is not None or posterior.at_trained_weights
    if own_statistics or not has_batch_norm(network.template):
        return posterior
    x, rows = stack.module.train_part.x, stack.module.member_rows
    return finalise(
        posterior,
        network,
        stack.problem.stack.layout,
        data.inputs,
        x if rows is None else x[rows[m]],
        num_draws=recipe.method.num_draws,
        seed=member_seed(recipe.seed, member, Stream.DRAWS),
        batch_size=recipe.batch_size,
        max_batches=recipe.trainer.batch_norm_batches,
    )


def _why_unusable(posterior: MemberPosterior) -> str | None:
    if not all(bool(torch.isfinite(t).all()) for t in posterior.tensors().values() if t.is_floating_point()):
        return "its posterior holds NaN or infinite values"
    return None

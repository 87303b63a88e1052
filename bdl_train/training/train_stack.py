"""Train one stack from start, or from its checkpoint, to posterior files and a result."""

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from bdl_train.data import Data
from bdl_train.errors import UsageError
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.artefact import write_member
from bdl_train.runs import RunDir, read_json, sha256, write_json
from bdl_train.seeds import Stream, member_seed
from bdl_train.training.callbacks import Checkpoint, StackEvents, WriteEvents
from bdl_train.training.checkpoints import load_checkpoint, remove_checkpoints
from bdl_train.training.early_stopping import EarlyStopping
from bdl_train.training.feed import StepFeed
from bdl_train.training.finalise import finalise, has_batch_norm
from bdl_train.training.member_stack import MemberStack
from bdl_train.training.ownership import Ownership, whereabouts
from bdl_train.training.problem import DevicePart, Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackTask:
    """One unit of work: a stack of the plan.

    Attributes:
        id: Folder name below `stacks/`.
        members: Ensemble indices.
        cpus: Threads it may use.
        gpus: Share of a GPU; 0 = CPU.
        attempt: Of these members, part of their seeds.
    """

    id: str
    members: tuple[int, ...]
    cpus: int
    gpus: float
    attempt: int = 0


STOPPED = {"status": "stopped"}
DIVERGED = "its potential or gradient became NaN or infinite: lower optimizer.lr or set trainer.clip_norm"


def train_stack(task: StackTask, config: Mapping[str, Any], data: Data, run: RunDir) -> dict[str, Any]:
    """Train the stack; the result is also `stacks/<id>/result.json`, written last.

    Idempotent: a stack with a result returns it if its members' files are as they were written, a stack with a
    checkpoint continues from it bit for bit.

    Returns:
        `status` done or stopped; for done: a list `members` with one entry each (id, status, reason, file, sha256),
        `again`, the members that diverged and are to be trained once more, `steps`, `seconds`, `device`, `executor`.

    Raises:
        LostOwnershipError: another process was given the stack while this one trained it.
    """
    folder = run.stack(task.id)
    result_file = folder / "result.json"
    if result_file.is_file():
        result = read_json(result_file)
        lost = _lost_files(result, run, result_file)
        if not lost:
            return result
        log.warning(
            "Stack %s is trained again: %s missing or not as it was written", task.id, ", ".join(lost)
        )
    torch.set_num_threads(task.cpus)
    start = time.monotonic()
    owner = Ownership(folder)
    recipe = Recipe.of(config, data)
    device = _device(recipe.trainer.accelerator, task.gpus)
    problem, executor = recipe.problem(data, task.members, task.attempt, device)
    method, trainer_settings = recipe.method, recipe.trainer
    state = method.init(problem)
    early_stopping = None
    if method.early_stopping is not None:
        early_stopping = EarlyStopping(state, method.early_stopping)

    dtype = trainer_settings.dtype
    train, val = DevicePart.of(data.train, device, dtype), DevicePart.of(data.val, device, dtype)
    feed = StepFeed(
        [member_seed(recipe.seed, m, Stream.ORDER, task.attempt) for m in task.members],
        len(data.train),
        recipe.batch_size,
        trainer_settings.steps_per_call,
        lambda: state.step,
    )
    tile_rows = max(1, (1 << 22) // (len(task.members) * max(256, train.x[0].numel() * 8)))
    module = MemberStack(
        method,
        state,
        feed,
        data.inputs,
        train,
        val,
        tile_rows=tile_rows,
        early_stopping=early_stopping,
        augment=data.augment != "none",
    )
    # Not its CPUs and GPUs: a run may be resumed on another machine.
    own = {"id": task.id, "members": list(task.members), "attempt": task.attempt}
    identity = {"task": own, "num_data": len(data.train), "fingerprint": data.fingerprint()}

    def content() -> dict[str, Any]:
        stopping = None if early_stopping is None else early_stopping.state_dict()
        return {"identity": identity, "state": state.state_dict(), "early_stopping": stopping}

    stored = load_checkpoint(folder, identity, device)
    if stored is not None:
        state.load_state_dict(stored["state"])
        if early_stopping is not None:
            early_stopping.load_state_dict(stored["early_stopping"])
        log.info("Stack %s continues at step %d", task.id, state.step)

    events = StackEvents(folder / "events.jsonl", owner)
    started = {"members": list(task.members), "executor": executor, "device": str(device), **whereabouts()}
    events.write("started", [(None, started)], step=state.step)
    checkpoint = Checkpoint(folder, owner, content, trainer_settings.checkpoint_every_s, run.stop_file)
    try:
        if state.step < problem.num_steps and bool(state.active.any()):
            write_events = WriteEvents(
                events, list(task.members), problem.num_steps, trainer_settings.max_epochs
            )
            _fit(
                module,
                recipe,
                device,
                [write_events, checkpoint],
                epochs_left=trainer_settings.max_epochs - module.epoch,
            )
        if checkpoint.stopped:
            events.write("stopped", [(None, "on request")], step=state.step)
            return dict(STOPPED)
        if early_stopping is not None:
            early_stopping.restore(state)
        # Members that diverged before a posterior could be formed must not hide why.
        failed = state.failed.tolist()
        owner.check()
        posteriors = [] if all(failed) else method.posterior(state)
        entries = []
        for m, member in enumerate(task.members):
            entry = {"id": member, "seed": member_seed(recipe.seed, member, Stream.INIT, task.attempt)}
            reason = DIVERGED if failed[m] else _why_unusable(posteriors[m])
            if reason is None:
                posterior = _finalised(posteriors[m], recipe, problem, data, train, member)
                entry |= {"status": "done", **write_member(run.posterior, member, posterior)}
                if early_stopping is not None:
                    entry["best_epoch"] = int(early_stopping.best_epoch[m])
            else:
                entry |= {"status": "failed", "reason": reason}
            entries.append(entry)
            events.write("member", [(member, entry["status"])], step=state.step)
        again = []
        if trainer_settings.on_divergence == "retry" and task.attempt == 0:
            again = [member for m, member in enumerate(task.members) if failed[m]]
        if again:
            events.write("again", [(None, {"members": again})], step=state.step)
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
        "batch_norm": has_batch_norm(problem.potential.network.template),
        "steps": state.step,
        "seconds": time.monotonic() - start,
        "device": str(device),
        "executor": executor,
    }
    owner.check()
    write_json(result_file, result)
    remove_checkpoints(folder)
    return result


def _lost_files(result: Any, run: RunDir, result_file: Path) -> list[str]:
    """The members' files that are missing or differ from what the result says of them."""
    try:
        done = [entry for entry in result.get("members", []) if entry["status"] == "done"]
        written = {run.posterior / entry["file"]: entry["sha256"] for entry in done}
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{result_file} is damaged: {type(error).__name__} {error}.") from error
    return [path.name for path, digest in written.items() if not path.is_file() or sha256(path) != digest]


def _fit(
    module: MemberStack,
    recipe: Recipe,
    device: torch.device,
    callbacks: list[pl.Callback],
    *,
    epochs_left: int,
) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Lightning expects an optimiser, loader workers and a logger; here the method and the event file do that.
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings(
            "ignore", message=".*`LightningModule.configure_optimizers` returned `None`.*"
        )
        trainer = pl.Trainer(
            max_epochs=epochs_left,
            accelerator=device.type if device.type == "cpu" else "gpu",
            devices=1,
            # A stack is a process of its own, whatever job it is part of: Lightning would read SLURM_* otherwise.
            plugins=LightningEnvironment(),
            precision=recipe.trainer.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=None if len(module.val_part.y) else 0,
            callbacks=callbacks,
        )
        trainer.fit(module)


def _finalised(
    posterior: MemberPosterior, recipe: Recipe, problem: Any, data: Data, train: DevicePart, member: int
) -> MemberPosterior:
    network = problem.potential.network
    if posterior.num_atoms is not None or not has_batch_norm(network.template):
        return posterior
    seed = member_seed(recipe.seed, member, Stream.DRAWS)
    return finalise(
        posterior,
        network,
        problem.stack.layout,
        data.inputs,
        train.x,
        num_draws=recipe.method.num_draws,
        seed=seed,
        batch_size=recipe.batch_size,
        max_batches=recipe.trainer.batch_norm_batches,
    )


def _why_unusable(posterior: MemberPosterior) -> str | None:
    if not all(bool(torch.isfinite(t).all()) for t in posterior.tensors().values() if t.is_floating_point()):
        return "its posterior holds NaN or infinite values"
    return None


def _device(accelerator: str, gpus: float) -> torch.device:
    use_gpu = accelerator == "gpu" or (accelerator == "auto" and gpus > 0)
    if use_gpu and not torch.cuda.is_available():
        raise RuntimeError(
            "The plan gives this stack a GPU and torch sees none: set trainer.accelerator=cpu."
        )
    return torch.device("cuda" if use_gpu else "cpu")

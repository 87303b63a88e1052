"""What it takes to train one stack, built and loaded: the problem, the method's state, the LightningModule."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from bdl_train.data import Data
from bdl_train.inference import Problem, State
from bdl_train.seeds import Stream, member_seed
from bdl_train.training.checkpoints import load_checkpoint
from bdl_train.training.early_stopping import EarlyStopping
from bdl_train.training.feed import PhaseFeed, StepFeed
from bdl_train.training.member_stack import MemberStack
from bdl_train.training.problem import DevicePart, Recipe
from bdl_train.training.ranks import Ranks
from bdl_train.training.timeline import Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackTask:
    """One unit of work: a stack of the plan.

    Attributes:
        id: Folder name below `stacks/`.
        members: Ensemble indices.
        cpus: Threads each of its processes may use.
        gpus: Share of a GPU of each; 0 = CPU.
        attempt: Of these members, part of their seeds.
        ranks: Processes that split its batches.
        together: Why it is never cut, for methods whose members interact; None = members are on their own.
    """

    id: str
    members: tuple[int, ...]
    cpus: int
    gpus: float
    attempt: int = 0
    ranks: int = 1
    together: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A stack that can be trained.

    Attributes:
        executor: Which one, and why.
        identity: What its checkpoints must have recorded to be continued.
    """

    recipe: Recipe
    problem: Problem
    executor: str
    state: State
    early_stopping: EarlyStopping | None
    module: MemberStack
    device: torch.device
    identity: dict[str, Any]

    @classmethod
    def of(cls, task: StackTask, config: Mapping[str, Any], data: Data, ranks: Ranks) -> "Prepared":
        """Build everything, at step 0."""
        recipe = Recipe.of(config, data)
        recipe.check_ranks(data, ranks.world)
        device = _device(recipe.trainer.accelerator, task.gpus)
        problem, executor = recipe.problem(data, task.members, task.attempt, device, ranks)
        state = recipe.method.init(problem)
        patience = recipe.method.early_stopping
        early_stopping = None if patience is None else EarlyStopping(state, patience)
        dtype = recipe.trainer.dtype
        train, val = DevicePart.of(data.train, device, dtype), DevicePart.of(data.val, device, dtype)
        rows = recipe.member_rows(data, task.members)
        timeline = Timeline(recipe.method.phases(problem.setting))
        shuffled = StepFeed(
            [member_seed(recipe.seed, m, Stream.ORDER, task.attempt) for m in task.members],
            recipe.num_data(data),
            recipe.batch_size,
            recipe.trainer.steps_per_call,
            lambda: timeline.shuffled_step(state),
        )
        module = MemberStack(
            recipe.method,
            state,
            PhaseFeed(shuffled, timeline, state),
            data.inputs,
            train,
            val,
            tile_rows=max(1, (1 << 22) // (len(task.members) * max(256, train.x[0].numel() * 8))),
            early_stopping=early_stopping,
            augment=data.augment != "none",
            ranks=ranks,
            member_rows=None if rows is None else torch.from_numpy(rows).to(device),
        )
        # Not its CPUs, GPUs and ranks: a run may be resumed on another machine.
        own = {"id": task.id, "members": list(task.members), "attempt": task.attempt}
        identity = {"task": own, "num_data": recipe.num_data(data), "fingerprint": data.fingerprint()}
        return cls(recipe, problem, executor, state, early_stopping, module, device, identity)

    def content(self, seconds: float) -> dict[str, Any]:
        """What a checkpoint holds; `seconds` went into it, over all sessions."""
        stopping = None if self.early_stopping is None else self.early_stopping.state_dict()
        return {
            "identity": self.identity,
            "state": self.state.state_dict(),
            "early_stopping": stopping,
            "seconds": seconds,
        }

    def load(self, folder: Path) -> float | None:
        """Take up the newest checkpoint of the stack's folder: the seconds that went into it, None without one."""
        stored = load_checkpoint(folder, self.identity, self.device)
        if stored is not None:
            self.state.load_state_dict(stored["state"])
            if self.early_stopping is not None:
                self.early_stopping.load_state_dict(stored["early_stopping"])
        return None if stored is None else stored.get("seconds", 0.0)

    def fit(self, callbacks: Sequence[pl.Callback]) -> None:
        """Train what is left to train."""
        if not self.module.settle():
            return
        epochs_left = self.module.timeline.num_epochs - self.module.epoch
        _fit(self.module, self.recipe, self.device, list(callbacks), epochs_left=epochs_left)


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
        # Where Slurm is installed; a stack is no step of it.
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
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


def _device(accelerator: str, gpus: float) -> torch.device:
    use_gpu = accelerator == "gpu" or (accelerator == "auto" and gpus > 0)
    if use_gpu and not torch.cuda.is_available():
        raise RuntimeError(
            "The plan gives this stack a GPU and torch sees none: set trainer.accelerator=cpu."
        )
    return torch.device("cuda" if use_gpu else "cpu")

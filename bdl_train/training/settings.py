"""The `trainer` config group."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

Precision = Literal["32-true", "64-true", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How a stack is trained.

    float16 is not offered: its range makes mutual information NaN and needs loss scaling per member.

    Attributes:
        max_epochs: Passes over the training part.
        member_fraction: Share of the training rows that each member sees, drawn for it at random without replacement.
        precision: Of weights and arithmetic, in Lightning's words.
        accelerator: `auto` uses a GPU where the plan gives the stack one.
        executor: How the members of a stack run: one batched call, or one after another.
        compile: Compile with torch.compile: true = the gradient; `auto` = the steps of methods whose whole step can be
            compiled and is taken thousands of times on the same tensors, on a CPU, nothing else; false = nothing.
        clip_norm: Largest gradient norm of one member; null = no clipping.
        on_divergence: What becomes of a member whose potential turned NaN or infinite: `mark` leaves it out of the
            posterior, `retry` trains it once more, from other initial weights and in another data order, first.
        steps_per_call: Optimiser steps handed over in one Lightning batch.
        checkpoint_every_s: Seconds between checkpoints.
        batch_norm_batches: Most training batches that re-estimate the batch-norm statistics of one posterior draw.
    """

    max_epochs: Annotated[int, Field(ge=1)]
    member_fraction: Annotated[float, Field(gt=0, le=1)]
    precision: Precision
    accelerator: Literal["auto", "cpu", "gpu"]
    executor: Literal["auto", "vmap", "loop"]
    compile: bool | Literal["auto"]
    clip_norm: Annotated[float, Field(gt=0)] | None
    on_divergence: Literal["mark", "retry"]
    steps_per_call: Annotated[int, Field(ge=1)]
    checkpoint_every_s: Annotated[float, Field(ge=0)]
    batch_norm_batches: Annotated[int, Field(ge=1)]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "64-true" else torch.float32

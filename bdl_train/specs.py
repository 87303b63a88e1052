"""What data, models and likelihoods must agree on: the shape of an input and the kind of a target."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

PREFIX = "likelihood."
"""Of the names of a likelihood's parameters in θ: `likelihood.log_noise_std` ..."""


class TargetKind(StrEnum):
    """What a target is; a likelihood says which kinds it can explain."""

    CONTINUOUS = "continuous"
    CLASS = "class"
    COUNT = "count"


@dataclass(frozen=True)
class InputSpec:
    """The input of a network.

    Attributes:
        shape: Of one example without the batch axis: `(D,)` for tables, `(C, H, W)` for images.
        groups: For tables, how many of the D columns each original feature fills, in order: 1 for a number,
            the number of categories for a one-hot category. Empty for images.
        names: For tables, the original features, in order.
        pixel_mean, pixel_std: For images, per channel, in units of pixel values in [0, 1]. Images stay uint8 in
            memory and are scaled on the device.
    """

    shape: tuple[int, ...]
    groups: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    def prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Raw stored examples `[..., *shape]` to network inputs: uint8 images are scaled, tables are cast."""
        if x.dtype != torch.uint8:
            return x.to(dtype)
        mean = torch.tensor(self.pixel_mean, dtype=dtype, device=x.device)[:, None, None]
        std = torch.tensor(self.pixel_std, dtype=dtype, device=x.device)[:, None, None]
        return (x.to(dtype) / 255 - mean) / std

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "InputSpec":
        return cls(**{name: tuple(value) for name, value in stored.items()})


@dataclass(frozen=True)
class TargetSpec:
    """The target of a data set.

    Attributes:
        kind: Continuous numbers, class labels 0..K-1, or counts 0, 1, 2, ...
        name: The target's name in the source.
        classes: Names of the classes, in the order of the labels; empty unless kind is class.
        loc, scale: Networks see `(y - loc) / scale`, with train-part statistics; 0 and 1 unless continuous.
    """

    kind: TargetKind
    name: str = "target"
    classes: tuple[str, ...] = ()
    loc: float = 0.0
    scale: float = 1.0

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "TargetSpec":
        return cls(**{**stored, "kind": TargetKind(stored["kind"]), "classes": tuple(stored["classes"])})

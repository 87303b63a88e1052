"""A Gaussian with a diagonal plus low-rank covariance, as SWAG fits it.

Shape letters: K columns of the low-rank part, P parameters.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bdl_train.posteriors import MemberPosterior, prefixed, unprefixed
from bdl_train.seeds import Stream, member_seed


@dataclass(frozen=True)
class LowRankGaussian(MemberPosterior):
    """N(mean, ½ diag(variance) + ½ DᵀD / (K − 1)); with K = 0 columns, N(mean, diag(variance)).

    Source:
        Maddox et al. (2019), arXiv:1902.02476, Section 3.2 and equation 1.

    Attributes:
        mean, variance: `[P]`.
        deviations: D, `[K, P]`, with K = 0 or K ≥ 2.
        buffers: Of the network, shared by all draws.
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor
    buffers: dict[str, Tensor]

    @property
    def num_params(self) -> int:
        return self.mean.shape[0]

    @property
    def num_atoms(self) -> None:
        return None

    def draw(self, num_samples: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        num_columns = self.deviations.shape[0]
        diagonal_scale = 1.0 if num_columns == 0 else math.sqrt(0.5)
        std_P = diagonal_scale * self.variance.sqrt()
        for i in range(num_samples):
            generator = torch.Generator().manual_seed(member_seed(seed, i, Stream.DRAWS))
            z_P = torch.empty(self.mean.shape, dtype=self.mean.dtype).normal_(generator=generator)
            flat = self.mean + std_P * z_P.to(self.mean.device)
            if num_columns > 0:
                # One vector z for all tensors of the network: covariance between layers is kept.
                z_K = torch.empty(num_columns, dtype=self.mean.dtype).normal_(generator=generator)
                flat = flat + (z_K.to(self.mean.device) @ self.deviations) / math.sqrt(2 * (num_columns - 1))
            yield flat, self.buffers

    def moments(self) -> tuple[Tensor, Tensor]:
        num_columns = self.deviations.shape[0]
        if num_columns == 0:
            return self.mean, self.variance
        low_rank_P = self.deviations.square().sum(0) / (num_columns - 1)
        return self.mean, 0.5 * (self.variance + low_rank_P)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "variance": self.variance,
            "deviations": self.deviations,
            **prefixed(self.buffers),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LowRankGaussian":
        missing = {"mean", "variance", "deviations"} - set(tensors)
        if missing:
            raise ValueError(f"A low-rank Gaussian needs the tensors {', '.join(sorted(missing))}.")
        mean, variance, deviations = tensors["mean"], tensors["variance"], tensors["deviations"]
        if mean.ndim != 1 or variance.shape != mean.shape or deviations.shape[1:] != mean.shape:
            raise ValueError(
                f"mean {list(mean.shape)}, variance {list(variance.shape)} and deviations "
                f"{list(deviations.shape)} do not fit together."
            )
        if len(deviations) == 1 or not bool((variance >= 0).all()):
            raise ValueError("A variance is negative or NaN, or the low-rank part has a single column.")
        return cls(mean, variance, deviations, unprefixed(tensors))

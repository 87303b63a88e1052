"""Categorical likelihood of K classes, by softmax of K logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Categorical as CategoricalDistribution

from bdl_train.likelihoods import Likelihood
from bdl_train.specs import TargetKind, TargetSpec


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """p(y = k | x) = softmax(outputs)_k. Outputs are logits `[..., B, K]`."""

    kinds: ClassVar[frozenset[TargetKind]] = frozenset({TargetKind.CLASS})

    def num_outputs(self, target: TargetSpec) -> int:
        return target.num_classes

    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        log_probs = torch.log_softmax(_at_least_float32(outputs), dim=-1)
        return log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> CategoricalDistribution:
        return CategoricalDistribution(logits=_at_least_float32(outputs), validate_args=False)


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs

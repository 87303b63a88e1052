"""Categorical likelihood of K classes, by softmax of K logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Categorical as CategoricalDistribution
from torch.nn.functional import log_softmax

from bdl_train.errors import UsageError
from bdl_train.likelihoods import Likelihood, at_least_float32
from bdl_train.specs import TargetKind, TargetSpec


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """p(y = k | x) = softmax(outputs)_k. Outputs are logits `[..., B, K]`."""

    kinds: ClassVar[frozenset[TargetKind]] = frozenset({TargetKind.CLASS})

    def num_outputs(self, target: TargetSpec) -> int:
        return target.num_classes

    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        log_probs = log_softmax(at_least_float32(outputs), dim=-1)
        return log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> CategoricalDistribution:
        return CategoricalDistribution(logits=at_least_float32(outputs), validate_args=False)

    def check(self, target: TargetSpec) -> None:
        super().check(target)
        if target.num_classes < 2:
            raise UsageError(
                f"likelihood=categorical needs two classes or more, the target '{target.name}' has "
                f"{target.num_classes} ({list(target.classes)}): check data.target."
            )

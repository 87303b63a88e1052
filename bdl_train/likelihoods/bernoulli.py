"""Bernoulli likelihood of two classes, by the sigmoid of one logit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.nn.functional import logsigmoid

from bdl_train.errors import UsageError
from bdl_train.likelihoods import Likelihood, at_least_float32
from bdl_train.specs import TargetKind, TargetSpec


class _Labels(BernoulliDistribution):
    """torch's takes floating values only; labels are int64."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.to(self.logits.dtype))


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Likelihood):
    """p(y = 1 | x) = sigmoid(output). The output is one logit `[..., B, 1]`; y is the label, 0 or 1."""

    kinds: ClassVar[frozenset[TargetKind]] = frozenset({TargetKind.CLASS})

    def num_outputs(self, target: TargetSpec) -> int:
        return 1

    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        logits = at_least_float32(outputs).squeeze(-1)
        # 1 - sigmoid(l) = sigmoid(-l): the label chooses the sign, and no probability is ever rounded to 0.
        return logsigmoid((2 * y - 1).to(logits.dtype) * logits)

    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> BernoulliDistribution:
        return _Labels(logits=at_least_float32(outputs).squeeze(-1), validate_args=False)

    def check(self, target: TargetSpec) -> None:
        super().check(target)
        if target.num_classes != 2:
            raise UsageError(
                f"likelihood=bernoulli needs exactly two classes, the target '{target.name}' has "
                f"{target.num_classes}. Use likelihood=categorical."
            )

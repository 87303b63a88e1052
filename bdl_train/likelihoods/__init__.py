"""Likelihoods p(y | network output). One module and one YAML a choice."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from bdl_train.errors import UsageError
from bdl_train.specs import PREFIX as PREFIX
from bdl_train.specs import TargetKind, TargetSpec


def at_least_float32(outputs: Tensor) -> Tensor:
    """Half-precision outputs in float32, others as they are: densities need more than 8 or 11 bits."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


class Likelihood(ABC):
    """How a target follows from a network's outputs.

    Parameters of a likelihood (a learned noise) are unconstrained scalars of each member, part of θ under the
    names `likelihood.*`; each has an independent Gaussian prior whose mean and standard deviation stand in
    the likelihood's YAML.
    """

    kinds: ClassVar[frozenset[TargetKind]]

    @abstractmethod
    def num_outputs(self, target: TargetSpec) -> int:
        """Width O of the network's last layer."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Log density or mass of each example, in nats.

        Args:
            outputs: `[..., B, O]`.
            y: `[..., B]`; standardised when the target is continuous, int64 for classes and counts.
            params: The `likelihood.*` parameters, `[...]` each (the leading axes of `outputs` without B).

        Returns:
            `[..., B]`, in float32 or better.
        """

    @abstractmethod
    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> Distribution:
        """The predictive component of each member and example, batch shape `[..., B]`, in float32 or better.

        One of `Categorical`, `Bernoulli`, `Normal`, `StudentT`, `Poisson` of `torch.distributions`.
        """

    def params(self) -> dict[str, tuple[float, float, float]]:
        """Name without prefix to (start, prior mean, prior standard deviation), all unconstrained."""
        return {}

    def check(self, target: TargetSpec) -> None:
        """Refuse a target that this likelihood cannot explain.

        Raises:
            UsageError: names both and says which likelihoods fit.
        """
        if target.kind not in self.kinds:
            fitting = {
                TargetKind.CONTINUOUS: "gaussian, heteroscedastic_gaussian or student_t",
                TargetKind.CLASS: "categorical (or bernoulli for two classes)",
                TargetKind.COUNT: "poisson",
            }[target.kind]
            raise UsageError(
                f"likelihood={type(self).__module__.rsplit('.', 1)[-1]} does not fit the target "
                f"'{target.name}', which is of kind '{target.kind}'. Use likelihood={fitting}."
            )

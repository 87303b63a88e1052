"""Predictive statistics that merge: components may come in any order, from any worker.

Shape letters: C components of a chunk, B rows, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, singledispatch
from typing import Self

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution
from torch.nn.functional import logsigmoid, softplus


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats over the last axis, with 0 log 0 = 0; at least 0, also where rounding takes a sum above 1."""
    return torch.special.entr(probs).sum(-1).clamp(min=0)


_CLASS_SUMS = ("probs", "expected_entropy", "log_score")
_NUMBER_SUMS = ("mean", "sum_sq_dev", "expected_variance", "log_score")


@dataclass(frozen=True)
class ClassStats:
    """Sums over weighted categorical components of the same rows. `merge` joins disjoint components.

    Attributes:
        weight: Total weight so far; 1 when every component is in.
        probs: `[B, K]` float64, sum of w·p: probabilities are averaged, never logits.
        expected_entropy: `[B]` float64, sum of w·H(p), nats.
        log_score: `[B]` float64, log of the sum of w·p(y); −inf without targets.
    """

    weight: float
    probs: Tensor
    expected_entropy: Tensor
    log_score: Tensor

    def merge(self, other: Self) -> Self:
        return type(self)(
            self.weight + other.weight,
            self.probs + other.probs,
            self.expected_entropy + other.expected_entropy,
            torch.logaddexp(self.log_score, other.log_score),
        )

    def scaled(self, factor: float) -> Self:
        """The same with every weight times `factor`."""
        return type(self)(
            self.weight * factor,
            self.probs * factor,
            self.expected_entropy * factor,
            self.log_score + math.log(factor),
        )

    @classmethod
    def of_rows(cls, parts: Sequence[Self]) -> Self:
        """The same components of the rows of all parts."""
        fields = (torch.cat([getattr(part, name) for part in parts]) for name in _CLASS_SUMS)
        return cls(parts[0].weight, *fields)

    @cached_property
    def mean_probs(self) -> Tensor:
        """`[B, K]`, the mixture's probabilities."""
        return self.probs / self.weight

    @cached_property
    def total(self) -> Tensor:
        """Predictive entropy `[B]`, nats."""
        return entropy(self.mean_probs)

    @cached_property
    def aleatoric(self) -> Tensor:
        """Expected entropy `[B]`, nats."""
        return self.expected_entropy / self.weight

    @property
    def epistemic(self) -> Tensor:
        """Mutual information of label and weights `[B]`, nats: total − aleatoric, at least 0."""
        return (self.total - self.aleatoric).clamp(min=0)

    @property
    def nll(self) -> Tensor:
        """−log of the mixture's probability of the target, `[B]` nats."""
        return math.log(self.weight) - self.log_score


@dataclass(frozen=True)
class NumberStats:
    """Moments over weighted numeric components of the same rows. `merge` joins disjoint components.

    Attributes:
        weight: Total weight so far.
        mean: `[B]` float64, weighted mean of the component means.
        sum_sq_dev: `[B]` float64, weighted squared deviations of the component means (Welford, Chan et al. 1979).
        expected_variance: `[B]` float64, sum of w·variance.
        log_score: `[B]` float64, log of the sum of w·p(y); −inf without targets.
    """

    weight: float
    mean: Tensor
    sum_sq_dev: Tensor
    expected_variance: Tensor
    log_score: Tensor

    def merge(self, other: Self) -> Self:
        weight = self.weight + other.weight
        delta = other.mean - self.mean
        return type(self)(
            weight,
            self.mean + delta * (other.weight / weight),
            self.sum_sq_dev + other.sum_sq_dev + delta.square() * (self.weight * other.weight / weight),
            self.expected_variance + other.expected_variance,
            torch.logaddexp(self.log_score, other.log_score),
        )

    def scaled(self, factor: float) -> Self:
        """The same with every weight times `factor`."""
        return type(self)(
            self.weight * factor,
            self.mean,
            self.sum_sq_dev * factor,
            self.expected_variance * factor,
            self.log_score + math.log(factor),
        )

    @classmethod
    def of_rows(cls, parts: Sequence[Self]) -> Self:
        """The same components of the rows of all parts."""
        fields = (torch.cat([getattr(part, name) for part in parts]) for name in _NUMBER_SUMS)
        return cls(parts[0].weight, *fields)

    @property
    def aleatoric(self) -> Tensor:
        """Mean of the component variances `[B]`."""
        return self.expected_variance / self.weight

    @property
    def epistemic(self) -> Tensor:
        """Variance of the component means `[B]`. Population variance: the components are the whole mixture."""
        return self.sum_sq_dev / self.weight

    @property
    def total(self) -> Tensor:
        """Variance of the mixture `[B]`, by the law of total variance."""
        return self.aleatoric + self.epistemic

    @property
    def nll(self) -> Tensor:
        """−log of the mixture's density of the target, `[B]` nats."""
        return math.log(self.weight) - self.log_score


PredictiveStats = ClassStats | NumberStats


@singledispatch
def stats_of(components: Distribution, log_weights: Tensor, y: Tensor | None) -> PredictiveStats:
    """Statistics of one chunk of components.

    Args:
        components: Batch shape `[C, B]`: Categorical or Bernoulli for classes, else any with a mean and a variance.
        log_weights: `[C]`.
        y: Targets `[B]`, or None when there are none.
    """
    w_C = log_weights.double().exp()
    mean_CB = components.mean.double()
    weight = w_C.sum()
    mean_B = (w_C @ mean_CB) / weight
    return NumberStats(
        float(weight),
        mean_B,
        w_C @ (mean_CB - mean_B).square(),
        w_C @ components.variance.double(),
        _log_score(components, log_weights, y, mean_B),
    )


@stats_of.register
def _(components: Categorical, log_weights: Tensor, y: Tensor | None) -> ClassStats:
    return _class_stats(components.logits, components, log_weights, y)


@stats_of.register
def _(components: Bernoulli, log_weights: Tensor, y: Tensor | None) -> ClassStats:
    return _class_stats(class_log_probs(components), components, log_weights, y)


def _class_stats(
    log_probs: Tensor, components: Distribution, log_weights: Tensor, y: Tensor | None
) -> ClassStats:
    num_components, num_rows, num_classes = log_probs.shape
    w_C = log_weights.double().exp()
    # exp(log p) costs a tenth of torch's softmax over few classes; the clamp makes 0 log 0 = 0.
    probs_CBK = log_probs.exp()
    surprise_CBK = probs_CBK * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    mean_BK, expected_BK = (
        (w_C @ one.reshape(num_components, -1).double()).view(num_rows, num_classes)
        for one in (probs_CBK, surprise_CBK)
    )
    expected_B = -expected_BK.sum(-1)
    return ClassStats(
        float(w_C.sum()), mean_BK, expected_B, _log_score(components, log_weights, y, expected_B)
    )


@singledispatch
def class_probs(components: Distribution) -> Tensor:
    """Probabilities of every component, `[C, B, K]`, for Categorical or Bernoulli components."""
    raise TypeError(f"{type(components).__name__} has no classes.")


@class_probs.register
def _(components: Categorical) -> Tensor:
    return components.logits.exp()  # torch keeps them normalised


@class_probs.register
def _(components: Bernoulli) -> Tensor:
    return torch.sigmoid(torch.stack([-components.logits, components.logits], dim=-1))


@singledispatch
def class_log_probs(components: Distribution) -> Tensor:
    """Log probabilities of every component, `[C, B, K]`, which keep their digits where probabilities have none left."""
    raise TypeError(f"{type(components).__name__} components have no class probabilities.")


@class_log_probs.register
def _(components: Categorical) -> Tensor:
    return components.logits


@class_log_probs.register
def _(components: Bernoulli) -> Tensor:
    # 1 - sigmoid(l) = sigmoid(-l), which keeps its digits where 1 - p has none left.
    return logsigmoid(torch.stack([-components.logits, components.logits], dim=-1))


@singledispatch
def log_normaliser(components: Distribution, outputs: Tensor) -> Tensor:
    """log Σ_k exp(logit_k) of raw class outputs `[C, B, O]`, as `[C, B]`; one output is the logit against 0."""
    raise TypeError(f"{type(components).__name__} has no classes.")


@log_normaliser.register
def _(components: Categorical, outputs: Tensor) -> Tensor:
    # torch has subtracted it from every logit already.
    return outputs[..., 0].to(components.logits.dtype) - components.logits[..., 0]


@log_normaliser.register
def _(components: Bernoulli, outputs: Tensor) -> Tensor:
    return softplus(components.logits)


def log_prob(components: Distribution, y: Tensor) -> Tensor:
    """log p(y) of every component, `[C, B]`, for encoded targets `[B]`."""
    # torch wants labels of Bernoulli as numbers, and rounds the log-factorial of an int64 count to float32.
    return components.log_prob(y if isinstance(components, Categorical) else y.to(_dtype_of(y)))


def _dtype_of(y: Tensor) -> torch.dtype:
    return y.dtype if y.is_floating_point() else torch.float64


def _log_score(components: Distribution, log_weights: Tensor, y: Tensor | None, like: Tensor) -> Tensor:
    if y is None:
        return torch.full_like(like, -torch.inf)
    # A NaN component must show: logsumexp keeps it.
    return torch.logsumexp(log_prob(components, y).double() + log_weights.double()[:, None], dim=0)

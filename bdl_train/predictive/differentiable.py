"""The posterior predictive as a torch module that is differentiable in its inputs.

Gradients of the mixture, not of one network: probabilities are averaged before the logarithm, means and variances by
the law of total variance. Weights stay constants. Shape letters: C components of a chunk, B rows, D columns, K classes.
"""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive._forward import Chunk
from bdl_train.predictive.stats import NumberStats, class_log_probs, stats_of
from bdl_train.specs import TargetKind
from bdl_train.stack import Stack, StackedNetwork, choose_executor

DRAWS_AT_A_TIME = 16
"""Draws that run in one batched call; a network that runs in a loop takes them one by one."""


class MixtureModule(nn.Module):
    """p(y | x) = Σ_c w_c p(y | x, θ_c) for inputs that may require a gradient.

    Inputs are as the network sees them (`InputSpec.prepare`): standardised columns `[B, D]`, or scaled images
    `[B, C, H, W]`, which `from_pixels` makes from pixel values in [0, 1]. Results are float64 `[B]` or `[B, K]`, equal
    to those of `Predictor` with the same draws. With more than one chunk of draws the activations of one chunk exist
    at a time, and are computed once more on the way back.

    Args:
        artefact: What was trained.
        device: Where to compute.
        num_draws: Draws a member; None = the method's own number. All are made here, once, and kept.

    Attributes:
        inputs, target, transform: As in the artefact.
        is_class: Whether there are `log_probs`; else there are `mean` and `variance`.
        num_components: Draws of all members.

    Raises:
        UsageError: `num_draws` below 1, or above the atoms that the posterior holds.
    """

    def __init__(
        self, artefact: Artefact, *, device: torch.device | str, num_draws: int | None = None
    ) -> None:
        super().__init__()
        self.device, self.dtype = torch.device(device), artefact.dtype
        self.inputs, self.target, self.transform = artefact.inputs, artefact.target, artefact.transform
        self.is_class = artefact.target.kind is TargetKind.CLASS
        self.num_components = artefact.posterior.num_components(num_draws)
        self._likelihood = artefact.likelihood
        template = artefact.network().to(self.device).requires_grad_(False)
        few = Chunk.of(next(artefact.posterior.draw(num_draws, chunk_size=2)), artefact.layout, self.device)
        executor, _ = choose_executor(
            template,
            Stack(few.draws.flat, few.draws.buffers, artefact.layout),
            torch.zeros(2, *self.inputs.shape, dtype=self.dtype, device=self.device),
            "auto",
        )
        self._network = StackedNetwork(template, executor)
        size = 1 if executor == "loop" else DRAWS_AT_A_TIME
        with torch.no_grad():
            self._chunks = [
                Chunk.of(draws, artefact.layout, self.device)
                for draws in artefact.posterior.draw(num_draws, chunk_size=size)
            ]

    def forward(self, x: Tensor) -> Tensor:
        """`log_probs` of classes, `mean` of numbers."""
        return self.log_probs(x) if self.is_class else self.mean(x)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Images with pixel values in [0, 1], `[B, C, H, W]`, as the network sees them; differentiable."""
        pixels = pixels.to(self.device, self.dtype)
        mean = torch.tensor(self.inputs.pixel_mean, dtype=self.dtype, device=self.device)[:, None, None]
        std = torch.tensor(self.inputs.pixel_std, dtype=self.dtype, device=self.device)[:, None, None]
        return (pixels - mean) / std

    def log_probs(self, x: Tensor) -> Tensor:
        """log Σ_c w_c p_c(k), `[B, K]`: the logarithm of the averaged probabilities.

        Raises:
            TypeError: the target is a number.
        """
        return self._class_parts(x)[0]

    def mutual_information(self, x: Tensor) -> Tensor:
        """Entropy of the mixture minus the components' expected entropy, `[B]` nats, at least 0.

        Raises:
            TypeError: the target is a number.
        """
        log_probs_BK, expected_B = self._class_parts(x)
        return (_entropy(log_probs_BK) - expected_B).clamp(min=0)

    def mean(self, x: Tensor) -> Tensor:
        """Σ_c w_c E_c, `[B]`, in the target's units.

        Raises:
            TypeError: the target is a class.
        """
        return self._moments(x).mean * self.target.scale + self.target.loc

    def variance(self, x: Tensor) -> Tensor:
        """Σ_c w_c Var_c + Var_c(E_c), `[B]`, in squared units of the target.

        Raises:
            TypeError: the target is a class.
        """
        return self._moments(x).total * self.target.scale**2

    def epistemic(self, x: Tensor) -> Tensor:
        """What the components disagree about, `[B]`: mutual information of classes in nats, the standard deviation of
        the components' means of numbers in the target's units. Its gradient is 0 where it is 0."""
        if self.is_class:
            return self.mutual_information(x)
        variance_B = self._moments(x).epistemic
        is_some = variance_B > 0
        std_B = torch.where(is_some, variance_B, torch.ones_like(variance_B)).sqrt()
        return torch.where(is_some, std_B, torch.zeros_like(std_B)) * self.target.scale

    def _class_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities `[B, K]` of the mixture and the expected entropy `[B]` of its components."""
        if not self.is_class:
            raise TypeError(
                f"The target '{self.target.name}' is a number, it has no class probabilities: use mean, variance."
            )
        log_joint, expected = zip(*self._over_chunks(x), strict=True)
        return torch.logsumexp(torch.stack(log_joint), dim=0), torch.stack(expected).sum(0)

    def _moments(self, x: Tensor) -> NumberStats:
        if self.is_class:
            raise TypeError(
                f"The target '{self.target.name}' is a class, it has no mean: use log_probs, mutual_information."
            )
        parts = []
        for chunk, (mean, sum_sq_dev, variance) in zip(self._chunks, self._over_chunks(x), strict=True):
            weight = float(chunk.draws.log_weights.exp().sum())
            parts.append(NumberStats(weight, mean, sum_sq_dev, variance, torch.full_like(mean, -torch.inf)))
        return functools.reduce(NumberStats.merge, parts)

    def _over_chunks(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        if x.shape[1:] != self.inputs.shape:
            raise ValueError(f"x must be [B, *{list(self.inputs.shape)}], got {list(x.shape)}.")
        x = x.to(self.device, self.dtype)
        if len(self._chunks) == 1 or not (torch.is_grad_enabled() and x.requires_grad):
            return [self._sums(chunk, x) for chunk in self._chunks]
        again = functools.partial(checkpoint, self._sums, use_reentrant=False, preserve_rng_state=False)
        return [again(chunk, x) for chunk in self._chunks]

    def _sums(self, chunk: Chunk, x: Tensor) -> tuple[Tensor, ...]:
        """What the components of one chunk add, `[B, ...]` each."""
        outputs = chunk.outputs(
            lambda params: self._network(params, chunk.draws.buffers, x, train=False, shared=True)[0]
        )
        components = self._likelihood.distribution(outputs, chunk.params)
        log_weights = chunk.draws.log_weights
        if self.is_class:
            log_probs_CBK = class_log_probs(components).double()
            log_joint_BK = torch.logsumexp(log_probs_CBK + log_weights[:, None, None], dim=0)
            return log_joint_BK, log_weights.exp() @ _entropy(log_probs_CBK)
        stats = stats_of(components, log_weights, None)
        assert isinstance(stats, NumberStats)
        return stats.mean, stats.sum_sq_dev, stats.expected_variance


def _entropy(log_probs: Tensor) -> Tensor:
    """−Σ p log p over the last axis; the clamp makes 0 log 0 = 0, with a gradient of 0."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)

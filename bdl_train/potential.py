"""The potential of a stack: the one place where data, likelihood and prior meet, and where N scales them.

Shape letters: M members, P parameters of one member, B batch, O outputs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bdl_train.likelihoods import PREFIX, Likelihood
from bdl_train.priors import BoundGaussian, BoundPrior, Prior, join
from bdl_train.stack import Layout, StackedNetwork

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One step's examples.

    Attributes:
        x: `[M, B, ...]`, or `[B, ...]` when `shared`.
        y: `[M, B]`, or `[B]` when `shared`.
        index: Which training examples these are, `[M, B]` (or `[B]`), positions in the training part, or
            in the member's own rows if it sees a part of it only.
        shared: Every member sees the same examples.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    shared: bool = False


@dataclass(frozen=True)
class Potential:
    """potential(θ) = −(1/B) Σ_batch log p(y|x,θ) − (1/N) log p(θ), in nats per example, for each member.

    N · potential is an unbiased estimate of the negative log joint. Members are never averaged: the gradient of
    the sum over members is, member by member, the gradient each would have had alone.

    Attributes:
        network: The architecture's forward pass.
        likelihood: p(y | outputs).
        prior: Over the flat vector, the likelihood's parameters included.
        num_data: N, training examples (not augmented views).
        layout: Of the flat vector.
        compile: Run the gradient of the likelihood under torch.compile.
        reduce: Means over a batch whose rows lie on several processes, from (nll `[M]`, grad `[M, P]`, rows here).
    """

    network: StackedNetwork
    likelihood: Likelihood
    prior: BoundPrior
    num_data: int
    layout: Layout
    compile: bool = False
    reduce: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None

    def __call__(
        self, flat: Tensor, buffers: Mapping[str, Tensor], batch: Batch, *, train: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The potential `[M]` of parameters `flat` `[M, P]`, and the buffers after the pass."""
        log_lik_MB, new_buffers = self.log_likelihood(flat, buffers, batch, train=train)
        return -log_lik_MB.mean(-1) - self.prior.log_prob(flat) / self.num_data, new_buffers

    def log_likelihood(
        self, flat: Tensor, buffers: Mapping[str, Tensor], batch: Batch, *, train: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(y|x,θ) of every example, `[M, B]` in nats, and the buffers after the pass."""
        params = self.layout.unflatten(flat)
        outputs, new_buffers = self.network(params, buffers, batch.x, train=train, shared=batch.shared)
        y = batch.y.expand(outputs.shape[:-1]) if batch.shared else batch.y
        return self.likelihood.log_prob(outputs, y, params), new_buffers

    def value_and_grad(self, flat: Tensor, buffers: Mapping[str, Tensor], batch: Batch) -> "Gradient":
        """The potential and its gradient at `flat` `[M, P]`, in train mode."""
        nll_M, grad_MP, new_buffers = self._nll_and_grad(flat, buffers, batch)
        if self.reduce is not None:
            nll_M, grad_MP = self.reduce(nll_M, grad_MP, batch.y.shape[-1])
        log_prior_M, prior_grad_MP = self.prior.log_prob_and_grad(flat)
        return Gradient(
            nll_M - log_prior_M / self.num_data,
            nll_M,
            grad_MP.sub_(prior_grad_MP, alpha=1 / self.num_data),
            {name: buffer.detach() for name, buffer in new_buffers.items()},
        )

    @cached_property
    def _nll_and_grad(self) -> "NllAndGrad":
        if not self.compile:
            return self.nll_and_grad
        return compiled_or_eager(self.traceable_nll_and_grad, self.nll_and_grad, self.network)

    def nll_and_grad(
        self, flat: Tensor, buffers: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Mean negative log likelihood `[M]`, its gradient `[M, P]`, and the buffers after the pass in train mode."""
        leaf = flat.detach().requires_grad_(True)
        log_lik_MB, new_buffers = self.log_likelihood(leaf, buffers, batch, train=True)
        nll_M = -log_lik_MB.mean(-1)
        (grad_MP,) = torch.autograd.grad(nll_M.sum(), leaf)
        return nll_M.detach(), grad_MP, new_buffers

    def traceable_nll_and_grad(
        self, flat: Tensor, buffers: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same as one graph for a compiler; without one, torch.func is the slower of the two."""

        def total(leaf: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            log_lik_MB, new_buffers = self.log_likelihood(leaf, buffers, batch, train=True)
            nll_M = -log_lik_MB.mean(-1)
            return nll_M.sum(), (nll_M, new_buffers)

        grad_MP, (_, (nll_M, new_buffers)) = torch.func.grad_and_value(total, has_aux=True)(flat)
        return nll_M, grad_MP, new_buffers

    def traceable_value_and_grad(
        self, flat: Tensor, buffers: Mapping[str, Tensor], batch: Batch
    ) -> "Gradient":
        """The same as `value_and_grad` as one graph for a compiler."""

        def total(leaf: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Tensor]]]:
            log_lik_MB, new_buffers = self.log_likelihood(leaf, buffers, batch, train=True)
            nll_M = -log_lik_MB.mean(-1)
            value_M = nll_M - self.prior.log_prob(leaf) / self.num_data
            return value_M.sum(), (value_M, nll_M, new_buffers)

        grad_MP, (_, (value_M, nll_M, new_buffers)) = torch.func.grad_and_value(total, has_aux=True)(flat)
        return Gradient(value_M, nll_M, grad_MP, new_buffers)


NllAndGrad = Callable[[Tensor, Mapping[str, Tensor], Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


def compiled_or_eager(
    traceable: Callable[..., T], eager: Callable[..., T], network: StackedNetwork
) -> Callable[..., T]:
    """A step under torch.compile; where torch cannot compile it, the eager one, and the log says why.

    A graph is compiled at the first call and for each new shape of a batch.

    Args:
        traceable: What to compile, as one graph.
        eager: The same function, for where that fails.
        network: What both of them run, in train mode.
    """
    # One process trains one stack at a time; graphs of the stack before would count against torch's limit.
    torch.compiler.reset()

    def step(*args: Any) -> T:
        return traceable(*args)

    # What a step closes over never changes, so that a graph is chosen by the tensors' shapes alone (guards on all the
    # rest are 7 % of a short step). Graphs are kept by code object: with one of its own, no step takes another's.
    step.__code__ = step.__code__.replace()
    options: dict[str, str | int | bool | Callable[..., Any]] = {"guard_filter_fn": _of_tensors}
    run: Callable[..., T] = torch.compile(step, fullgraph=True, dynamic=False, options=options)

    def call(*args: Any) -> T:
        nonlocal run
        if not network.template.training:
            network.template.train()
        try:
            return run(*args)
        except Exception as error:  # dynamo, inductor and the C++ compiler each raise their own
            if run is eager:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            log.warning(
                "trainer.compile: torch cannot compile this step, it runs uncompiled: %s: %s",
                type(error).__name__,
                " ".join(lines[:2]),
            )
            run = eager
            return eager(*args)

    return call


def _of_tensors(guards: Sequence[Any]) -> list[bool]:
    """Which guards of torch.compile are kept: those of the arguments' types and shapes, and of which are the same."""
    return [guard.guard_type in ("TENSOR_MATCH", "DUPLICATE_INPUT") for guard in guards]


class Gradient(NamedTuple):
    """What one gradient evaluation gives.

    Attributes:
        potential: `[M]`, nats per example.
        nll: `[M]`, its likelihood part: mean negative log likelihood of the batch.
        grad: `[M, P]`, of the potential.
        buffers: `[M, ...]` each, after the pass.
    """

    potential: Tensor
    nll: Tensor
    grad: Tensor
    buffers: dict[str, Tensor]


def joint_prior(prior: Prior, likelihood: Likelihood, layout: Layout, members: list[int]) -> BoundPrior:
    """The prior over a whole flat vector: the configured one for weights, the likelihood's own for its parameters."""
    weights = [name for name in layout.names if not name.startswith(PREFIX)]
    bound = prior.bind(layout.select(weights), members)
    extra = likelihood.params()
    if not extra:
        return bound
    means = torch.tensor([mean for _, mean, _ in extra.values()])
    stds = torch.tensor([std for _, _, std in extra.values()])
    own = BoundGaussian(means, stds)
    return join([(bound, layout.columns(weights)), (own, layout.columns([PREFIX + name for name in extra]))])

"""Laplace's approximation: a Gaussian at the trained weights, with the curvature of the log posterior there.

Shape letters: M members, B batch, I inputs and O outputs of a layer, D parameters that the Gaussian covers,
P parameters of one member, N training examples.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Phase, Problem, Setting, StepLog
from bdl_train.inference._curvature import STRUCTURES, Pass, Structure, diagonal_of, start_of
from bdl_train.inference._descent import DescentState, descend
from bdl_train.inference._evidence import Evidence, whitened_eigenvalues
from bdl_train.inference._fisher import fisher_root
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.kronecker_gaussian import KroneckerBlock, KroneckerGaussian, block_columns
from bdl_train.potential import Batch
from bdl_train.priors import BoundGaussian, BoundPrior
from bdl_train.stack import where_members

log = logging.getLogger(__name__)


class LaplaceState(DescentState):
    """A descent, and then the pass over the data.

    Attributes:
        means: Sums over the examples seen so far, divided by N, `[M, ...]` each; empty before the pass.
            `log_likelihood` in nats, `diagonal` `[M, P]`, and for each layer with a block `inputs:NAME` `[M, I, I]` and
            `outputs:NAME` `[M, O, O]`.
        places: The `Place` of each of these blocks.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.means: dict[str, Tensor] = {}
        self.places: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "means": self.means, "places": self.places}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.means = {name: mean.to(self.stack.flat.device) for name, mean in stored["means"].items()}
        self.places = stored["places"]

    def add(self, found: Mapping[str, Tensor], where: Tensor) -> None:
        """Add what one batch has, for some members `[M]` bool."""
        num_data = self.potential.num_data
        before = self.means or {name: torch.zeros_like(value) for name, value in found.items()}
        after = {name: before[name] + found[name] / num_data for name in found}
        self.means = where_members(where, after, before)


@dataclass(frozen=True, kw_only=True)
class Laplace(Method[LaplaceState]):
    """θ ~ N(θ*, T · (G + factor · P)⁻¹), with the generalised Gauss-Newton matrix G at the trained θ* and precision P
    of the prior.

    G is summed over all training examples in one pass, without dropout. What a structure leaves out stays at θ*, and so
    do the likelihood's own parameters (a learned noise).

    Source:
        MacKay (1992), Neural Computation 4(3); Daxberger et al. (2021), arXiv:2106.14806, for the structures and the
        last layer; Immer et al. (2021), arXiv:2008.08217, for the linearised predictive; Eschenhagen et al. (2021),
        arXiv:2111.03577, for mixtures of Laplace approximations.

    Attributes:
        patience: Epochs without a better validation NLL after which a member stops and takes back its best
            weights; null = train to `trainer.max_epochs` and keep the last.
        structure: `last_layer`: full covariance of the linear layer whose output is the network's. `kfac`: Kronecker
            factors of each linear and convolutional layer, a diagonal elsewhere. `diagonal`: of all parameters.
        prior_precision: `marginal_likelihood` multiplies the prior's precision, after training, by the factor that
            maximises the marginal likelihood of each member; `keep` leaves it as configured.
        predictive: `linearised` predicts with f(x, θ*) + J(x) (θ − θ*), `sampled` with f(x, θ). For the last layer they
            are one.
        temperature: T of the posterior ∝ exp(−N · potential / T).
        num_draws: Posterior draws a member contributes to the predictive.
    """

    patience: Annotated[int, Field(ge=1)] | None
    structure: Literal["last_layer", "kfac", "diagonal"]
    prior_precision: Literal["marginal_likelihood", "keep"]
    predictive: Literal["linearised", "sampled"]
    temperature: Annotated[FiniteFloat, Field(gt=0)]
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]

    needs_per_example_likelihood = True
    splits_batches = False

    @property
    def target_temperature(self) -> float:
        return self.temperature

    @property
    def early_stopping(self) -> int | None:
        return self.patience

    def check_prior(self, prior: BoundPrior) -> None:
        if not isinstance(prior, BoundGaussian):
            raise UsageError(
                "inference=laplace adds the precision of a Gaussian prior to the curvature of the likelihood: use "
                "prior=gaussian, or Gaussians in every entry of prior.patterns."
            )

    def phases(self, setting: Setting) -> list[Phase]:
        num_batches = -(-setting.num_data // setting.batch_size)
        return [*super().phases(setting), Phase("curvature", "once", 1, num_batches)]

    def init(self, problem: Problem) -> LaplaceState:
        return LaplaceState(problem)

    def enter(self, state: LaplaceState) -> None:
        state.means, state.places = {}, {}

    def step(self, state: LaplaceState, batch: Batch) -> StepLog:
        problem = state.problem
        if state.phase == 0:
            if state.step == 0:  # a network that does not suit is refused before it is trained
                self._structure.blocks(_pass(state, batch), _prior(state))
            return descend(state, batch, problem.schedule.factor(state.step, problem.num_steps))
        with torch.autocast(state.stack.flat.device.type, enabled=False):
            return self._measure(state, batch)

    def posterior(self, state: LaplaceState) -> list[MemberPosterior]:
        if not state.means:
            raise RuntimeError("The curvature is taken after training: this state has not seen it.")
        return [self._member(state, m) for m in range(state.stack.num_members)]

    @property
    def _structure(self) -> Structure:
        return STRUCTURES[self.structure]

    def _measure(self, state: LaplaceState, batch: Batch) -> StepLog:
        """Take in one batch's curvature."""
        potential, stack = state.potential, state.stack
        leaf = stack.flat.detach().requires_grad_(True)
        params = stack.layout.unflatten(leaf)
        with torch.enable_grad():
            outputs, _ = potential.network(params, stack.buffers, batch.x, train=False, shared=batch.shared)
            y = batch.y.expand(outputs.shape[:-1]) if batch.shared else batch.y
            log_lik_MB = potential.likelihood.log_prob(outputs, y, params)
            nll_M = -log_lik_MB.mean(-1)
            value_M = nll_M - potential.prior.log_prob(leaf) / potential.num_data
            (grad_MP,) = torch.autograd.grad(value_M.sum(), leaf)
        norm_M = torch.linalg.vector_norm(grad_MP, dim=1)

        given = replace(_pass(state, batch), root=fisher_root(potential.likelihood, outputs, params))
        blocks = self._structure.blocks(given, _prior(state))
        names = self._structure.independent(stack.layout, blocks)
        found = {
            "log_likelihood": log_lik_MB.detach().double().sum(-1),
            "diagonal": diagonal_of(given, names),
        }
        for name, (inputs, outputs) in self._structure.factors(given, blocks).items():
            found |= {f"inputs:{name}": inputs, f"outputs:{name}": outputs}

        finite = [torch.isfinite(total).reshape(stack.num_members, -1).all(1) for total in found.values()]
        healthy_M = torch.isfinite(value_M.detach() + norm_M) & torch.stack(finite).all(0) & state.active
        state.failed |= state.active & ~healthy_M
        state.active = healthy_M
        state.add(found, healthy_M)
        for name, layer in blocks.items():
            state.places[name] = asdict(self._structure.place(layer, start_of(stack.layout, name)))
        state.step += 1
        return StepLog(value_M.detach(), nll_M.detach(), norm_M)

    def _member(self, state: LaplaceState, m: int) -> KroneckerGaussian:
        flat, means, T = state.stack.flat[m], state.means, self.temperature
        layout, prior, num_data = state.stack.layout, _prior(state), state.potential.num_data
        precision_P = prior.precision.expand_as(state.stack.flat)[m]
        free = layout.columns(self._structure.independent(layout, state.places)).to(flat.device)
        curvature_D = num_data * means["diagonal"][m, free]
        columns, eigenvalues = [free], [curvature_D.double() / precision_P[free]]
        blocks: dict[str, KroneckerBlock] = {}
        for name, place in state.places.items():
            inputs = num_data * means[f"inputs:{name}"][m]
            outputs = means[f"outputs:{name}"][m]
            columns_OI = block_columns(place["start"], len(outputs), len(inputs), place["has_bias"])
            columns_OI = columns_OI.to(flat.device)
            precision_I = precision_P[columns_OI[0]]
            columns.append(columns_OI.flatten())
            of_inputs = whitened_eigenvalues(inputs, precision_I)
            of_outputs = whitened_eigenvalues(outputs, torch.ones_like(outputs[0]))
            eigenvalues.append((of_outputs[:, None] * of_inputs).flatten())
            start, has_bias = torch.tensor(place["start"]), torch.tensor(place["has_bias"])
            blocks[name] = KroneckerBlock(inputs, outputs.clone(), precision_I, start, has_bias)

        covered = torch.cat(columns)
        deviation_D = flat[covered] - prior.mean.expand_as(state.stack.flat)[m, covered]
        evidence = Evidence(
            log_likelihood=num_data * float(means["log_likelihood"][m]),
            eigenvalues=torch.cat(eigenvalues),
            quadratic=float((deviation_D.square() * precision_P[covered]).double().sum()),
            temperature=T,
        )
        factor = evidence.best_factor() if self.prior_precision == "marginal_likelihood" else 1.0
        log_z = evidence.log_marginal(factor)
        log.info("Prior precision × %.3g: log marginal likelihood %.2f nats", factor, log_z)
        variance_P = torch.zeros_like(flat)
        variance_P[free] = T / (curvature_D + factor * precision_P[free])
        return KroneckerGaussian(
            mean=flat.clone(),
            variance=variance_P,
            blocks={
                name: replace(block, inputs=block.inputs / T, prior=block.prior * factor / T)
                for name, block in blocks.items()
            },
            # In the last layer the network is linear as it is.
            linearised=torch.tensor(self.predictive == "linearised" and self.structure != "last_layer"),
            buffers={name: buffer[m].clone() for name, buffer in state.stack.buffers.items()},
        )


def _pass(state: LaplaceState, batch: Batch) -> Pass:
    x = batch.x.expand(state.stack.num_members, *batch.x.shape) if batch.shared else batch.x
    return Pass(state.potential.network, state.stack, x)


def _prior(state: LaplaceState) -> BoundGaussian:
    prior = state.potential.prior
    assert isinstance(prior, BoundGaussian)
    return prior

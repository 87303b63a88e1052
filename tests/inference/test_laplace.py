"""Laplace's approximation against exact posteriors, brute-force curvature, and exact marginal likelihoods.

Shape letters: N examples, B batch, I inputs and O outputs of a layer, P parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_gaussian import NOISE_STD, PRIOR_STD, LinearGaussian
from tiny_problems import KNOWN_NOISE, LEARNED_NOISE, Example, Work, example, work
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bdl_train.errors import UsageError
from bdl_train.inference import _ggn
from bdl_train.inference import laplace as laplace_module
from bdl_train.inference._evidence import LARGEST_FACTOR, Evidence
from bdl_train.inference._fisher import fisher_root
from bdl_train.inference.laplace import Laplace, LaplaceState
from bdl_train.likelihoods import PREFIX, Likelihood
from bdl_train.likelihoods.bernoulli import Bernoulli
from bdl_train.likelihoods.categorical import Categorical
from bdl_train.likelihoods.heteroscedastic_gaussian import HeteroscedasticGaussian
from bdl_train.likelihoods.poisson import Poisson
from bdl_train.likelihoods.student_t import StudentT
from bdl_train.models.mlp import Mlp
from bdl_train.posteriors.kronecker_gaussian import KroneckerGaussian, block_columns
from bdl_train.priors import BoundGaussian
from bdl_train.priors.gaussian import Gaussian
from bdl_train.priors.laplace import Laplace as LaplacePrior
from bdl_train.specs import InputSpec

HETEROSCEDASTIC = HeteroscedasticGaussian(min_std=0.05)
STUDENT_T = StudentT(df=4.0, scale=0.3, learn_scale=True, log_scale_prior_std=1.0)
STRUCTURES = ("last_layer", "kfac", "diagonal")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def laplace(structure: str = "last_layer", **changed: Any) -> Laplace:
    settings: dict[str, Any] = {
        "patience": None,
        "prior_precision": "keep",
        "predictive": "linearised",
        "temperature": 1.0,
        "num_draws": 3,
    }
    return Laplace(structure=structure, **{**settings, **changed})  # pyright: ignore[reportArgumentType]


def measured(the_work: Work, method: Laplace) -> LaplaceState:
    """The state after the pass over the data alone, at the weights that the stack has."""
    state = method.init(the_work.problem)
    state.phase, state.step = 1, 0
    method.enter(state)
    the_work.advance(method, state)
    return state


def posteriors(the_work: Work, method: Laplace) -> list[KroneckerGaussian]:
    found = method.posterior(measured(the_work, method))
    return [one for one in found if isinstance(one, KroneckerGaussian)]


def covariance_of(posterior: KroneckerGaussian) -> Tensor:
    """Dense, `[P, P]`, by the inverse of the precision."""
    dense = posterior.variance.diag()
    for one in posterior.blocks.values():
        eye = torch.eye(len(one.outputs), dtype=dense.dtype)
        precision = torch.kron(one.outputs, one.inputs) + torch.kron(eye, one.prior.diag())
        place = block_columns(int(one.start), len(one.outputs), len(one.inputs), bool(one.has_bias))
        dense[place.flatten()[:, None], place.flatten()] = torch.linalg.inv(precision)
    return dense


def dense_of(posterior: KroneckerGaussian, name: str) -> tuple[Tensor, Tensor]:
    """The curvature of one block without its prior, `[D, D]`, and where its rows lie in the flat vector."""
    one = posterior.blocks[name]
    place = block_columns(int(one.start), len(one.outputs), len(one.inputs), bool(one.has_bias))
    return torch.kron(one.outputs, one.inputs), place.flatten()


# --- the Fisher information ----------------------------------------------------------------------------------------


def outputs_for(size: int) -> Tensor:
    return torch.randn(5, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def negative_hessian(
    likelihood: Likelihood, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]
) -> Tensor:
    """−∂² log p(y | f) / ∂f² of every row, `[B, O, O]`."""

    def one(f: Tensor, y_one: Tensor) -> Tensor:
        return -likelihood.log_prob(f[None], y_one[None], params)[0]

    # Twice backwards: torch's rules of forward derivatives warn when they are loaded.
    hessian: Any = torch.vmap(torch.func.jacrev(torch.func.jacrev(one)))
    return hessian(outputs, y)


@pytest.mark.parametrize(
    ("likelihood", "size", "y"),
    [
        (KNOWN_NOISE, 1, torch.linspace(-1, 1, 5)),
        (LEARNED_NOISE, 1, torch.linspace(-1, 1, 5)),
        (Bernoulli(), 1, torch.tensor([0, 1, 1, 0, 1])),
        (Poisson(), 1, torch.tensor([0, 3, 1, 2, 5])),
        (Categorical(), 4, torch.tensor([0, 3, 1, 2, 1])),
    ],
    ids=["gaussian", "learned noise", "bernoulli", "poisson", "categorical"],
)
def test_the_fisher_information_is_the_hessian_where_that_does_not_depend_on_y(
    likelihood: Likelihood, size: int, y: Tensor
):
    params = {f"{PREFIX}log_noise_std": torch.tensor(-0.4).double()} if likelihood.params() else {}
    outputs = outputs_for(size)
    root = fisher_root(likelihood, outputs, params)
    expected = negative_hessian(likelihood, outputs, y.double() if y.is_floating_point() else y, params)
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "size"), [(HETEROSCEDASTIC, 2), (STUDENT_T, 1)], ids=["heteroscedastic", "student_t"]
)
def test_otherwise_it_is_the_mean_of_the_hessian_over_y(likelihood: Likelihood, size: int):
    params = {f"{PREFIX}log_scale": torch.tensor(-0.4).double()} if likelihood.params() else {}
    outputs = outputs_for(size)[:2]
    root = fisher_root(likelihood, outputs, params)
    components = likelihood.distribution(outputs, params)
    # The integral over y in t = tan(u): heavy tails end at ±π/2. The midpoint rule of a smooth periodic function.
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 * math.pi - math.pi / 2
    y = components.mean + components.stddev * u.tan()[:, None]
    jacobian = components.stddev / u.cos().square()[:, None] * (math.pi / 2000)
    weights = components.log_prob(y).exp() * jacobian
    torch.testing.assert_close(weights.sum(0), torch.ones(2).double(), rtol=1e-6, atol=0)
    many = outputs.expand(len(y), *outputs.shape).flatten(0, 1)
    hessians = negative_hessian(likelihood, many, y.flatten(), params).unflatten(0, y.shape)
    expected = (weights[..., None, None] * hessians).sum(0)
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-4, atol=1e-6)


# --- a linear model with Gaussian noise: the exact posterior ----------------------------------

LINEAR = LinearGaussian.make()
# The prior's standard deviation of 0.7 is a float32 on its way into the problem: 2e-8 of it.


def at_the_mode(**settings: Any) -> Work:
    """The linear model's problem with every member at the exact posterior mean."""
    the_work = LINEAR.work(range(2), **settings)
    the_work.problem.stack.flat[:] = LINEAR.mean
    return the_work


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("structure", ["last_layer", "kfac"])
def test_the_covariance_of_a_linear_model_is_the_exact_one(structure: str, temperature: float):
    for posterior in posteriors(at_the_mode(), laplace(structure, temperature=temperature)):
        assert torch.equal(posterior.mean, LINEAR.mean)
        torch.testing.assert_close(
            covariance_of(posterior), LINEAR.covariance(temperature), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_diagonal_keeps_the_diagonal_of_the_precision_not_of_the_covariance(temperature: float):
    posterior = posteriors(at_the_mode(), laplace("diagonal", temperature=temperature))[0]
    expected = temperature / LINEAR.precision.diag()
    torch.testing.assert_close(posterior.variance, expected, rtol=1e-8, atol=0)
    assert (posterior.variance < 0.9 * LINEAR.covariance(temperature).diag())[:3].all()


def test_training_then_the_pass_is_the_exact_posterior():
    """Full-batch descent reaches the mode, whatever the start: the whole method, in its two phases."""
    the_work = LINEAR.work(
        range(2), batch_size=40, num_epochs=400, optimizer={"_target_": "torch.optim.SGD", "lr": 0.05}
    )
    method = laplace()
    state = method.init(the_work.problem)
    logs = the_work.advance(method, state)
    assert len(logs) == 401
    for posterior in method.posterior(state):
        assert isinstance(posterior, KroneckerGaussian)
        torch.testing.assert_close(posterior.mean, LINEAR.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(covariance_of(posterior), LINEAR.covariance(), rtol=1e-7, atol=1e-9)


def log_evidence(factor: float) -> float:
    """log p(y) of the linear model, exactly, when the prior's precision is multiplied by the factor."""
    covariance = LINEAR.design @ LINEAR.design.T * PRIOR_STD**2 / factor
    noise = NOISE_STD**2 * torch.eye(len(LINEAR.y), dtype=torch.float64)
    return float(MultivariateNormal(torch.zeros_like(LINEAR.y), covariance + noise).log_prob(LINEAR.y))


def evidence_of(structure: str, temperature: float = 1.0) -> Evidence:
    """What the method looks at, caught on its way."""
    caught: list[Evidence] = []
    with pytest.MonkeyPatch.context() as patch:
        keep = Evidence.log_marginal
        patch.setattr(
            Evidence, "log_marginal", lambda self, factor: caught.append(self) or keep(self, factor)
        )
        posteriors(at_the_mode(), laplace(structure, temperature=temperature))
    return caught[0]


@pytest.mark.parametrize("structure", ["last_layer", "kfac"])
def test_the_marginal_likelihood_at_the_mode_is_the_exact_one(structure: str):
    assert evidence_of(structure).log_marginal(1.0) == pytest.approx(log_evidence(1.0), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_tuned_precision_is_the_best_of_a_fine_grid(structure: str, temperature: float):
    precision = LINEAR.precision - torch.eye(4).double() / PRIOR_STD**2
    ggn = precision.diag().diag() if structure == "diagonal" else precision
    log_lik = -((LINEAR.y - LINEAR.design @ LINEAR.mean) / NOISE_STD).square().sum() / 2
    log_lik -= len(LINEAR.y) * math.log(NOISE_STD * math.sqrt(2 * math.pi))

    def by_hand(factor: Tensor) -> Tensor:
        """∫ (p(y | θ) N(θ; 0, 1/prior))^(1/T), the prior's power normalised, with a dense determinant."""
        prior = factor / PRIOR_STD**2 / temperature
        fit = log_lik / temperature - prior * LINEAR.mean.square().sum() / 2
        dense = ggn / temperature + prior * torch.eye(4).double()
        return fit + 2 * prior.log() - torch.linalg.slogdet(dense).logabsdet / 2

    grid = torch.linspace(math.log(1e-3), math.log(1e3), 20_001, dtype=torch.float64).exp()
    values = torch.stack([by_hand(factor) for factor in grid[::20]])
    evidence = evidence_of(structure, temperature)
    assert evidence.log_marginal(0.3) == pytest.approx(float(by_hand(torch.tensor(0.3).double())), rel=1e-9)
    coarse = int(values.argmax()) * 20
    around = grid[max(0, coarse - 20) : coarse + 21]
    best = around[torch.stack([by_hand(factor) for factor in around]).argmax()]
    assert evidence.best_factor() == pytest.approx(float(best), rel=2e-3)


def test_the_factor_multiplies_the_prior_of_each_member():
    the_work = at_the_mode()
    the_work.problem.stack.flat[1] *= 3  # larger weights: a wider prior explains them
    plain = posteriors(the_work, laplace())
    tuned = posteriors(the_work, laplace(prior_precision="marginal_likelihood"))
    factors = [t.blocks["0"].prior / p.blocks["0"].prior for p, t in zip(plain, tuned, strict=True)]
    for factor in factors:
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    assert 0.05 < float(factors[1][0]) < 0.5 * float(factors[0][0])
    assert torch.equal(plain[0].blocks["0"].inputs, tuned[0].blocks["0"].inputs)


def test_a_factor_beyond_all_bounds_is_held_at_them():
    nothing = torch.zeros(3, dtype=torch.float64)
    assert Evidence(0.0, nothing, 1.0, 1.0).best_factor() == pytest.approx(1 / LARGEST_FACTOR)
    assert Evidence(0.0, nothing + 1, 0.0, 1.0).best_factor() == pytest.approx(LARGEST_FACTOR)


# --- the curvature of networks, by brute force ----------------------------------------------------------------------


def jacobians(the_work: Work, m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[B, O]` of one member and their Jacobian `[B, O, P]` in its flat weights, by torch."""
    stack, network = the_work.problem.stack, the_work.problem.potential.network
    network.template.eval()

    def outputs(flat: Tensor) -> Tensor:
        own = {n: w for n, w in stack.layout.unflatten(flat).items() if not n.startswith(PREFIX)}
        buffers = {n: b[m] for n, b in stack.buffers.items()}
        return torch.func.functional_call(network.template, {**own, **buffers}, (x,))

    return outputs(stack.flat[m]), torch.func.jacrev(outputs)(stack.flat[m])  # pyright: ignore[reportReturnType]


def full_ggn(the_work: Work, m: int) -> Tensor:
    """Σ_n Jᵀ Λ J over all examples, `[P, P]`, with the Hessian Λ of the likelihood by torch."""
    of = the_work.example
    outputs, jacobian = jacobians(the_work, m, of.x)
    params = {n: w[m] for n, w in the_work.problem.stack.params.items() if n.startswith(PREFIX)}
    hessian = negative_hessian(of.likelihood, outputs, of.y, params)
    return torch.einsum("bop,boq,bqr->pr", jacobian, hessian, jacobian)


def linear_classes(num_outputs: int) -> Example:
    """Logistic or softmax regression."""
    spec = InputSpec((3,))
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    likelihood = Bernoulli() if num_outputs == 1 else Categorical()
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long() * (num_outputs > 1)
    return Example(
        spec,
        x,
        y,
        likelihood,
        lambda: Mlp(hidden=[], activation="tanh", dropout=0.0).network(spec, num_outputs),
    )


@pytest.mark.parametrize("num_outputs", [1, 3], ids=["logistic", "softmax"])
def test_of_a_linear_classifier_the_matrix_is_the_hessian_of_the_potential(num_outputs: int):
    the_work = work(linear_classes(num_outputs), [0, 1], prior=Gaussian(scale=0.8, fan_in=False))
    problem = the_work.problem
    for m, posterior in enumerate(posteriors(the_work, laplace())):

        def total(flat: Tensor, m: int = m) -> Tensor:
            stacked = problem.stack.flat.clone()
            stacked = torch.cat([stacked[:m], flat[None], stacked[m + 1 :]])
            return problem.potential(stacked, {}, the_work.all_rows(), train=False)[0][m] * 30

        hessian = torch.autograd.functional.hessian(total, problem.stack.flat[m].clone())
        assert isinstance(hessian, Tensor)
        torch.testing.assert_close(torch.linalg.inv(covariance_of(posterior)), hessian, rtol=1e-8, atol=1e-9)


def test_of_a_softmax_layer_the_factors_are_sums_over_inputs_and_over_probabilities():
    the_work = work(linear_classes(3), [0])
    (posterior,) = posteriors(the_work, laplace("kfac"))
    found, _ = dense_of(posterior, "0")
    outputs, _ = jacobians(the_work, 0, the_work.example.x)
    rows = torch.cat([the_work.example.x, torch.ones(30, 1).double()], dim=1)
    probs = outputs.softmax(-1)
    output_factor = probs.sum(0).diag() - probs.T @ probs
    torch.testing.assert_close(found, torch.kron(output_factor, rows.T @ rows) / 30, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("network", ["mlp", "mlp-dropout", "conv-group-norm", "ft_transformer"])
def test_the_last_layer_is_that_block_of_the_whole_matrix(network: str, executor: Any):
    the_work = work(example(network), [0, 1], executor=executor)
    for m, posterior in enumerate(posteriors(the_work, laplace())):
        ((name, block),) = posterior.blocks.items()
        found, place = dense_of(posterior, name)
        last = [n for n in the_work.problem.stack.layout.names if not n.startswith(PREFIX)][-2:]
        assert [f"{name}.weight", f"{name}.bias"] == last
        assert place.tolist() == the_work.problem.stack.layout.columns(last).tolist()
        torch.testing.assert_close(found, full_ggn(the_work, m)[place][:, place], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(block.prior, torch.full_like(block.prior, 4.0))
        assert posterior.centre is None  # linear as it is
        outside = torch.ones(posterior.num_params, dtype=torch.bool)
        outside[place] = False
        assert (posterior.moments()[1][outside] == 0).all()


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("network", ["mlp", "mlp-dropout", "conv-group-norm", "ft_transformer"])
def test_the_diagonal_is_that_of_the_whole_matrix(
    network: str, executor: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_ggn, "PER_EXAMPLE_BYTES", 20_000)  # a few examples at a time
    the_work = work(example(network), [0, 1], executor=executor)
    layout = the_work.problem.stack.layout
    own = layout.columns([n for n in layout.names if not n.startswith(PREFIX)])
    for m, posterior in enumerate(posteriors(the_work, laplace("diagonal"))):
        expected = 1 / (full_ggn(the_work, m).diag()[own] + 4.0)
        torch.testing.assert_close(posterior.variance[own], expected, rtol=1e-9, atol=0)
        assert posterior.variance.count_nonzero() == len(own)  # a learned noise stays at its mode


def test_every_layers_factors_are_sums_over_examples_and_outputs():
    the_work = work(example("mlp-dropout"), [0, 1])
    of, stack = the_work.example, the_work.problem.stack
    for m, posterior in enumerate(posteriors(the_work, laplace("kfac"))):
        # The Jacobian in a layer's bias is that in its pre-activation.
        outputs, jacobian = jacobians(the_work, m, of.x)
        params = {n: w[m] for n, w in stack.params.items() if n.startswith(PREFIX)}
        hessian = negative_hessian(of.likelihood, outputs, of.y, params)
        template, given = the_work.problem.potential.network.template, of.x
        assert isinstance(template, nn.Sequential)
        own = {n: w[m] for n, w in stack.params.items()}
        for name, module in template.named_children():
            if isinstance(module, nn.Linear):
                to_outputs = jacobian[..., stack.layout.columns([f"{name}.bias"])]
                expected_B = torch.einsum("bpo,bpq,bqr->or", to_outputs, hessian, to_outputs)
                rows = torch.cat([given, torch.ones(len(given), 1).double()], dim=1)
                expected = torch.kron(expected_B, rows.T @ rows) / len(given)
                torch.testing.assert_close(dense_of(posterior, name)[0], expected, rtol=1e-8, atol=1e-10)
                given = given @ own[f"{name}.weight"].T + own[f"{name}.bias"]
            else:
                given = module(given)
        assert posterior.centre is not None


def test_a_convolution_is_summed_over_positions():
    the_work = work(example("conv-group-norm"), [0])
    of, stack = the_work.example, the_work.problem.stack
    (posterior,) = posteriors(the_work, laplace("kfac"))
    first = next(iter(posterior.blocks))
    template = the_work.problem.potential.network.template.eval()
    rest = {n: w[0] for n, w in stack.params.items()}

    def outputs(shift: Tensor) -> Tensor:
        """Of the network, when numbers are added to the first convolution's output."""

        def add(_module: nn.Module, _given: Any, out: Any) -> Any:
            return out + shift

        hook = template.get_submodule(first).register_forward_hook(add)
        try:
            return torch.func.functional_call(template, rest, (of.x,))
        finally:
            hook.remove()

    zero = torch.zeros(len(of.x), 3, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(outputs, zero)
    assert isinstance(jacobian, Tensor)
    own = torch.stack([jacobian[b, :, b] for b in range(len(of.x))]).flatten(3)  # [B, O, channels, positions]
    hessian = negative_hessian(of.likelihood, outputs(zero), of.y, {})
    expected_B = torch.einsum("boct,bop,bpdt->cd", own, hessian, own)
    expected_A = torch.zeros(18, 18, dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            patch = of.x[:, :, row : row + 3, column : column + 3].flatten(1)
            expected_A += patch.T @ patch / 16
    torch.testing.assert_close(
        dense_of(posterior, first)[0],
        torch.kron(expected_B, expected_A) / len(of.x),
        rtol=1e-8,
        atol=1e-10,
    )
    # The norms have no Kronecker form: theirs is the diagonal.
    names = [
        n
        for n in stack.layout.names
        if n.removesuffix(".weight").removesuffix(".bias") not in posterior.blocks
    ]
    norms = stack.layout.columns(names)
    expected = 1 / (full_ggn(the_work, 0).diag()[norms] + 4.0)
    torch.testing.assert_close(posterior.variance[norms], expected, rtol=1e-9, atol=0)
    assert posterior.variance.count_nonzero() == len(norms) == 14


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_do_not_change_the_curvature(structure: str):
    one, other = (
        posteriors(work(example("mlp"), [0], batch_size=size), laplace(structure))[0].tensors()
        for size in (26, 7)
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rows_that_all_members_share_are_the_rows_of_each(structure: str):
    the_work, method = work(example("mlp"), [0, 1], batch_size=26), laplace(structure)
    expected = [one.tensors() for one in posteriors(the_work, method)]
    state = method.init(the_work.problem)
    state.phase = 1
    method.step(state, the_work.all_rows())
    for one, other in zip(method.posterior(state), expected, strict=True):
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_mean_of_the_prior_moves_the_evidence_not_the_curvature(structure: str):
    """The quadratic form is about the prior's mean, over the parameters that the Gaussian covers."""

    def with_mean(shift: float) -> Work:
        the_work = work(example("mlp"), [0])
        potential = the_work.problem.potential
        assert isinstance(potential.prior, BoundGaussian)
        prior = potential.prior.recentred(potential.prior.mean + shift)
        return replace(the_work, problem=replace(the_work.problem, potential=replace(potential, prior=prior)))

    far, near = (
        posteriors(with_mean(s), laplace(structure, prior_precision="marginal_likelihood"))[0]
        for s in (9.0, 0.0)
    )
    # Far from the prior's mean only a wide prior explains the weights.
    assert (far.moments()[1] >= near.moments()[1]).all()
    assert float(far.moments()[1].sum()) > 1.5 * float(near.moments()[1].sum())
    assert torch.equal(far.mean, near.mean)


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_member_that_is_lost_in_the_pass_leaves_the_others_alone(structure: str):
    method = laplace(structure, prior_precision="marginal_likelihood")

    def run(lost: bool) -> tuple[LaplaceState, list[dict[str, Tensor]]]:
        the_work = work(example("mlp"), [0, 1, 2])
        state = method.init(the_work.problem)
        state.phase = 1
        the_work.advance(method, state, 2)
        if lost:
            state.stack.flat[1] = math.nan
        the_work.advance(method, state)
        return state, [one.tensors() for one in method.posterior(state)]

    (state, found), (healthy_state, healthy) = run(True), run(False)
    assert state.failed.tolist() == [False, True, False]
    assert state.active.tolist() == [True, False, True]
    assert not healthy_state.failed.any()
    for m in (0, 2):
        for name in found[m]:
            assert torch.equal(found[m][name], healthy[m][name]), name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_curvature_that_is_not_finite_loses_its_member_alone(
    structure: str, monkeypatch: pytest.MonkeyPatch
):
    def overflowing(likelihood: Likelihood, outputs: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        root = fisher_root(likelihood, outputs, params)
        return torch.cat([root[:1], root[1:] * torch.inf])

    monkeypatch.setattr(laplace_module, "fisher_root", overflowing)
    the_work, method = work(example("mlp"), [0, 1]), laplace(structure)
    state = measured(the_work, method)
    assert state.failed.tolist() == [False, True]
    healthy, lost = method.posterior(state)
    assert all(bool(t.isfinite().all()) for t in (*healthy.tensors().values(), *lost.tensors().values()))


def test_a_posterior_asked_for_before_the_pass_is_refused():
    method = laplace()
    with pytest.raises(RuntimeError, match="has not seen it"):
        method.posterior(method.init(work(example("mlp"), [0]).problem))


def test_a_prior_that_is_no_gaussian_is_refused():
    the_work = work(example("mlp"), [0], prior=LaplacePrior(scale=1.0, fan_in=False))
    with pytest.raises(UsageError, match="use prior=gaussian"):
        laplace().check_prior(the_work.problem.potential.prior)
    laplace().check_prior(work(example("mlp"), [0]).problem.potential.prior)


def first_step(the_work: Work, method: Laplace) -> None:
    the_work.advance(method, method.init(the_work.problem), 1)


class Scaled(nn.Module):
    """A network whose output is twice that of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def test_a_network_without_a_last_layer_is_refused_before_it_is_trained():
    the_work = work(replace(example("mlp"), make_network=Scaled), [0])
    before = the_work.problem.stack.flat.clone()
    with pytest.raises(UsageError, match=r"last_layer needs .* Use inference.structure=kfac or diagonal"):
        first_step(the_work, laplace())
    assert torch.equal(the_work.problem.stack.flat, before)
    # A factor behind the layer is in its gradients, as it is in the whole matrix.
    (posterior,) = posteriors(the_work, laplace("kfac"))
    found, place = dense_of(posterior, "layer")
    torch.testing.assert_close(found, full_ggn(the_work, 0)[place][:, place], rtol=1e-9, atol=1e-10)


class Tied(nn.Module):
    """One layer that runs twice, and two that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.one(self.twice(self.twice(x).tanh()))))


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_layers_that_run_twice_or_share_weights_have_a_diagonal(executor: Any):
    the_work = work(replace(example("mlp"), make_network=Tied), [0], executor=executor)
    (posterior,) = posteriors(the_work, laplace("kfac"))
    assert set(posterior.blocks) == {"head"}
    layout = the_work.problem.stack.layout
    columns = layout.columns([n for n in layout.names if not n.startswith("head")])
    expected = 1 / (full_ggn(the_work, 0).diag()[columns] + 4.0)
    torch.testing.assert_close(posterior.variance[columns], expected, rtol=1e-9, atol=0)


def test_a_layer_too_wide_to_decompose_is_refused(monkeypatch: pytest.MonkeyPatch):
    from bdl_train.inference import _curvature

    monkeypatch.setattr(_curvature, "WIDEST", 6)
    with pytest.raises(UsageError, match=r"layer '2' .* 7 × 7, at most 6 .*structure=kfac"):
        first_step(work(example("mlp"), [0]), laplace())
    with pytest.raises(UsageError, match=r"layer '2' .* 7 × 7, at most 6 .*structure=diagonal"):
        first_step(work(example("mlp"), [0]), laplace("kfac"))
    first_step(work(example("mlp"), [0]), laplace("diagonal"))


def test_kronecker_factors_refuse_a_prior_that_varies_over_the_outputs():
    the_work = work(example("mlp"), [0])
    potential = the_work.problem.potential
    assert isinstance(potential.prior, BoundGaussian)
    std = torch.linspace(0.5, 1, len(potential.prior.std), dtype=torch.float64)
    prior = BoundGaussian(potential.prior.mean, std)
    other = replace(the_work, problem=replace(the_work.problem, potential=replace(potential, prior=prior)))
    with pytest.raises(UsageError, match=r"'0' varies with the output: use inference.structure=diagonal"):
        first_step(other, laplace("kfac"))
    for structure in ("last_layer", "diagonal"):
        (posterior,) = posteriors(other, laplace(structure))
        precision = torch.linalg.inv(covariance_of(posterior)[-7:, -7:])
        assert isinstance(precision, Tensor)
        curvature = full_ggn(other, 0)[-7:, -7:]
        curvature = curvature if structure == "last_layer" else curvature.diag().diag()
        torch.testing.assert_close(precision, curvature + std[-7:].pow(-2).diag(), rtol=1e-8, atol=1e-9)


class Stepwise(nn.Module):
    """What `vmap` has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 1), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale) if float(x.sum().detach()) < 1e9 else x


def test_a_network_without_gradients_of_single_examples_is_refused_by_name():
    the_work = work(replace(example("mlp"), make_network=Stepwise), [0], executor="loop")
    with pytest.raises(UsageError, match=r"curvature of scale needs .*vmap.*structure=last_layer"):
        posteriors(the_work, laplace("kfac"))
    posteriors(the_work, laplace("last_layer"))

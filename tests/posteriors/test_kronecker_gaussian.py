"""Gaussians with Kronecker blocks: draws and moments against the dense covariance, storage, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_posteriors import random_stack, small_artefact, write_artefact
from torch import Tensor

from bdl_train.likelihoods import PREFIX
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.artefact import Artefact, read_artefact
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.posteriors.kronecker_gaussian import KroneckerBlock, KroneckerGaussian, block_columns
from bdl_train.predictive.differentiable import MixtureModule
from bdl_train.predictive.predict import Predictor
from bdl_train.predictive.stats import NumberStats


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def positive(size: int, seed: int, rank: int | None = None) -> Tensor:
    """A positive semi-definite matrix, of full rank unless told."""
    root = torch.randn(size, rank or size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def block(
    num_outputs: int, num_inputs: int, start: int, has_bias: bool, rank: int | None = None
) -> KroneckerBlock:
    return KroneckerBlock(
        positive(num_inputs, 1, rank),
        positive(num_outputs, 2),
        torch.linspace(0.5, 2.0, num_inputs, dtype=torch.float64),
        torch.tensor(start),
        torch.tensor(has_bias),
    )


def gaussian(linearised: bool = False) -> KroneckerGaussian:
    """11 parameters: one of its own, a layer of 2 outputs and 3 inputs with a bias, two more that are known."""
    variance = torch.zeros(11, dtype=torch.float64)
    variance[0] = 0.49
    mean = torch.linspace(-1, 1, 11, dtype=torch.float64)
    return KroneckerGaussian(
        mean, variance, {"head": block(2, 4, 1, True)}, torch.tensor(linearised), {"b": torch.ones(2)}
    )


def covariance_of(posterior: KroneckerGaussian) -> Tensor:
    """Dense, `[P, P]`: by the inverse of the precision, in the order of the flat vector."""
    dense = posterior.variance.double().diag()
    for one in posterior.blocks.values():
        eye = torch.eye(len(one.outputs), dtype=torch.float64)
        precision = torch.kron(one.outputs.double(), one.inputs.double()) + torch.kron(
            eye, one.prior.double().diag()
        )
        place = block_columns(int(one.start), len(one.outputs), len(one.inputs), bool(one.has_bias)).flatten()
        dense[place[:, None], place] = torch.linalg.inv(precision)
    return dense


def drawn(posterior: MemberPosterior, count: int, seed: int = 3) -> Tensor:
    return torch.stack([flat for flat, _ in posterior.draw(count, seed)])


def test_a_bias_lies_behind_the_weights_of_its_layer_and_is_its_last_column():
    assert block_columns(5, 2, 3, True).tolist() == [[5, 6, 9], [7, 8, 10]]
    assert block_columns(5, 2, 3, False).tolist() == [[5, 6, 7], [8, 9, 10]]
    assert block_columns(0, 1, 4, True).tolist() == block_columns(0, 1, 4, False).tolist()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("num_outputs", "has_bias"), [(1, False), (3, False), (3, True)])
def test_the_root_of_a_block_is_the_symmetric_one_of_its_dense_covariance(
    num_outputs: int, has_bias: bool, rank: int | None
):
    one = block(num_outputs, 4, 0, has_bias, rank)
    size = num_outputs * 4
    units = torch.eye(size, dtype=torch.float64).reshape(size, num_outputs, 4)
    root = torch.stack([one.deviation(unit).flatten() for unit in units])
    around = KroneckerGaussian(
        torch.zeros(size, dtype=torch.float64), torch.zeros(size).double(), {"": one}, torch.tensor(False), {}
    )
    place = one.columns.flatten()
    expected = covariance_of(around)[place[:, None], place]
    torch.testing.assert_close(root.T @ root, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.variance.flatten(), expected.diag(), rtol=1e-10, atol=1e-12)


def test_equal_eigenvalues_do_not_make_draws_arbitrary():
    # Of this matrix any basis is one of eigenvectors; a tiny change chooses another.
    one = replace(block(2, 4, 0, False), inputs=torch.eye(4).double(), prior=torch.ones(4).double())
    nudged = replace(one, inputs=one.inputs + 1e-13 * positive(4, 7))
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(one.deviation(z), nudged.deviation(z), rtol=1e-10, atol=1e-11)


def test_draws_have_the_mean_and_covariance():
    posterior, count = gaussian(), 10_000
    draws, expected = drawn(posterior, count), covariance_of(posterior)
    variance = expected.diag()
    # Five standard errors of a mean and of a covariance.
    assert ((draws.mean(0) - posterior.mean).abs() <= 5 * (variance / count).sqrt() + 1e-14).all()
    spread = (torch.outer(variance, variance) * 2 / count).sqrt()
    assert ((draws.T.cov() - expected).abs() <= 5 * spread + 1e-14).all()


def test_moments_are_those_of_the_covariance():
    mean, variance = gaussian().moments()
    assert torch.equal(mean, gaussian().mean)
    torch.testing.assert_close(variance, covariance_of(gaussian()).diag(), rtol=1e-10, atol=0)


def test_draw_i_depends_on_seed_and_i_alone_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    many = drawn(gaussian(), 9)
    assert torch.equal(drawn(gaussian(), 4), many[:4])
    assert not torch.equal(drawn(gaussian(), 4, seed=4), many[:4])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("linearised", [False, True])
def test_tensors_and_back_is_the_same_posterior(linearised: bool):
    posterior = gaussian(linearised)
    again = KroneckerGaussian.from_tensors(dict(posterior.tensors()))
    assert torch.equal(drawn(again, 5), drawn(posterior, 5))
    assert again.buffers.keys() == {"b"}
    assert (again.centre is not None) == linearised
    assert (again.num_params, again.num_atoms) == (11, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "needs the tensors mean"),
        ({"variance": torch.ones(3)}, r"mean \[11\] and variance \[3\]"),
        ({"variance": torch.full((11,), -1.0)}, "negative or NaN"),
        ({"block:prior:head": None}, "'head' needs the tensors prior"),
        ({"block:outputs:head": torch.ones(2, 3)}, "do not fit together"),
        ({"block:prior:head": torch.ones(3)}, "do not fit together"),
        ({"block:start:head": torch.tensor(4)}, "outside of the 11 parameters"),
        ({"block:prior:head": torch.tensor([1.0, 1.0, 0.0, 1.0])}, "not positive"),
    ],
)
def test_tensors_that_are_no_posterior_are_refused(changes: dict[str, Any], message: str):
    tensors = {**gaussian().tensors(), **changes}
    with pytest.raises(ValueError, match=message):
        KroneckerGaussian.from_tensors({name: t for name, t in tensors.items() if t is not None})


# --- the linearised predictive ------------------------------------------------------------------------------------

# Of the network with 3 inputs, 8 hidden units and 1 output: both layers with their biases.
SHAPES = {"0": (8, 4, 0), "2": (1, 9, 32)}


def artefact(linearised: bool, num_draws: int = 3, *, scale: float = 1.0, **settings: Any) -> Artefact:
    """Two members around random weights of a small network."""
    plain = small_artefact("gaussian", "ensemble", num_members=2, dtype="float64", **settings)
    stack = random_stack(plain.meta, 2, dtype=torch.float64)
    members = []
    for flat in stack.flat:
        blocks = {
            name: replace(block(o, i, start, True), prior=torch.full((i,), 1 / scale**2).double())
            for name, (o, i, start) in SHAPES.items()
        }
        members.append(KroneckerGaussian(flat, torch.zeros_like(flat), blocks, torch.tensor(linearised), {}))
    meta = {**plain.meta, "num_draws": num_draws}
    return replace(plain, meta=meta, posterior=EnsemblePosterior([0, 1], members, num_draws, seed=11))


def rows(count: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def jacobian(one: Artefact, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and their Jacobian in the flat weights of the first member, `[B]` and `[B, P]`."""
    network = one.network()

    def mean(flat: Tensor) -> Tensor:
        own = {name: w for name, w in one.layout.unflatten(flat).items() if not name.startswith(PREFIX)}
        return torch.func.functional_call(network, own, (x,))[:, 0]

    member = one.posterior.members[0]
    assert isinstance(member, KroneckerGaussian)
    return mean(member.mean), torch.func.jacrev(mean)(member.mean)


def number_stats(predictor: Predictor, x: Tensor) -> NumberStats:
    (tile,) = predictor(x)
    assert isinstance(tile.stats, NumberStats)
    return tile.stats


@pytest.mark.parametrize("executor", ["vmap", "loop", "auto", "measured"])
def test_a_linearised_draw_speaks_for_the_tangent_of_the_network(executor: Any):
    one, x = artefact(True), rows(6)
    alone = replace(one, posterior=one.posterior.only(0))
    at_mean, jacobian_BP = jacobian(one, x)
    member = alone.posterior.members[0]
    draws = torch.cat([draws.flat for draws in alone.posterior.draw(chunk_size=10)])
    expected = at_mean + (draws - member.moments()[0]) @ jacobian_BP.T
    stats = number_stats(Predictor(alone, executor=executor), x)
    torch.testing.assert_close(stats.mean, expected.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.epistemic, expected.var(0, correction=0), rtol=1e-8, atol=1e-12)


def test_the_linearised_predictive_has_the_variance_of_the_delta_method():
    one, x, count = artefact(True, scale=0.3), rows(4), 4000
    alone = replace(one, posterior=one.posterior.only(0))
    at_mean, jacobian_BP = jacobian(one, x)
    member = alone.posterior.members[0]
    assert isinstance(member, KroneckerGaussian)
    variance = torch.einsum("bp,pq,bq->b", jacobian_BP, covariance_of(member), jacobian_BP)
    stats = number_stats(Predictor(alone, num_draws=count), x)
    assert ((stats.mean - at_mean).abs() < 5 * (variance / count).sqrt()).all()
    torch.testing.assert_close(stats.epistemic, variance, rtol=5 * (2 / count) ** 0.5, atol=0)
    # The network itself, at the same weights, is another function.
    sampled = number_stats(
        Predictor(replace(alone, posterior=artefact(False, scale=0.3).posterior.only(0)), num_draws=200), x
    )
    linear = number_stats(Predictor(alone, num_draws=200), x)
    assert ((sampled.mean - linear.mean).abs() > 1e-3).all()


def test_members_with_and_without_a_centre_fit_into_one_chunk():
    linear, plain = artefact(True), artefact(False)
    mixed = EnsemblePosterior([0, 1], [linear.posterior.members[0], plain.posterior.members[1]], 3, seed=11)
    x = rows(5)
    joint = number_stats(Predictor(replace(linear, posterior=mixed)), x)
    first = number_stats(Predictor(replace(linear, posterior=mixed.only(0))), x)
    second = number_stats(Predictor(replace(linear, posterior=mixed.only(1))), x)
    torch.testing.assert_close(joint.mean, (first.mean + second.mean) / 2, rtol=1e-10, atol=1e-12)


def test_the_differentiable_predictive_is_the_predictors_and_its_gradient_a_finite_difference():
    one = artefact(True, num_draws=20)
    module, target = MixtureModule(one, device="cpu"), one.target
    assert len(module._chunks) > 1
    x = rows(5).requires_grad_(True)
    stats = number_stats(Predictor(one), x.detach())
    torch.testing.assert_close(module.mean(x), stats.mean * target.scale + target.loc, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.variance(x), stats.total * target.scale**2, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(module.variance(x).sum(), x)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(3, dtype=torch.float64)
        differences = [(module.variance(x + h) - module.variance(x - h)) / 2e-5 for h in steps]
    torch.testing.assert_close(gradient, torch.stack(differences, dim=1), rtol=1e-6, atol=1e-7)


def test_a_stored_posterior_predicts_bit_for_bit_the_same(tmp_path: Path):
    one = artefact(True)
    write_artefact(tmp_path, one)
    again = read_artefact(tmp_path)
    for name in ("mean", "epistemic", "total"):
        before, after = (getattr(number_stats(Predictor(a), rows(7)), name) for a in (one, again))
        assert torch.equal(before, after), name

"""Atoms, low-rank Gaussians and their mixture over members."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from small_posteriors import gaussian_around
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.atoms import Atoms
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def atoms(count: int, size: int = 4) -> Atoms:
    flat = torch.arange(count * size, dtype=torch.float64).reshape(count, size)
    return Atoms(flat, {"mean": 10 * flat[:, :2], "batches": torch.arange(count)})


def bare(posterior: Atoms) -> Atoms:
    """The same without buffers."""
    return Atoms(posterior.flat, {})


def gaussian(size: int = 5, rank: int = 4, seed: int = 0) -> LowRankGaussian:
    return gaussian_around(torch.linspace(-1, 1, size, dtype=torch.float64), {}, seed, rank)


def drawn(posterior: MemberPosterior, count: int, seed: int = 3) -> Tensor:
    return torch.stack([flat for flat, _ in posterior.draw(count, seed)])


# --- atoms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_atom_appears_exactly_once(seed: int):
    posterior = atoms(7)
    assert torch.equal(drawn(posterior, 7, seed), posterior.flat)


def test_an_atom_keeps_its_buffers():
    for k, (flat, buffers) in enumerate(atoms(5).draw(5, 0)):
        assert torch.equal(buffers["mean"], 10 * flat[:2])
        assert int(buffers["batches"]) == k


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 3, 6]), (5, [0, 2, 4, 6, 8])])
def test_fewer_draws_are_spread_evenly(count: int, expected: list[int]):
    found = [int(buffers["batches"]) for _, buffers in atoms(10).draw(count, 0)]
    assert found == expected


def test_more_draws_than_atoms_are_refused():
    with pytest.raises(ValueError, match="holds 3 atoms a member, 4 draws"):
        list(atoms(3).draw(4, 0))


def test_moments_of_atoms_are_numpys():
    posterior = Atoms(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), {})
    mean, var = posterior.moments()
    np.testing.assert_allclose(mean, posterior.flat.numpy().mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(var, posterior.flat.numpy().var(0), rtol=1e-5)


# --- Gaussians ------------------------------------------------------------------------------------------------


def covariance(posterior: LowRankGaussian) -> np.ndarray:
    """½ diag(variance) + ½ DᵀD / (K − 1), or diag(variance) without D: by numpy."""
    diagonal, d = np.diag(posterior.variance.numpy()), posterior.deviations.numpy()
    return diagonal if len(d) == 0 else diagonal / 2 + d.T @ d / (2 * (len(d) - 1))


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_draws_have_the_mean_and_covariance_of_the_paper(rank: int):
    posterior, count = gaussian(rank=rank), 10_000
    draws, expected = drawn(posterior, count), covariance(posterior)
    # Five standard errors of a mean and of a covariance.
    error = np.sqrt(np.diag(expected) / count)
    assert (np.abs(draws.mean(0).numpy() - posterior.mean.numpy()) < 5 * error).all()
    spread = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) * 2 / count)
    assert (np.abs(draws.T.cov().numpy() - expected) < 5 * spread).all()


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_moments_are_those_of_the_covariance(rank: int):
    posterior = gaussian(rank=rank)
    mean, var = posterior.moments()
    assert torch.equal(mean, posterior.mean)
    np.testing.assert_allclose(var, np.diag(covariance(posterior)), rtol=1e-12)


def test_one_low_rank_vector_serves_all_parameters():
    # Without a diagonal part every draw lies in the span of the two columns.
    d = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    posterior = LowRankGaussian(
        torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), d, {}
    )
    assert np.linalg.matrix_rank(drawn(posterior, 8).numpy(), tol=1e-10) == 2


def test_draw_i_depends_on_seed_and_i_alone():
    posterior = gaussian()
    many = drawn(posterior, 9)
    assert torch.equal(drawn(posterior, 4), many[:4])
    assert not torch.equal(drawn(posterior, 4, seed=4), many[:4])
    assert len({tuple(row.tolist()) for row in many}) == 9


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    drawn(gaussian(), 3)
    assert torch.equal(torch.get_rng_state(), state)


# --- storage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "posterior", [atoms(3), gaussian(), gaussian(rank=0)], ids=["atoms", "swag", "diagonal"]
)
def test_tensors_and_back_is_the_same_posterior(posterior: MemberPosterior):
    again = type(posterior).from_tensors(dict(posterior.tensors()))
    count = posterior.num_atoms or 5
    for (one, its), (other, others) in zip(posterior.draw(count, 0), again.draw(count, 0), strict=True):
        assert torch.equal(one, other)
        assert its.keys() == others.keys()
        assert all(torch.equal(its[name], others[name]) for name in its)
    assert (again.num_params, again.num_atoms) == (posterior.num_params, posterior.num_atoms)


@pytest.mark.parametrize(
    ("cls", "tensors", "message"),
    [
        (Atoms, {}, "need a tensor 'atoms'"),
        (Atoms, {"atoms": torch.zeros(4)}, r"of shape \[K, P\]"),
        (Atoms, {"atoms": torch.zeros(0, 4)}, "K of 1 or more"),
        (Atoms, {"atoms": torch.zeros(2, 4), "buffer:b": torch.zeros(3)}, r"'b' \[3\].* each of 2 atoms"),
        (LowRankGaussian, {"mean": torch.zeros(3)}, "needs the tensors deviations, variance"),
        (
            LowRankGaussian,
            {"mean": torch.zeros(3), "variance": torch.ones(2), "deviations": torch.ones(2, 3)},
            r"mean \[3\], variance \[2\]",
        ),
        (
            LowRankGaussian,
            {"mean": torch.zeros(3), "variance": torch.ones(3), "deviations": torch.ones(2, 2)},
            "do not fit together",
        ),
        (
            LowRankGaussian,
            {"mean": torch.zeros(3), "variance": -torch.ones(3), "deviations": torch.ones(2, 3)},
            "negative",
        ),
        (
            LowRankGaussian,
            {"mean": torch.zeros(3), "variance": torch.ones(3), "deviations": torch.ones(1, 3)},
            "single column",
        ),
    ],
)
def test_tensors_that_are_no_posterior_are_refused(
    cls: type[MemberPosterior], tensors: dict[str, Tensor], message: str
):
    with pytest.raises(ValueError, match=message):
        cls.from_tensors(tensors)


# --- the mixture ----------------------------------------------------------------------------------------------


def ensemble(*members: MemberPosterior, num_draws: int = 4) -> EnsemblePosterior:
    return EnsemblePosterior([2 * m + 1 for m in range(len(members))], members, num_draws, seed=5)


def all_draws(posterior: EnsemblePosterior, chunk_size: int, num_draws: int | None = None) -> dict[str, Any]:
    chunks = list(posterior.draw(num_draws, chunk_size=chunk_size))
    assert all(1 <= len(chunk) <= chunk_size for chunk in chunks)
    names = chunks[0].buffers
    return {
        "flat": torch.cat([chunk.flat for chunk in chunks]),
        "log_weights": torch.cat([chunk.log_weights for chunk in chunks]),
        "members": torch.cat([chunk.members for chunk in chunks]),
        **{name: torch.cat([chunk.buffers[name] for chunk in chunks]) for name in names},
    }


@pytest.mark.parametrize(
    "posterior", [ensemble(atoms(3), atoms(1), atoms(6)), ensemble(gaussian(), gaussian(seed=1))]
)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 100])
def test_any_chunk_size_gives_the_same_draws_bit_for_bit(posterior: EnsemblePosterior, chunk_size: int):
    whole, parts = all_draws(posterior, 1000), all_draws(posterior, chunk_size)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert len(whole["flat"]) == posterior.num_components()


def test_members_weigh_the_same_whatever_their_number_of_atoms():
    found = all_draws(ensemble(bare(atoms(1)), bare(atoms(5)), gaussian(size=4)), 3)
    weights = found["log_weights"].exp()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-15)
    for member in (1, 3, 5):
        assert float(weights[found["members"] == member].sum()) == pytest.approx(1 / 3, abs=1e-15)


def test_two_equal_members_draw_different_weights():
    found = all_draws(ensemble(gaussian(), gaussian()), 100)
    assert not torch.equal(found["flat"][:4], found["flat"][4:])


def test_losing_a_member_keeps_the_draws_of_the_others():
    whole = ensemble(gaussian(), gaussian(seed=1), gaussian(seed=2))
    left = dataclasses.replace(whole, ids=[1, 5], members=[whole.members[0], whole.members[2]])
    full, rest = all_draws(whole, 100), all_draws(left, 100)
    assert torch.equal(rest["flat"], full["flat"][full["members"] != 3])
    assert float(rest["log_weights"].exp().sum()) == pytest.approx(1, abs=1e-15)
    assert torch.equal(all_draws(whole.only(5), 100)["flat"], full["flat"][full["members"] == 5])


def test_atoms_are_all_used_by_default_and_distributions_as_often_as_the_method_says():
    posterior = ensemble(bare(atoms(3)), gaussian(size=4), num_draws=7)
    assert posterior.num_components() == 10
    assert posterior.num_components(2) == 4
    assert all_draws(posterior, 3, num_draws=2)["log_weights"].tolist() == [-math.log(4)] * 4


@pytest.mark.parametrize(("num_draws", "message"), [(4, "num_draws=4 .* holds 3 atoms"), (0, "got 0")])
def test_draws_that_cannot_be_made_are_refused(num_draws: int, message: str):
    with pytest.raises(UsageError, match=message):
        ensemble(atoms(3)).num_components(num_draws)
    with pytest.raises(UsageError, match=message):
        list(ensemble(atoms(3)).draw(num_draws, chunk_size=2))

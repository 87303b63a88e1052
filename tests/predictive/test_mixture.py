"""Mixtures against numerical integration, scoringrules and sums over counts, by scipy's distribution functions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import scoringrules
import torch
from scipy.integrate import quad
from torch.distributions import Distribution, Exponential, Normal, Poisson, StudentT

from bdl_train.predictive import _components
from bdl_train.predictive.mixture import Mixture

LEVELS = [1e-4, 0.025, 0.25, 0.5, 0.9, 0.975, 1 - 1e-4]
DF = 3.5


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make(family: str, loc: np.ndarray, scale: np.ndarray, weights: np.ndarray) -> tuple[Mixture, list[Any]]:
    """The mixture of one row, `[C, 1]`, and scipy's components."""
    loc_C1, scale_C1 = tensor(loc)[:, None], tensor(scale)[:, None]
    components: Distribution = (
        Normal(loc_C1, scale_C1) if family == "normal" else StudentT(tensor(DF), loc_C1, scale_C1)
    )
    frozen = [
        scipy.stats.norm(m, s) if family == "normal" else scipy.stats.t(DF, m, s)
        for m, s in zip(loc, scale, strict=True)
    ]
    return Mixture(components, tensor(np.log(weights))), frozen


def cdf_of(frozen: list[Any], weights: np.ndarray) -> Callable[[float], float]:
    return lambda v: float(sum(w * one.cdf(v) for w, one in zip(weights, frozen, strict=True)))


def crps_by_integration(
    frozen: list[Any], weights: np.ndarray, loc: np.ndarray, scale: np.ndarray, y: float
) -> float:
    """∫ (F(v) − 1{v ≥ y})² dv by ten nodes on each piece of a grid that knows every scale, far into the tails."""
    steps = np.concatenate([np.arange(0, 8, 0.5), 8 * 2.0 ** np.arange(0, 26)])
    grid = (loc[:, None] + scale[:, None] * np.concatenate([-steps, steps])).ravel()
    edges = np.unique(np.append(grid, y))
    nodes, node_weights = np.polynomial.legendre.leggauss(10)
    half = np.diff(edges)[:, None] / 2
    v = edges[:-1, None] + half * (1 + nodes)
    cdf = sum(w * one.cdf(v) for w, one in zip(weights, frozen, strict=True))
    return float((half * node_weights * (cdf - (v > y)) ** 2).sum())


CASES = {
    "one": ([0.3], [0.7], [1.0]),
    "two far": ([-1.0, 1.0], [0.2, 0.2], [0.5, 0.5]),
    "two unequal": ([0.0, 3.0], [1.0, 0.5], [0.2, 0.8]),
    "tiny and huge": ([0.5, -100.0], [1e-6, 1e6], [0.5, 0.5]),
    "a needle": ([0.5, 0.0, 0.1], [1e-3, 1.0, 2.0], [0.02, 0.48, 0.5]),
    "many": (np.linspace(-2, 2, 40) ** 3, np.linspace(0.05, 1.5, 40), np.full(40, 1 / 40)),
}


@pytest.mark.parametrize("family", ["normal", "t"])
@pytest.mark.parametrize("case", CASES)
def test_quantiles_solve_scipys_distribution_function(family: str, case: str):
    loc, scale, weights = (np.asarray(one, dtype=float) for one in CASES[case])
    mixture, frozen = make(family, loc, scale, weights)
    cdf = cdf_of(frozen, weights)
    # A level inside a gap between components has no quantile of its own.
    levels = [level for level in LEVELS if not (level == 0.5 and "far" in case)]
    found = mixture.quantile(tensor(levels))[:, 0].tolist()
    for level, v in zip(levels, found, strict=True):
        # At a needle of scale 1e-6 the last digit of v is worth 1e-10 of probability.
        digits = abs(cdf(np.nextafter(v, np.inf)) - cdf(np.nextafter(v, -np.inf)))
        assert abs(cdf(v) - level) < 1e-11 + 10 * digits
        assert float(mixture.cdf(tensor([v]))) == pytest.approx(level, abs=1e-11 + 10 * digits)


@pytest.mark.parametrize("family", ["normal", "t"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("y", [0.4, -7.0, 500.0])
def test_crps_is_the_integral_of_its_definition(family: str, case: str, y: float):
    loc, scale, weights = (np.asarray(one, dtype=float) for one in CASES[case])
    mixture, frozen = make(family, loc, scale, weights)
    expected = crps_by_integration(frozen, weights, loc, scale, y)
    if case == "two unequal":
        cdf = cdf_of(frozen, weights)
        below = quad(lambda v: cdf(v) ** 2, -np.inf, y, limit=500)[0]
        above = quad(lambda v: (1 - cdf(v)) ** 2, y, np.inf, limit=500)[0]
        assert expected == pytest.approx(below + above, rel=1e-6)
    # The score is a difference of two terms of the size of the spread.
    tolerance = 1e-7 * expected + 1e-6 * float(np.ptp(loc) + scale.max()) * (family == "t")
    assert float(mixture.crps(tensor([y]))) == pytest.approx(expected, abs=tolerance)


def test_two_members_at_minus_one_and_one_have_the_mixtures_spread_not_their_own():
    mixture, _ = make("normal", np.array([-1.0, 1.0]), np.array([0.2, 0.2]), np.array([0.5, 0.5]))
    low, high = mixture.quantile(tensor([0.16, 0.84]))[:, 0].tolist()
    assert low < -1
    assert high > 1


def test_one_gaussian_has_the_published_scores():
    y = np.linspace(-4, 9, 14)
    loc, scale = np.linspace(-1, 2, 14), np.linspace(0.1, 3, 14)
    normal = Mixture(Normal(tensor(loc)[None], tensor(scale)[None]), tensor([0.0]))
    np.testing.assert_allclose(normal.crps(tensor(y)), scoringrules.crps_normal(y, loc, scale), rtol=1e-12)
    student = Mixture(StudentT(tensor(DF), tensor(loc)[None], tensor(scale)[None]), tensor([0.0]))
    np.testing.assert_allclose(student.crps(tensor(y)), scoringrules.crps_t(y, DF, loc, scale), rtol=1e-7)


def test_one_poisson_has_the_published_scores():
    y = np.array([0.0, 1.0, 7.0, 60.0])
    rate = np.array([0.01, 3.0, 7.0, 40.0])
    mixture = Mixture(Poisson(tensor(rate)[None]), tensor([0.0]))
    expected = [scoringrules.crps_poisson(one, mean) for one, mean in zip(y, rate, strict=True)]
    np.testing.assert_allclose(mixture.crps(tensor(y)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("rates", "targets"),
    [
        ([1e-6, 1e-6], [0.0, 3.0]),
        ([0.1, 3.0, 20.0], [0.0, 2.0, 50.0, 500.0]),
        ([300.0, 4000.0], [0.0, 310.0, 2000.0, 9000.0]),
        ([0.1, 1e5], [0.0, 1e5, 3e4]),
        ([1e5, 1.05e5, 1.1e5], [1e5, 0.0, 2e5]),
    ],
)
def test_counts_are_sums_over_counts(rates: list[float], targets: list[float]):
    weights = np.arange(1, len(rates) + 1) / sum(range(1, len(rates) + 1))
    y = np.array(targets)
    k = np.arange(int(max(max(rates) + 20 * math.sqrt(max(rates)) + 60, y.max() + 2)))
    cdf_K = np.stack([scipy.stats.poisson.cdf(k, rate) for rate in rates]).T @ weights
    rate_CB = tensor(rates)[:, None].expand(-1, len(y))
    mixture = Mixture(Poisson(rate_CB), tensor(np.log(weights)))

    expected = [np.square(cdf_K - (k >= one)).sum() for one in y]
    np.testing.assert_allclose(mixture.crps(tensor(y)), expected, rtol=2e-5)
    np.testing.assert_allclose(mixture.cdf(tensor(y)), cdf_K[y.astype(int)], rtol=1e-9, atol=1e-300)
    before = np.where(y > 0, cdf_K[np.maximum(y.astype(int) - 1, 0)], 0)
    np.testing.assert_allclose(mixture.cdf_below(tensor(y)), before, rtol=1e-9, atol=1e-300)
    levels = [1e-6, 0.03, 0.2, 0.6, 0.8, 0.97, 1 - 1e-6]
    np.testing.assert_array_equal(
        mixture.quantile(tensor(levels))[:, 0], [np.argmax(cdf_K >= level) for level in levels]
    )


def test_quadrature_agrees_with_the_closed_form_over_pairs(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    for spread in (1.0, 0.01):
        loc = torch.randn(30, 20, generator=generator, dtype=torch.float64)
        scale = spread * (0.2 + torch.rand(30, 20, generator=generator, dtype=torch.float64))
        mixture = Mixture(Normal(loc, scale), torch.full((30,), -math.log(30), dtype=torch.float64))
        y = torch.randn(20, generator=generator, dtype=torch.float64)
        exact = mixture.crps(y)
        with monkeypatch.context() as patch:
            patch.setattr(_components, "MAX_PAIRS", 1)
            by_quadrature = mixture.crps(y)
        assert not torch.equal(by_quadrature, exact)
        torch.testing.assert_close(by_quadrature, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("df", [2.01, 2.5, 4.0, 30.0, 1e3, 1e6])
def test_the_table_of_the_t_distribution_is_scipys(df: float):
    v = np.concatenate([-np.logspace(6, -6, 200), np.logspace(-6, 6, 200)])
    one = torch.ones(1, len(v), dtype=torch.float64)
    mixture = Mixture(StudentT(tensor(df), 0 * one, one), tensor([0.0]))
    np.testing.assert_allclose(mixture.cdf(tensor(v)), scipy.stats.t.cdf(v, df), rtol=0, atol=1e-9)


def test_a_shift_and_a_change_of_units_carry_over():
    loc, scale, weights = (np.asarray(one, dtype=float) for one in CASES["many"])
    y, levels = tensor([0.7]), tensor(LEVELS)
    for family in ("normal", "t"):
        here, _ = make(family, loc, scale, weights)
        there, _ = make(family, 1000 + 0.01 * loc, 0.01 * scale, weights)
        torch.testing.assert_close(there.crps(1000 + 0.01 * y), 0.01 * here.crps(y), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(
            there.quantile(levels), 1000 + 0.01 * here.quantile(levels), rtol=1e-11, atol=0
        )


def test_rows_do_not_see_their_neighbours(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(1)
    loc = 3 * torch.randn(5, 300, generator=generator, dtype=torch.float64)
    y = torch.randn(300, generator=generator, dtype=torch.float64)
    log_weights = torch.full((5,), -math.log(5), dtype=torch.float64)

    def scores(rows: slice) -> torch.Tensor:
        mixture = Mixture(
            StudentT(tensor(DF), loc[:, rows], tensor(0.3).expand(5, 300)[:, rows]), log_weights
        )
        return torch.stack([mixture.crps(y[rows]), *mixture.quantile(tensor(LEVELS)), mixture.cdf(y[rows])])

    together = scores(slice(None))
    for rows in (slice(0, 1), slice(17, 31)):
        torch.testing.assert_close(scores(rows), together[:, rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["normal", "t", "poisson"])
def test_a_nan_component_shows_in_its_row_alone(family: str):
    at = torch.ones(3, 4, dtype=torch.float64)
    at[1, 2] = torch.nan
    components: dict[str, Distribution] = {
        "normal": Normal(at, torch.ones_like(at), validate_args=False),
        "t": StudentT(tensor(4.0), at, torch.ones_like(at), validate_args=False),
        "poisson": Poisson(at, validate_args=False),
    }
    mixture = Mixture(components[family], torch.full((3,), -math.log(3), dtype=torch.float64))
    y = torch.ones(4, dtype=torch.float64)
    for found in (mixture.crps(y), mixture.cdf(y), mixture.quantile(tensor([0.5]))[0]):
        assert found.isnan().tolist() == [False, False, True, False]


def test_single_precision_components_are_computed_with_in_double():
    loc, scale = torch.tensor([[0.1], [0.2]]), torch.tensor([[1.0], [2.0]])
    single = Mixture(Normal(loc, scale), tensor([math.log(0.5)] * 2))
    double = Mixture(Normal(loc.double(), scale.double()), tensor([math.log(0.5)] * 2))
    assert torch.equal(single.crps(torch.tensor([0.3])), double.crps(torch.tensor([0.3])))
    assert torch.equal(single.quantile(tensor(LEVELS)), double.quantile(tensor(LEVELS)))


def test_unknown_components_are_refused():
    mixture = Mixture(Exponential(torch.ones(2, 1)), tensor([math.log(0.5)] * 2))
    with pytest.raises(TypeError, match="Exponential"):
        mixture.cdf(tensor([1.0]))
    unequal = Mixture(
        StudentT(tensor([[3.0], [4.0]]), torch.zeros(2, 1), torch.ones(2, 1)), tensor([0.0, 0.0])
    )
    with pytest.raises(ValueError, match="same degrees of freedom"):
        unequal.cdf(tensor([1.0]))


def test_counts_of_a_row_do_not_depend_on_the_rows_beside_it():
    rates = torch.tensor([0.01, 0.1, 1.0, 3.0, 200.0, 6000.0, 5e5], dtype=torch.float64)
    y = torch.tensor([0.0, 1.0, 0.0, 5.0, 190.0, 6100.0, 5e5], dtype=torch.float64)
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)
    together = Mixture(torch.distributions.Poisson(rates[None]), torch.zeros(1))
    for i in range(len(rates)):
        alone = Mixture(torch.distributions.Poisson(rates[None, i : i + 1]), torch.zeros(1))
        torch.testing.assert_close(together.crps(y)[i], alone.crps(y[i : i + 1])[0], rtol=1e-9, atol=1e-12)
        assert torch.equal(together.quantile(levels)[:, i], alone.quantile(levels)[:, 0])
    # E|Y − y| − E|Y − Y'| / 2 at the smallest rate, by hand: Y is 0 or 1 to 5e-5.
    assert float(together.crps(y)[0]) == pytest.approx(0.01**2, rel=0.05)


@pytest.mark.parametrize(
    ("rates", "weights", "y"),
    [
        ([6000.0, 0.3], [0.001, 0.999], 0),
        ([20_000.0, 0.5], [5e-4, 1 - 5e-4], 1),
        ([6000.0, 2.0, 900.0], [0.01, 0.9, 0.09], 2),
    ],
)  # fmt: skip
def test_crps_of_small_rates_beside_a_huge_one_is_the_sum_over_counts(
    rates: list[float], weights: list[float], y: int
):
    counts = np.arange(40_000)
    cdf = np.array(weights) @ scipy.stats.poisson.cdf(counts, np.array(rates)[:, None])
    expected = np.square(cdf - (counts >= y)).sum()
    mixture = Mixture(Poisson(tensor(rates)[:, None]), tensor(np.log(weights)))
    assert float(mixture.crps(tensor([float(y)]))[0]) == pytest.approx(expected, rel=1e-6)

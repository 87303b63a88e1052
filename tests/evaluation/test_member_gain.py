"""What one more member adds, against enumeration, quadrature, closed forms and repetition.

Shape letters: M members, N rows, K classes.
"""

from itertools import combinations

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import entropy, norm

from bdl_train.evaluation.member_gain import curve, gain_of_one_more
from bdl_train.evaluation.member_views import MemberViews


def numbers(mean_MN: np.ndarray, y_N: np.ndarray, std: float = 1.0) -> MemberViews:
    """Gaussian members of one width."""
    return MemberViews(norm.logpdf(y_N, mean_MN, std), mean=mean_MN, variance=np.full_like(mean_MN, std**2))


def classes(random: np.random.Generator, count: int, num_rows: int = 7) -> MemberViews:
    probs_MNK = random.dirichlet(np.ones(3), (count, num_rows))
    return MemberViews(np.log(probs_MNK[:, np.arange(num_rows), np.arange(num_rows) % 3]), probs=probs_MNK)


def by_hand(views: MemberViews, members: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """NLL and disagreement `[N]` of an ensemble of these members."""
    own = views.of(list(members))
    nll_N = np.log(len(members)) - logsumexp(own.log_prob, axis=0)
    if own.probs is not None:
        return nll_N, entropy(own.probs.mean(0), axis=-1) - entropy(own.probs, axis=-1).mean(0)
    assert own.mean is not None
    assert own.variance is not None
    total_N = own.variance.mean(0) + own.mean.var(0)
    return nll_N, 0.5 * np.log(total_N / own.variance.mean(0))


def average(views: MemberViews, size: int) -> np.ndarray:
    """Over all ensembles of this size, `[2, N]`."""
    return np.mean([by_hand(views, one) for one in combinations(range(len(views)), size)], axis=0)


def both_kinds(count: int) -> list[MemberViews]:
    random = np.random.default_rng(count)
    mean_MN = 100 + random.normal(size=(count, 7))  # far from 0: squares alone would lose digits
    std_MN = random.uniform(0.5, 2, (count, 7))
    y_N = 100 + random.normal(size=7)
    return [
        classes(random, count),
        MemberViews(norm.logpdf(y_N, mean_MN, std_MN), mean=mean_MN, variance=std_MN**2),
    ]


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("kind", [0, 1])
def test_ends_of_the_curve_are_averages_over_all_ensembles(count, kind):
    views = both_kinds(count)[kind]
    found = curve(views, seed=0)
    assert found["members"].tolist() == list(range(1, count + 1))
    for size in (1, count - 1, count):
        expected = average(views, size).mean(1)
        np.testing.assert_allclose(
            found.loc[size - 1, ["nll", "disagreement"]].astype(float), expected, atol=1e-12
        )
    # The last step is paired: its error is that of the mean of the rows' own steps.
    step_2N = average(views, count) - average(views, count - 1)
    np.testing.assert_allclose(
        found.loc[count - 1, ["gain", "growth"]].astype(float), [-1, 1] * step_2N.mean(1)
    )
    error = step_2N.std(1, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(found.loc[count - 1, ["gain_se", "growth_se"]].astype(float), error)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_next_gain_and_its_error_by_hand(kind):
    views = both_kinds(5)[kind]

    def scaled(members: tuple[int, ...]) -> np.ndarray:
        """a of a / m, `[2, N]`."""
        own, size = views.of(list(members)), len(members)
        return size * (size - 1) * (average(own, size) - average(own, size - 1)) * [[-1], [1]]

    a_2N = scaled(tuple(range(5)))
    left = np.array([scaled(one).mean(1) for one in combinations(range(5), 4)])
    variance = a_2N.var(1, ddof=1) / 7 + 4 / 5 * np.square(left - left.mean(0)).sum(0)
    gain = gain_of_one_more(views)
    np.testing.assert_allclose([gain.nll.value, gain.disagreement.value], a_2N.mean(1) / 30)
    np.testing.assert_allclose([gain.nll.se, gain.disagreement.se], np.sqrt(variance) / 30)


def test_the_curve_of_gaussian_members_is_that_of_quadrature():
    # Members' means are N(0, s²) anew at each row, y = 0.7: the NLL of 1, 2 and 3 members is an integral over them.
    s, y, num_rows = 0.8, 0.7, 40_000
    random = np.random.default_rng(0)
    found = curve(numbers(s * random.normal(size=(3, num_rows)), np.full(num_rows, y)), seed=0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights /= weights.sum()
    density = norm.pdf(y, s * nodes, 1)
    mixed = density[:, None, None] + density[:, None] + density
    expected = [
        0.5 * np.log(2 * np.pi) + (y**2 + s**2) / 2,
        -np.einsum("i,j,ij", weights, weights, np.log((density[:, None] + density) / 2)),
        -np.einsum("i,j,k,ijk", weights, weights, weights, np.log(mixed / 3)),
    ]
    # One member's NLL has a standard deviation of 0.7 at a row; means of 40,000 rows and 1 to 3 members: 0.0035, 0.002.
    np.testing.assert_allclose(found["nll"], expected, atol=0.015)
    steps = found[["gain", "gain_se"]].to_numpy(float)[1:]
    assert (np.abs(steps[:, 0] + np.diff(expected)) < 4 * steps[:, 1]).all()


def near(random: np.random.Generator, count: int, num_rows: int, s: float, shared: bool) -> MemberViews:
    """Members that hardly differ, so that a = s²/2 for the NLL (y ~ N(0, 1)) and for the disagreement.

    A log density differs by s z (y − ...), and log E exp of small numbers is half their variance.
    """
    z_MN = random.normal(size=(count, 1 if shared else num_rows)) * np.ones(num_rows)
    return numbers(s * z_MN, random.normal(size=num_rows))


def test_one_more_gains_what_the_closed_form_says():
    s, count = 0.02, 6
    gain = gain_of_one_more(near(np.random.default_rng(1), count, 40_000, s, shared=False))
    expected = s**2 / 2 / (count * (count + 1))
    # At a row a variance of 6 values is off by sqrt(2/5) of itself and y² by sqrt(2): over 40,000 rows 0.003 and 0.008.
    assert gain.disagreement.value == pytest.approx(expected, rel=0.015)
    assert gain.nll.value == pytest.approx(expected, rel=0.04)
    # What is extrapolated is what a member more shows.
    more = curve(near(np.random.default_rng(2), count + 1, 40_000, s, shared=False), seed=0)
    assert more["growth"].iloc[-1] == pytest.approx(gain.disagreement.value, rel=0.02)


@pytest.mark.parametrize(("shared", "num_rows"), [(True, 200), (False, 60)])
def test_the_error_is_as_large_as_the_estimate_scatters(shared, num_rows):
    # Members and rows are drawn again 300 times: with effects that a member has on all rows, and on each row anew.
    random = np.random.default_rng(3)
    gains = [gain_of_one_more(near(random, 8, num_rows, 0.05, shared)) for _ in range(300)]
    for name in ("nll", "disagreement"):
        estimates = [getattr(gain, name) for gain in gains]
        scatter = np.std([one.value for one in estimates])
        told = np.sqrt(np.mean([one.se**2 for one in estimates]))
        # 300 repeats know a deviation to 4 %. A jackknife of a variance of 8 is too large by up to a fifth, and what a
        # row and a member have together is counted twice: up to sqrt(2).
        assert 0.85 < told / scatter < 1.6, name


def test_members_that_are_one_and_the_same_gain_nothing():
    for views in both_kinds(4):
        gain = gain_of_one_more(views.of([2, 2, 2, 2]))
        np.testing.assert_allclose([gain.nll.value, gain.disagreement.value, gain.nll.se], 0, atol=1e-14)


def test_the_order_of_members_and_of_rows_does_not_matter():
    for views in both_kinds(5):
        one, other = gain_of_one_more(views), gain_of_one_more(views.of([3, 1, 4, 0, 2]))
        np.testing.assert_allclose(
            [one.nll.value, one.nll.se, one.disagreement.value, one.disagreement.se],
            [other.nll.value, other.nll.se, other.disagreement.value, other.disagreement.se],
        )


def test_a_member_that_alone_expects_a_row_costs_no_digits():
    # Without the first member densities are 1000 nats lower, which no difference of sums would show.
    log_prob = np.array([[0.0, 0.0], [-1000.0, -1000.0], [-1000.0, -1000.0]])
    views = MemberViews(log_prob, mean=np.zeros((3, 2)), variance=np.ones((3, 2)))
    expected = np.log(1 / 3) - (-1000 - 2 * np.log(2)) / 3
    assert curve(views, seed=0)["gain"].iloc[-1] == pytest.approx(expected)
    assert gain_of_one_more(views).nll.value == pytest.approx(expected * 2 / 4)


def test_what_is_not_finite_is_not_small():
    log_prob = np.full((3, 4), -np.inf)
    log_prob[0] = 0
    views = MemberViews(log_prob, mean=np.zeros((3, 4)), variance=np.ones((3, 4)))
    assert not gain_of_one_more(views).nll.upper < 1e9
    log_prob[0, 0] = -np.inf
    assert not gain_of_one_more(views).nll.upper < 1e9
    assert curve(views, seed=0)["disagreement"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(2, 5), (3, 1)])
def test_too_few_are_refused(shape):
    views = MemberViews(np.zeros(shape), mean=np.zeros(shape), variance=np.ones(shape))
    with pytest.raises(ValueError, match="3 members and 2 rows or more"):
        gain_of_one_more(views)
    assert len(curve(views, seed=0)) == shape[0]

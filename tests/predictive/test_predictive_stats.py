"""Streaming statistics: closed forms, limits, and the same answer for every way to split the components."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, Poisson, StudentT

from bdl_train.predictive.stats import ClassStats, NumberStats, entropy, log_prob, stats_of

NUM_COMPONENTS, NUM_ROWS, NUM_CLASSES = 12, 5, 4


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tensor(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def even(count: int) -> Tensor:
    return torch.full((count,), -math.log(count), dtype=torch.float64)


def categorical(logits: Tensor) -> Categorical:
    return Categorical(logits=logits, validate_args=False)


def class_stats(logits: Tensor, y: Tensor | None = None, log_weights: Tensor | None = None) -> ClassStats:
    found = stats_of(categorical(logits), even(len(logits)) if log_weights is None else log_weights, y)
    assert isinstance(found, ClassStats)
    return found


def number_stats(components: Distribution, log_weights: Tensor, y: Tensor | None = None) -> NumberStats:
    found = stats_of(components, log_weights, y)
    assert isinstance(found, NumberStats)
    return found


def random_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, means with an offset that dwarfs their spread, uneven log-weights that sum to 1, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(NUM_COMPONENTS, NUM_ROWS, NUM_CLASSES, generator=generator, dtype=torch.float64)
    means = 1e4 + torch.randn(NUM_COMPONENTS, NUM_ROWS, generator=generator, dtype=torch.float64)
    log_weights = torch.randn(NUM_COMPONENTS, generator=generator, dtype=torch.float64).log_softmax(0)
    labels = torch.randint(0, NUM_CLASSES, (NUM_ROWS,), generator=generator)
    return logits, means, log_weights, labels


# --- merging --------------------------------------------------------------------------------------------------


def assert_same(one: ClassStats | NumberStats, other: ClassStats | NumberStats) -> None:
    for name in ("total", "aleatoric", "epistemic", "nll"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-10)
    assert one.weight == pytest.approx(other.weight, rel=1e-12)
    if isinstance(one, ClassStats) and isinstance(other, ClassStats):
        torch.testing.assert_close(one.mean_probs, other.mean_probs, rtol=1e-12, atol=1e-14)
    if isinstance(one, NumberStats) and isinstance(other, NumberStats):
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-13, atol=0)


@st.composite
def groupings(draw: st.DrawFn) -> list[list[int]]:
    """A random partition of the components into groups, in random order."""
    order = draw(st.permutations(range(NUM_COMPONENTS)))
    cuts = sorted(draw(st.sets(st.integers(1, NUM_COMPONENTS - 1), max_size=6)))
    bounds = [0, *cuts, NUM_COMPONENTS]
    return [list(order[a:b]) for a, b in pairwise(bounds)]


T = TypeVar("T", ClassStats, NumberStats)


def merged_in_turn(parts: Sequence[T], from_left: bool) -> T:
    if from_left:
        return reduce(lambda one, other: one.merge(other), parts)
    return reduce(lambda one, other: other.merge(one), reversed(parts))


@settings(max_examples=60, deadline=None)
@given(groups=groupings(), from_left=st.booleans(), seed=st.integers(0, 3))
def test_merge_is_associative_commutative_and_equal_to_all_at_once(
    groups: list[list[int]], from_left: bool, seed: int
):
    logits, means, log_weights, labels = random_problem(seed)
    whole = class_stats(logits, labels, log_weights)
    parts = [class_stats(logits[group], labels, log_weights[group]) for group in groups]
    assert_same(merged_in_turn(parts, from_left), whole)

    components = Normal(means, 0.1 + means.frac().abs())
    y = means[0] + 0.3
    whole = number_stats(components, log_weights, y)
    parts = [
        number_stats(Normal(components.loc[group], components.scale[group]), log_weights[group], y)
        for group in groups
    ]
    assert_same(merged_in_turn(parts, from_left), whole)


def test_weights_need_not_sum_to_one():
    logits, means, log_weights, labels = random_problem(0)
    doubled = log_weights + math.log(2)
    assert_same(class_stats(logits, labels, doubled), _scaled(class_stats(logits, labels, log_weights)))
    normal = Normal(means, torch.ones_like(means))
    one, two = number_stats(normal, log_weights, means[0]), number_stats(normal, doubled, means[0])
    for name in ("mean", "total", "aleatoric", "epistemic", "nll"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-10, atol=1e-10)


def _scaled(stats: ClassStats) -> ClassStats:
    return ClassStats(
        2 * stats.weight, 2 * stats.probs, 2 * stats.expected_entropy, stats.log_score + math.log(2)
    )


# --- classes --------------------------------------------------------------------------------------------------


def test_classes_against_numpy():
    logits, _, log_weights, labels = random_problem(1)
    probs = scipy.special.softmax(logits.numpy(), axis=-1)
    weights = log_weights.exp().numpy()
    mean = np.einsum("c,cbk->bk", weights, probs)
    found = class_stats(logits, labels, log_weights)
    np.testing.assert_allclose(found.mean_probs, mean, rtol=1e-13)
    np.testing.assert_allclose(found.total, scipy.stats.entropy(mean, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(found.aleatoric, weights @ scipy.stats.entropy(probs, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(found.nll, -np.log(mean[np.arange(NUM_ROWS), labels]), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_members_have_no_epistemic_part(dtype: torch.dtype):
    logits = random_problem(2)[0][:1].to(dtype).expand(7, -1, -1)
    found = class_stats(logits)
    assert float(found.epistemic.max()) < (1e-6 if dtype is torch.float32 else 1e-14)
    torch.testing.assert_close(found.total, found.aleatoric, rtol=1e-6, atol=1e-7)


def test_two_certain_members_that_disagree_have_log_2_nats():
    logits = tensor([[[200.0, -200.0]], [[-200.0, 200.0]]])
    for found in (class_stats(logits), class_stats(logits.float())):
        assert float(found.epistemic) == pytest.approx(math.log(2), abs=1e-12)
        assert float(found.aleatoric) < 1e-100
        assert found.mean_probs.tolist() == [[0.5, 0.5]]


def test_probabilities_are_averaged_not_logits():
    logits = tensor([[[10.0, 0.0]], [[-2.0, 0.0]]])
    found = class_stats(logits)
    sigmoid = scipy.special.expit
    assert float(found.mean_probs[0, 0]) == pytest.approx((sigmoid(10) + sigmoid(-2)) / 2, rel=1e-12)
    assert abs(float(found.mean_probs[0, 0]) - sigmoid(4)) > 0.4


def test_the_log_score_never_underflows():
    for dtype in (torch.float32, torch.float64):
        found = class_stats(torch.tensor([[[200.0, -200.0]]] * 3, dtype=dtype), torch.tensor([1]))
        assert float(found.nll) == pytest.approx(400.0)
        both = found.merge(found)
        assert float(both.nll) == pytest.approx(400.0)


def test_minus_infinite_logits_are_a_probability_of_zero():
    found = class_stats(torch.tensor([[[0.0, 0.0, -torch.inf]]] * 2), torch.tensor([0]))
    assert found.mean_probs.tolist() == [[0.5, 0.5, 0.0]]
    assert float(found.total) == pytest.approx(math.log(2))
    assert float(found.aleatoric) == pytest.approx(math.log(2))


def test_bernoulli_is_a_categorical_of_two_classes():
    logits = torch.tensor([[-200.0, -20.0, -1.0, 0.0, 3.0, 30.0], [1.0, -25.0, 0.5, 0.1, -3.0, 200.0]])
    y = torch.tensor([1, 0, 1, 0, 0, 1])
    one = stats_of(Bernoulli(logits=logits, validate_args=False), even(2), y)
    assert isinstance(one, ClassStats)
    two = class_stats(torch.stack([torch.zeros_like(logits), logits], dim=-1), y)
    torch.testing.assert_close(one.mean_probs, two.mean_probs, rtol=1e-6, atol=0)
    for name in ("total", "aleatoric", "nll"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=2e-8)
    p = scipy.special.expit(logits.double().numpy()).mean(0)
    q = scipy.special.expit(-logits.double().numpy()).mean(0)
    np.testing.assert_allclose(one.total, -(p * np.log(p) + q * np.log(q)), rtol=1e-5, atol=2e-8)


def test_adding_a_constant_to_the_logits_changes_nothing():
    logits, _, log_weights, labels = random_problem(3)
    assert_same(class_stats(logits, labels, log_weights), class_stats(logits + 77.0, labels, log_weights))


# --- numbers --------------------------------------------------------------------------------------------------


def test_numbers_follow_the_law_of_total_variance():
    _, means, log_weights, _ = random_problem(4)
    std = 0.1 + means.frac().abs()
    y = means[0] + 0.3
    found = number_stats(Normal(means, std), log_weights, y)
    weights = log_weights.exp().numpy()
    mean = weights @ means.numpy()
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(found.aleatoric, weights @ std.square().numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.epistemic, weights @ (means.numpy() - mean) ** 2, rtol=1e-9)
    density = weights @ scipy.stats.norm.pdf(y, means, std)
    np.testing.assert_allclose(found.nll, -np.log(density), rtol=1e-12)


def test_the_moments_are_those_of_draws_of_the_mixture():
    generator = np.random.default_rng(0)
    loc, scale, weights = np.array([-1.0, 0.5, 4.0]), np.array([0.2, 1.0, 0.4]), np.array([0.5, 0.3, 0.2])
    which = generator.choice(3, size=200_000, p=weights)
    draws = loc[which] + scale[which] * generator.standard_normal(len(which))
    found = number_stats(Normal(tensor(loc)[:, None], tensor(scale)[:, None]), tensor(np.log(weights)))
    variance = float(found.total)
    assert float(found.mean) == pytest.approx(draws.mean(), abs=5 * math.sqrt(variance / len(draws)))
    assert variance == pytest.approx(draws.var(), rel=0.02)


def test_two_members_at_minus_one_and_one_have_standard_deviation_1_02():
    found = number_stats(Normal(tensor([[-1.0], [1.0]]), tensor(0.2)), even(2))
    assert float(found.total.sqrt()) == pytest.approx(math.sqrt(1.04))
    assert float(found.aleatoric.sqrt()) == pytest.approx(0.2)
    assert float(found.epistemic) == pytest.approx(1.0)


def test_single_precision_means_lose_no_variance_to_cancellation():
    generator = torch.Generator().manual_seed(5)
    means = (1.0 + 1e-4 * torch.randn(64, 200, generator=generator)).float()
    exact = means.double().var(0, correction=0)
    scale = torch.full_like(means, 1e-6)
    parts = [
        number_stats(Normal(means[i : i + 4], scale[i : i + 4]), even(64)[i : i + 4]) for i in range(0, 64, 4)
    ]
    found = reduce(NumberStats.merge, parts)
    torch.testing.assert_close(found.epistemic, exact, rtol=1e-8, atol=0)
    naive = means.square().mean(0) - means.mean(0).square()
    assert float((naive < 0).float().mean()) > 0.05  # the test would catch it


def test_scales_from_1e_minus_6_to_1e_plus_6():
    loc, scale = tensor([[0.0], [5.0]]), tensor([[1e-6], [1e6]])
    y = tensor([2e-6])
    found = number_stats(Normal(loc, scale), even(2), y)
    expected = 0.5 * scipy.stats.norm.pdf(2e-6, 0, 1e-6) + 0.5 * scipy.stats.norm.pdf(2e-6, 5, 1e6)
    assert float(found.nll) == pytest.approx(-math.log(expected), rel=1e-12)
    assert float(found.aleatoric) == pytest.approx((1e-12 + 1e12) / 2, rel=1e-12)


def test_far_tails_keep_their_log_density():
    found = number_stats(Normal(tensor([[0.0], [1.0]]), tensor(0.01)), even(2), tensor([50.0]))
    nearer = scipy.stats.norm.logpdf(50.0, 1.0, 0.01)
    assert float(found.nll) == pytest.approx(-(nearer - math.log(2)), rel=1e-12)


def test_student_t_and_poisson_moments_are_scipys():
    loc, scale = tensor([[0.0], [2.0]]), tensor([[0.5], [1.5]])
    found = number_stats(StudentT(tensor(4.0), loc, scale), even(2))
    variances = [scipy.stats.t(4, m, s).var() for m, s in ((0.0, 0.5), (2.0, 1.5))]
    assert float(found.aleatoric) == pytest.approx(np.mean(variances))
    assert float(found.epistemic) == pytest.approx(1.0)
    counts = number_stats(Poisson(tensor([[2.0], [8.0]])), even(2), torch.tensor([3]))
    assert (float(counts.mean), float(counts.aleatoric), float(counts.epistemic)) == (5.0, 5.0, 9.0)
    expected = np.mean(scipy.stats.poisson.pmf(3, [2.0, 8.0]))
    assert float(counts.nll) == pytest.approx(-math.log(expected), rel=1e-12)


def test_large_integer_counts_keep_their_digits():
    count = torch.tensor([1_000_003])
    found = log_prob(Poisson(tensor([[1e6]]), validate_args=False), count)
    assert float(found) == pytest.approx(scipy.stats.poisson.logpmf(1_000_003, 1e6), abs=1e-6)


# --- NaN ------------------------------------------------------------------------------------------------------


def test_a_nan_component_shows_in_every_statistic_of_its_row_alone():
    logits, means, log_weights, labels = random_problem(6)
    logits[3, 2, 1] = torch.nan
    means[3, 2] = torch.nan
    scale = torch.ones_like(means)
    normal = Normal(means, scale, validate_args=False)
    y = torch.full((NUM_ROWS,), 1e4, dtype=torch.float64)
    first = class_stats(logits[:6], labels, log_weights[:6])
    for found in (
        class_stats(logits, labels, log_weights),
        first.merge(class_stats(logits[6:], labels, log_weights[6:])),
        number_stats(normal, log_weights, y),
    ):
        expected = [row == 2 for row in range(NUM_ROWS)]
        for name in ("total", "epistemic", "nll"):
            assert getattr(found, name).isnan().tolist() == expected, name


def test_without_targets_the_score_stays_empty():
    logits, means, log_weights, _ = random_problem(7)
    one, other = (
        class_stats(logits[:3], None, log_weights[:3]),
        class_stats(logits[3:], None, log_weights[3:]),
    )
    assert one.merge(other).log_score.tolist() == [-math.inf] * NUM_ROWS
    numbers = number_stats(Normal(means, torch.ones_like(means)), log_weights)
    assert numbers.merge(numbers).log_score.tolist() == [-math.inf] * NUM_ROWS


def test_a_sure_mixture_has_no_entropy_rather_than_less_than_none():
    probs = torch.tensor([[1.0 + 2e-16, 0.0], [1.0 + 1e-15, 1e-320]], dtype=torch.float64)
    assert torch.special.entr(probs).sum(-1).min() < 0  # what rounding leaves
    assert entropy(probs).tolist() == [0.0, 0.0]

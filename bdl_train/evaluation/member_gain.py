"""What one more member would add: the validation NLL and the disagreement as functions of the number of members.

The ensemble of m members is any m of the M that there are, on average over which. Its NLL falls, and the disagreement
of its members grows, like a constant minus a / m: the mean of m values has a variance that is 1/m of one. The last
member's gain g(M), the mean over the M ensembles that lack one, is exact, and one more would gain g(M) (M − 1)/(M + 1).

Disagreement is in nats: for classes the mutual information of prediction and member, for numbers
½ log(total variance / aleatoric variance), which is the same between Gaussians.

Shape letters: M members, N rows, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bdl_train.distributed.waves import Estimate
from bdl_train.evaluation.member_views import MemberViews

ORDERS = 16
"""Least number of orders of members over which a curve is averaged."""
LEAST_MEMBERS = 3
"""Fewer have no standard error."""


@dataclass(frozen=True)
class Gain:
    """What one more member would add.

    Attributes:
        nll: To how far the validation NLL falls, nats a row.
        disagreement: To how far members disagree, nats a row.
    """

    nll: Estimate
    disagreement: Estimate


def gain_of_one_more(views: MemberViews) -> Gain:
    """Extrapolated from the last member's, with a standard error from rows and members.

    The rows' part is that of a mean over N rows, paired: each row's own gain. The members' part is the jackknife over
    members (Efron & Stein 1981). Both are added as independent, so what a row and a member have together is counted
    twice: the error is too large rather than too small.

    Args:
        views: Of three members or more, and of two rows or more.
    """
    count, num_rows = views.log_prob.shape
    if count < LEAST_MEMBERS or num_rows < 2:
        raise ValueError(
            f"A gain needs {LEAST_MEMBERS} members and 2 rows or more, got {count} and {num_rows}."
        )
    scale = count * (count - 1)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        own_2N = scale * _last_gain(views)
        others = [np.delete(np.arange(count), m) for m in range(count)]
        left_M2 = np.array([(count - 1) * (count - 2) * _last_gain(views.of(one)).mean(1) for one in others])
        of_rows = own_2N.var(1, ddof=1) / num_rows
        of_members = (count - 1) * left_M2.var(0)
        value, error = own_2N.mean(1), np.sqrt(of_rows + of_members)
    nll, disagreement = (
        Estimate(float(v) / (count * (count + 1)), float(e) / (count * (count + 1)))
        for v, e in zip(value, error, strict=True)
    )
    return Gain(nll, disagreement)


def curve(views: MemberViews, seed: int) -> pd.DataFrame:
    """NLL and disagreement of 1 to M members.

    Averages are over orders of the members in which each stands at each place equally often, so that those of 1, M − 1
    and M members are exact.

    Args:
        views: Of one member or more.
        seed: Of the orders.

    Returns:
        A row for each m: members, nll, gain, gain_se, disagreement, growth, growth_se. Gain and growth are the last
        member's, from m − 1 to m; their standard errors are over rows, paired, and NaN for one member or one row.
    """
    count, num_rows = views.log_prob.shape
    total_2MN, num_orders = np.zeros((2, count, num_rows)), 0
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for order in _orders(count, seed):
            total_2MN += _growing(views.of(order))
            num_orders += 1
        nll_MN, disagreement_MN = total_2MN / num_orders
        gain_MN, growth_MN = -np.diff(nll_MN, axis=0), np.diff(disagreement_MN, axis=0)
        steps = {
            name: np.concatenate([[np.nan], values])
            for name, step in (("gain", gain_MN), ("growth", growth_MN))
            for name, values in ((name, step.mean(1)), (f"{name}_se", _standard_error(step)))
        }
        found = {"nll": nll_MN.mean(1), "disagreement": disagreement_MN.mean(1), **steps}
    columns = ["members", "nll", "gain", "gain_se", "disagreement", "growth", "growth_se"]
    return pd.DataFrame({"members": np.arange(1, count + 1), **found}, columns=columns)


def _standard_error(values_MN: np.ndarray) -> np.ndarray:
    num_rows = values_MN.shape[1]
    if num_rows < 2:
        return np.full(len(values_MN), np.nan)
    return values_MN.std(1, ddof=1) / np.sqrt(num_rows)


def _orders(count: int, seed: int) -> Iterator[np.ndarray]:
    """Random orders of members, each with all its rotations."""
    random = np.random.default_rng(seed)
    for _ in range(-(-ORDERS // count)):
        order = random.permutation(count)
        for shift in range(count):
            yield np.roll(order, shift)


def _growing(views: MemberViews) -> np.ndarray:
    """NLL and disagreement of the first 1, 2, ... M members, `[2, M, N]`."""
    sizes_M1 = np.arange(1, len(views) + 1)[:, None]
    nll_MN = np.log(sizes_M1) - np.logaddexp.accumulate(views.log_prob, axis=0)
    if views.probs is not None:
        mean_MNK = views.probs.cumsum(0) / sizes_M1[:, :, None]
        return np.stack([nll_MN, _entropy(mean_MNK) - _entropy(views.probs).cumsum(0) / sizes_M1])
    mean_MN, square_MN, variance_MN = (one.cumsum(0) / sizes_M1 for one in _moments(views))
    return np.stack([nll_MN, _gaussian_information(square_MN - mean_MN**2, variance_MN)])


def _last_gain(views: MemberViews) -> np.ndarray:
    """By how much the last of M members lowers the NLL and raises the disagreement, each being the last equally often:
    `[2, N]`, nats."""
    count = len(views)
    log_prob = views.log_prob
    whole_N, without_MN = np.logaddexp.reduce(log_prob, axis=0), _sums_without_each(log_prob)
    gain_N = whole_N - np.log(count) - (without_MN - np.log(count - 1)).mean(0)
    if views.probs is not None:
        # The mean of the members' own entropies is the same with and without, on average.
        total_NK = views.probs.sum(0)
        before_MN = _entropy(np.maximum(total_NK - views.probs, 0) / (count - 1))
        return np.stack([gain_N, _entropy(total_NK / count) - before_MN.mean(0)])
    sums = [one.sum(0) for one in _moments(views)]
    mean_N, square_N, variance_N = (one / count for one in sums)
    mean_MN, square_MN, variance_MN = (
        (one - own) / (count - 1) for one, own in zip(sums, _moments(views), strict=True)
    )
    after_N = _gaussian_information(square_N - mean_N**2, variance_N)
    before_MN = _gaussian_information(square_MN - mean_MN**2, variance_MN)
    return np.stack([gain_N, after_N - before_MN.mean(0)])


def _sums_without_each(log_MN: np.ndarray) -> np.ndarray:
    """log Σ exp over the other members, `[M, N]`, by sums from both ends: taking one away again would lose digits."""
    nothing_1N = np.full_like(log_MN[:1], -np.inf)
    before = np.concatenate([nothing_1N, np.logaddexp.accumulate(log_MN, axis=0)[:-1]])
    after = np.concatenate([np.logaddexp.accumulate(log_MN[::-1], axis=0)[::-1][1:], nothing_1N])
    return np.logaddexp(before, after)


def _moments(views: MemberViews) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and its square of every member, from the ensemble's mean on so that no digits are lost, and its variance."""
    assert views.mean is not None
    assert views.variance is not None
    mean_MN = views.mean - views.mean.mean(0)
    return mean_MN, mean_MN**2, views.variance


def _gaussian_information(epistemic: np.ndarray, aleatoric: np.ndarray) -> np.ndarray:
    return 0.5 * np.log1p(np.maximum(epistemic, 0) / aleatoric)


def _entropy(probs: np.ndarray) -> np.ndarray:
    """Nats, over the last axis, with 0 log 0 = 0."""
    log = np.log(probs, out=np.zeros_like(probs), where=probs > 0)
    return -(probs * log).sum(-1)

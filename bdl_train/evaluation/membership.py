"""Membership inference: can someone who sees what the model says of a row tell whether it was trained on?

An attack gives each pair of a model and a row a score, the higher the likelier a training row; thresholds on it give a
ROC curve. Intervals come from resampling rows, so pairs of one row with many members count as one piece of evidence.

Shape letters: M members, N rows, n pairs of a member and a row, R resamples, G distinct scores.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import LEVEL, resamples_for

FEW_SHADOWS = 8
"""Below so many other members that saw (did not see) a row, all rows share one variance of that kind."""
LEAST_ALARMS, FEW_ALARMS = 1, 10
"""Rows that a false-positive rate must amount to: for a true-positive rate at it, and for one without a note."""
_RATES = {"tpr_at_1_fpr": 0.01, "tpr_at_01_fpr": 0.001}
_MOST_CONFIDENT = float(np.finfo(np.float32).eps)
_AT_A_TIME = 300_000
"""Pairs times resamples: more leave the cache."""
_COST = 5
"""Of a pair in a ROC curve, against that of a row in a mean."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; NaN where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Attack:
    """How well an attack tells training rows from others.

    Attributes:
        name: For people.
        auc: Chance that a training row scores higher than another row, ties counted half; 0.5 = guessing.
        tpr_at_1_fpr, tpr_at_01_fpr: Share of training rows found when 1 % (0.1 %) of the others are taken for some.
        advantage: Largest true minus false positive rate (Yeom et al. 2018, Definition 4).
        advantage_by_chance: What that is on average if scores say nothing: a maximum is above 0 even then.
        n_in, n_out: Pairs of a member and a row that it saw, or did not see.
        fpr, tpr: `[G]`, points of the ROC curve.
        notes: What a reader must know.
    """

    name: str
    auc: Estimate
    tpr_at_1_fpr: Estimate
    tpr_at_01_fpr: Estimate
    advantage: Estimate
    advantage_by_chance: float
    n_in: int
    n_out: int
    fpr: np.ndarray
    tpr: np.ndarray
    notes: tuple[str, ...] = ()


def loss_threshold_attack(
    nll_in: np.ndarray, nll_out: np.ndarray, *, seed: int, name: str = "loss"
) -> Attack:
    """Whose loss is below a threshold was trained on.

    Args:
        nll_in: `[n]` of training rows, nats.
        nll_out: `[n']` of rows that were not trained on.
        seed: Of the resamples.
        name: Of the attack.

    Raises:
        UsageError: no rows of one kind, or losses that are NaN.

    Source:
        Yeom et al. (2018), arXiv:1709.01604, Section 3.2, without its threshold: all of them are tried.
    """
    nll = np.concatenate([nll_in, nll_out])
    if np.isnan(nll).any():
        raise UsageError(f"The loss of {int(np.isnan(nll).sum())} rows is NaN: no attack can be judged.")
    is_in = np.repeat([True, False], [len(nll_in), len(nll_out)])
    return judge(-nll[None], is_in[None], seed=seed, name=name)


def likelihood_ratio_attack(
    log_prob: np.ndarray, is_in: np.ndarray, *, is_density: bool, seed: int, name: str = "likelihood ratio"
) -> Attack:
    """LiRA: members are each other's shadow models.

    Args:
        log_prob: `[M, N]`, log p(y|x) of each member alone.
        is_in: `[M, N]` bool, whether the member was trained on the row.
        is_density: Of numbers; probabilities are logit-scaled first.
        seed: Of the resamples.
        name: Of the attack.

    Raises:
        UsageError: as `likelihood_ratios`.
    """
    scores, note = likelihood_ratios(log_prob, is_in, is_density=is_density)
    return judge(scores, is_in, seed=seed, name=name, notes=(note,))


def logit_confidence(log_prob: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)), with 1 − p no smaller than float32 resolves: beyond it confidence is rounding.

    Source:
        Carlini et al. (2022), arXiv:2112.03570, Section V-B.
    """
    log_p = log_prob.astype(np.float64)
    return log_p - np.log(np.maximum(-np.expm1(log_p), _MOST_CONFIDENT))


def likelihood_ratios(log_prob: np.ndarray, is_in: np.ndarray, *, is_density: bool) -> tuple[np.ndarray, str]:
    """The score of each pair `[M, N]`, NaN where no other member can serve as a shadow, and how it was made.

    Online: log N(x; in) − log N(x; out), Gaussians of the other members that saw and did not see the row. Offline,
    where few saw it: how far x lies above those that did not, in standard deviations.

    Two deviations. Variances are widened by 1 + 1/k for a mean of k shadows, or ratios of rows with one shadow would
    outdo those with many. And a shared variance is that around each row's own mean, not of all values.

    Args:
        log_prob, is_in, is_density: As in `likelihood_ratio_attack`.

    Raises:
        UsageError: fewer than 3 members, values that are not finite, no row that divides the members, or members that
            agree to the last digit.

    Source:
        Carlini et al. (2022), arXiv:2112.03570, Algorithm 1 (online) and Section V-C (offline).
    """
    if log_prob.shape != is_in.shape or log_prob.ndim != 2:
        raise UsageError(
            f"log_prob and is_in must be [members, rows], got {list(log_prob.shape)}, {list(is_in.shape)}."
        )
    if len(log_prob) < 3:
        raise UsageError(
            f"The likelihood-ratio attack needs 3 members or more, here are {len(log_prob)}: raise num_members."
        )
    if not np.isfinite(log_prob).all():
        raise UsageError(f"log_prob has {int((~np.isfinite(log_prob)).sum())} values that are not finite.")
    x = log_prob.astype(np.float64) if is_density else logit_confidence(log_prob)
    mixed = is_in.any(0) & ~is_in.all(0)
    if not mixed.any():
        raise UsageError(
            "Members cannot be shadow models of each other, since all of them saw the same rows: train with "
            "trainer.member_fraction below 1, such as 0.5."
        )
    x = x - x.mean(0)  # sums of squares keep their digits
    out = _Shadows(x, ~is_in)
    if not out.has_spread:
        raise UsageError(
            "The spread of members that did not see a row is unknown or 0: raise num_members, or lower "
            "trainer.member_fraction."
        )
    seen = _Shadows(x, is_in)
    both = (seen.num > 0) & (out.num > 0)
    # Of either kind: where a row has one member that saw it, that very pair has no shadow.
    shares = [both[mixed_MN].mean() for mixed_MN in (is_in & mixed, ~is_in & mixed)]
    if seen.has_spread and min(shares) >= 0.5:
        scores = np.where(both, seen.log_density(x) - out.log_density(x), np.nan)
        return (
            scores,
            f"online: a row has {_typical(seen, both)} shadows that saw it, {_typical(out, both)} not",
        )
    known = out.num > 0
    scores = np.where(known, (x - out.mean) / np.sqrt(out.variance), np.nan)
    return scores, (
        f"offline, since too few members saw a row: it has {_typical(out, known)} shadows that did not. More members, "
        "or trainer.member_fraction near 0.5, allow the stronger online form"
    )


class _Shadows:
    """Mean and variance of x `[M, N]` over the chosen ones of the other members, for each pair."""

    def __init__(self, x: np.ndarray, chosen: np.ndarray) -> None:
        kept = np.where(chosen, x, 0.0)
        self.num = chosen.sum(0) - chosen  # without the target itself
        num = np.maximum(self.num, 1)
        self.mean = (kept.sum(0) - kept) / num
        squares = np.square(kept)
        deviation = np.maximum(squares.sum(0) - squares - num * np.square(self.mean), 0.0)
        freedom = np.maximum(self.num - 1, 0)
        shared = deviation.sum(1, keepdims=True) / np.maximum(freedom.sum(1, keepdims=True), 1)
        self.has_spread = bool((shared > 0).all())
        own = np.maximum(deviation / np.maximum(freedom, 1), 1e-4 * shared)
        self.variance = np.where(self.num >= FEW_SHADOWS, own, shared) * (1 + 1 / num)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return -0.5 * (np.square(x - self.mean) / self.variance + np.log(self.variance))


def _typical(shadows: _Shadows, known: np.ndarray) -> str:
    return f"{np.median(shadows.num[known]):g}"


def judge(
    scores: np.ndarray, is_in: np.ndarray, *, seed: int, name: str, notes: tuple[str, ...] = ()
) -> Attack:
    """Figures of an attack from its scores.

    Args:
        scores: `[M, N]`, higher = likelier trained on; NaN = not attacked.
        is_in: `[M, N]` bool, the truth.
        seed: Of the resamples of rows; rows that no member saw are resampled among themselves.
        name, notes: Of the attack.

    Raises:
        UsageError: no pair of one kind.
    """
    known = ~np.isnan(scores)
    member, row = np.nonzero(known)
    truth, num_rows = is_in[member, row], scores.shape[1]
    n_in, n_out = int(truth.sum()), int((~truth).sum())
    if n_in == 0 or n_out == 0:
        raise UsageError(
            f"The attack by {name} needs rows of both kinds, got {n_in} trained on and {n_out} not."
        )
    roc = _Roc(scores[known], truth, row)
    fpr, tpr = roc(np.ones((1, num_rows)))
    found = roc.figures(fpr, tpr)
    drawn = [
        roc.figures(*roc(counts))
        for counts in _resampled(
            np.any(is_in, axis=0), resamples_for(_COST * len(row)), seed, _AT_A_TIME // len(row)
        )
    ]
    edges = np.nanquantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    estimates = {
        key: Estimate(float(found[0, i]), float(edges[0, i]), float(edges[1, i]))
        for i, key in enumerate(_FIGURES)
    }
    rows_out = len(np.unique(row[~truth]))
    for key, rate in _RATES.items():
        if rows_out * rate < LEAST_ALARMS:
            estimates[key] = Estimate()
    notes += _few_alarms(rows_out)
    at = np.unique(np.concatenate([np.geomspace(1 / n_out, 1, 100), np.linspace(0, 1, 51)]))
    curve = np.array([_tpr_at(fpr, tpr, rate)[0] for rate in at])
    # Mean of the Kolmogorov distribution: the advantage is the two-sample Kolmogorov-Smirnov statistic, one-sided.
    chance = math.sqrt(math.pi / 8) * math.sqrt(1 / n_in + 1 / n_out)
    return Attack(
        name, **estimates, advantage_by_chance=chance, n_in=n_in, n_out=n_out, fpr=at, tpr=curve, notes=notes
    )


def _few_alarms(rows_out: int) -> tuple[str, ...]:
    alarms = rows_out * _RATES["tpr_at_1_fpr"]
    if alarms < LEAST_ALARMS:
        return (
            f"1 % of the {rows_out} rows that were not trained on is less than one row: no rate at 1 % is told",
        )
    if alarms < FEW_ALARMS:
        return (
            f"the rate at 1 % false positives rests on the {int(alarms)} highest of {rows_out} other rows",
        )
    return ()


_FIGURES = ("auc", "tpr_at_1_fpr", "tpr_at_01_fpr", "advantage")


class _Roc:
    """ROC curves of pairs with scores `[n]`, each of a row; a row that is counted k times is k rows."""

    def __init__(self, score: np.ndarray, is_in: np.ndarray, row: np.ndarray) -> None:
        order = np.argsort(-score, kind="stable")
        self._is_in, self._row = is_in[order].astype(np.float64), row[order]
        # Equal scores are crossed in one step: no threshold parts them.
        ordered = score[order]
        self._ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))

    def __call__(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rates `[R, G + 1]` from (0, 0) to (1, 1), for counts of rows `[R, N]`."""
        weight = counts[:, self._row]
        rates = []
        for chosen in (1 - self._is_in, self._is_in):
            summed = np.zeros((len(counts), len(self._ends) + 1))
            if len(self._ends) == len(chosen):
                np.cumsum(weight * chosen, axis=1, out=summed[:, 1:])
            else:
                summed[:, 1:] = np.cumsum(weight * chosen, axis=1)[:, self._ends]
            total = summed[:, -1:]
            summed /= np.where(total > 0, total, np.nan)
            rates.append(summed)
        return rates[0], rates[1]

    def figures(self, fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
        """AUC, true positive rates at the two rates, and advantage: `[R, 4]`."""
        auc = np.einsum("rg,rg->r", np.diff(fpr, axis=1), tpr[:, 1:] + tpr[:, :-1]) / 2
        at = [_tpr_at(fpr, tpr, rate) for rate in _RATES.values()]
        return np.stack([auc, *at, (tpr - fpr).max(1)], axis=1)


def _tpr_at(fpr: np.ndarray, tpr: np.ndarray, rate: float) -> np.ndarray:
    """The largest true positive rate of a threshold with at most this false positive rate, `[R]`."""
    last = (fpr <= rate).sum(1) - 1
    return tpr[np.arange(len(tpr)), np.maximum(last, 0)]


def _resampled(is_seen: np.ndarray, resamples: int, seed: int, at_a_time: int) -> Iterator[np.ndarray]:
    """Counts `[R, N]`; rows that a member saw and the others are resampled among themselves."""
    random = np.random.default_rng(seed)
    strata = [np.flatnonzero(is_seen), np.flatnonzero(~is_seen)]
    for start in range(0, resamples, max(1, at_a_time)):
        counts = np.zeros((min(max(1, at_a_time), resamples - start), len(is_seen)))
        for one in counts:
            for rows in strata:
                if len(rows):
                    one[rows] = np.bincount(random.integers(len(rows), size=len(rows)), minlength=len(rows))
        yield counts

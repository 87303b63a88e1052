"""Metrics as functions of counts: how often each row is there. Ones give the data itself, other counts a resample.

Every function here makes a statistic of some rows, once; the statistic is then asked for many counts at a time.

Shape letters: R resamples, N rows, G bins or groups of ties, K classes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_array

Statistic = Callable[[np.ndarray], np.ndarray]
"""From counts `[R, N]` (fastest when their transpose is contiguous) to values `[R]`, or `[R, n]` of n metrics."""


def sums_of(columns: np.ndarray) -> Statistic:
    """Weighted sums of columns `[N, n]`, as `[R, n]`."""
    columns = np.ascontiguousarray(columns, np.float64)
    return lambda counts: counts @ columns


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of values `[N]`."""
    values = np.asarray(values, np.float64)
    return lambda counts: counts @ values / counts.sum(1)


def means_of(columns: Sequence[np.ndarray]) -> Statistic:
    """The means of several columns `[N]`, as `[R, n]`."""
    sums = sums_of(np.stack(columns, axis=1))
    return lambda counts: sums(counts) / counts.sum(1)[:, None]


def bin_sums(values: np.ndarray, bins: np.ndarray, num_bins: int) -> Statistic:
    """Sums of values `[N]` or `[N, n]` within bins of the same shape, as `[R, n · num_bins]`."""
    values, bins = values.reshape(len(values), -1), bins.reshape(len(bins), -1)
    num_rows, n = values.shape
    columns = bins + num_bins * np.arange(n)
    starts = np.arange(0, num_rows * n + 1, n)
    matrix = csr_array((values.ravel().astype(np.float64), columns.ravel(), starts), (num_rows, n * num_bins))
    by_bin = matrix.T.tocsr()
    return lambda counts: (by_bin @ np.ascontiguousarray(counts.T)).T


MANY_CLASSES = 100

# --- calibration ------------------------------------------------------------------------------------------------


def equal_width_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each value, of (0, 1], closed on the right: 1.0 is in the last, 0.0 in the first; NaN anywhere."""
    return np.clip(np.ceil(np.nan_to_num(confidence) * num_bins).astype(int) - 1, 0, num_bins - 1)


def equal_mass_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each row `[N]`: rows sorted by confidence; those of equal confidence share their middle rank."""
    _, inverse, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.minimum((middle * num_bins / len(confidence)).astype(int), num_bins - 1)[inverse]


def binned_gap(confidence: np.ndarray, correct: np.ndarray, bins: np.ndarray, num_bins: int) -> Statistic:
    """Expected and largest calibration error over given bins, `[R, 2]`.

    Σ_g (n_g / N) |accuracy_g − confidence_g| (Guo et al. 2017, arXiv:1706.04599, equation 3), and the largest
    |accuracy_g − confidence_g| of a bin with rows (equation 5). The bins stay those of the data.
    """
    gap_of = bin_sums(correct - confidence, bins, num_bins)
    size_of = bin_sums(np.ones(len(bins)), bins, num_bins)

    def statistic(counts: np.ndarray) -> np.ndarray:
        gap, size = np.abs(gap_of(counts)), size_of(counts)
        return np.stack([gap.sum(1) / size.sum(1), (gap / np.maximum(size, 1)).max(1)], axis=1)

    return statistic


def classwise(probs: np.ndarray, y: np.ndarray, num_bins: int) -> Statistic:
    """Classwise calibration error, and the parts of the Brier score, `[R, 4]`: (ECE, reliability, resolution,
    uncertainty).

    With equal-width bins of each class's probability: the mean over classes of Σ_g (n_g / N) |ō_g − p̄_g| (Kull et al.
    2019, arXiv:1910.12656, Section 2), and, summed over classes, reliability Σ_g (n_g / N)(p̄_g − ō_g)², uncertainty
    ō(1 − ō) and the resolution for which Brier = reliability − resolution + uncertainty holds exactly: that of Murphy
    (1973) with the variance inside bins counted in (Stephenson et al. 2008, equation 8).

    Args:
        probs: `[N, K]`.
        y: `[N]` labels.
        num_bins: Of each class.

    Beyond `MANY_CLASSES` only counts of one have a value: sums of every class for resamples would not fit in memory.
    """
    num_classes = probs.shape[1]
    if num_classes > MANY_CLASSES:
        whole = _classwise_value(probs, y, num_bins)
        return lambda counts: np.where((counts == 1).all(1)[:, None], whole, np.nan)
    one_hot = np.eye(num_classes)[y]
    bins = equal_width_bins(probs, num_bins)
    gap_of, size_of = bin_sums(one_hot - probs, bins, num_bins), bin_sums(np.ones_like(probs), bins, num_bins)
    sums = sums_of(np.column_stack([one_hot, np.square(probs - one_hot).sum(1)]))

    def statistic(counts: np.ndarray) -> np.ndarray:
        total = counts.sum(1)
        gap, size, found = gap_of(counts), size_of(counts), sums(counts) / total[:, None]
        share, brier = found[:, :-1], found[:, -1]
        ece = np.abs(gap).sum(1) / total / num_classes
        reliability = (np.square(gap) / np.maximum(size, 1)).sum(1) / total
        uncertainty = (share * (1 - share)).sum(1)
        return np.stack([ece, reliability, uncertainty + reliability - brier, uncertainty], axis=1)

    return statistic


def _classwise_value(probs: np.ndarray, y: np.ndarray, num_bins: int) -> np.ndarray:
    """The same on the data itself, class by class."""
    num_rows, num_classes = probs.shape
    ece = reliability = uncertainty = brier = 0.0
    for k in range(num_classes):
        p, is_k = probs[:, k].astype(np.float64), (y == k).astype(np.float64)
        bins = equal_width_bins(p, num_bins)
        gap, size = np.bincount(bins, is_k - p, num_bins), np.bincount(bins, minlength=num_bins)
        ece += np.abs(gap).sum() / num_rows / num_classes
        reliability += (np.square(gap) / np.maximum(size, 1)).sum() / num_rows
        uncertainty += is_k.mean() * (1 - is_k.mean())
        brier += np.square(p - is_k).mean()
    return np.array([ece, reliability, uncertainty + reliability - brier, uncertainty])


def smooth_gap(confidence: np.ndarray, correct: np.ndarray) -> Statistic:
    """Smooth calibration error: no bins, a Gaussian kernel whose width equals the error that it shows.

    smECE_σ = ∫ |Σ_i K_σ(t, p_i)(y_i − p_i)| dt / N with a kernel that is reflected at 0 and 1; it falls in σ, and smECE
    is the value with smECE_σ = σ (Błasiok & Nakkiran 2023, arXiv:2309.12236, Definition 2). On a grid of 1/200.
    """
    place = np.clip(np.nan_to_num(confidence), 0, 1) * _GRID
    left = np.minimum(place.astype(int), _GRID - 1)
    right_share = place - left
    gap = correct - confidence
    matrix = csr_array(
        (
            np.stack([gap * (1 - right_share), gap * right_share], axis=1).ravel(),
            np.stack([left, left + 1], axis=1).ravel(),
            np.arange(0, 2 * len(gap) + 1, 2),
        ),
        (len(gap), _GRID + 1),
    )
    to_grid = matrix.T.tocsr()
    kernels = [_reflected_kernel(width) for width in _WIDTHS]

    def statistic(counts: np.ndarray) -> np.ndarray:
        residual = (to_grid @ np.ascontiguousarray(counts.T)).T / counts.sum(1)[:, None]
        errors = np.stack([np.abs(residual @ kernel).mean(1) for kernel in kernels], axis=1)
        # The first width that is not below its error anymore, and the straight line to the one before.
        above = errors - _WIDTHS
        first = np.clip((above > 0).sum(1), 1, len(_WIDTHS) - 1)
        row = np.arange(len(above))
        high, low = above[row, first - 1], above[row, first]
        part = np.clip(high / np.where(high == low, 1.0, high - low), 0, 1)
        found = _WIDTHS[first - 1] + part * (_WIDTHS[first] - _WIDTHS[first - 1])
        return np.where(np.isnan(above).any(1), np.nan, np.where(above[:, 0] <= 0, errors[:, 0], found))

    return statistic


_GRID = 200
_WIDTHS = np.geomspace(1 / _GRID, 1.0, 24)


def _reflected_kernel(width: float) -> np.ndarray:
    """Density at cell centres of a Gaussian around each grid point, folded at 0 and 1; columns average to one."""
    points = np.arange(_GRID + 1) / _GRID
    centres = (np.arange(_GRID) + 0.5) / _GRID
    kernel = np.zeros((_GRID + 1, _GRID))
    for shift in range(-4, 5):
        for image in (centres + 2 * shift, 2 * shift - centres):
            kernel += np.exp(-0.5 * np.square((image - points[:, None]) / width))
    return kernel / kernel.mean(1, keepdims=True)


# --- ranking ----------------------------------------------------------------------------------------------------


def selective(
    uncertainty: np.ndarray, loss: np.ndarray, max_risk: float, groups: int | None = None
) -> Statistic:
    """Area under the risk-coverage curve, its excess, and the coverage at a risk: `[R, 3]`.

    The area is the mean over n of the mean loss among the n least uncertain rows (Geifman et al. 2019,
    arXiv:1805.08206, Section 2), ties in expectation over their order; the excess is over the order of the losses
    themselves (Section 3); the coverage is the largest share of rows, ties together, with a mean loss of at most
    `max_risk`.

    Args:
        uncertainty: `[N]`; the largest are deferred first.
        loss: `[N]`.
        max_risk: In units of the loss.
        groups: Rows are taken together in so many groups of neighbours, if they have more values; None = never.
    """
    area, best = _area(uncertainty, loss, groups), _area(loss, loss, groups)
    broken = bool(np.isnan(uncertainty).any() or np.isnan(loss).any())

    def statistic(counts: np.ndarray) -> np.ndarray:
        if broken:
            return np.full((len(counts), 3), np.nan)
        found, width, total_loss = area(counts)
        kept = np.where(total_loss <= max_risk * width + 1e-12, width, 0).max(0) / counts.sum(1)
        return np.stack([found, np.maximum(found - best(counts)[0], 0), kept], axis=1)

    return statistic


def _area(
    uncertainty: np.ndarray, loss: np.ndarray, groups: int | None
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The area `[R]`, and after each group of ties rows and loss so far, `[G, R]`.

    A group of W rows with mean loss e behind W0 rows with loss E0 adds Σ_{k=1..W} (E0 + k·e)/(W0 + k)
    = W·e + (E0 − W0·e)·(H(W0 + W) − H(W0)), with harmonic numbers H.
    """
    both = _within_groups(uncertainty, loss, groups)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(loss) + 1))])

    def area(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lost, width = both(counts)
        width_so_far, lost_so_far = np.cumsum(width, axis=0), np.cumsum(lost, axis=0)
        width_before = width_so_far - width
        rate = lost / np.maximum(width, 1)
        steps = harmonic[width_so_far.astype(int)] - harmonic[width_before.astype(int)]
        summed = (lost + (lost_so_far - lost - width_before * rate) * steps).sum(0)
        return summed / counts.sum(1), width_so_far, lost_so_far

    return area


def _within_groups(
    order_by: np.ndarray, values: np.ndarray, groups: int | None
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Sums of values, and rows, within groups of equal `order_by` ascending, `[G, R]` each.

    With `groups`, neighbours are taken together until there are at most so many groups, of about equal mass.
    """
    distinct, group = np.unique(order_by, return_inverse=True)
    num_groups = len(distinct)
    if groups is not None and num_groups > groups:
        group, num_groups = equal_mass_bins(order_by, groups), groups
    sums = bin_sums(values, group, num_groups)
    rows = bin_sums(np.ones(len(values)), group, num_groups)
    return lambda counts: (sums(counts).T, rows(counts).T)


def ranking(score: np.ndarray, positive: np.ndarray, groups: int | None = None) -> Statistic:
    """Areas under the ROC and the precision-recall curve, `[R, 2]`; NaN where one of the two kinds is missing.

    Ties count half in the first; the second is the average precision, a step at each distinct score, as in
    scikit-learn.

    Args:
        score: `[N]`, larger for positive rows.
        positive: `[N]` truth values.
        groups: As in `selective`.
    """
    both = _within_groups(-score, positive.astype(np.float64), groups)
    broken = bool(np.isnan(score).any())

    def statistic(counts: np.ndarray) -> np.ndarray:
        if broken:
            return np.full((len(counts), 2), np.nan)
        hits, width = both(counts)
        hits_so_far, width_so_far = np.cumsum(hits, axis=0), np.cumsum(width, axis=0)
        positives = hits_so_far[-1]
        negatives = width_so_far[-1] - positives
        # A positive row beats the negatives of all later groups, and half of those of its own.
        behind = negatives - (width_so_far - hits_so_far) + 0.5 * (width - hits)
        with np.errstate(invalid="ignore", divide="ignore"):
            roc = (hits * behind).sum(0) / (positives * negatives)
            precision = (hits * hits_so_far / np.maximum(width_so_far, 1)).sum(0) / positives
        return np.stack([roc, np.where(negatives > 0, precision, np.nan)], axis=1)

    return statistic


def recalls(correct: np.ndarray, y: np.ndarray, num_classes: int) -> Statistic:
    """The mean over classes, that are there, of the share of their rows that is right: balanced accuracy `[R]`."""
    one_hot = np.eye(num_classes)[y]
    sums = sums_of(np.concatenate([one_hot * correct[:, None], one_hot], axis=1))

    def statistic(counts: np.ndarray) -> np.ndarray:
        found = sums(counts)
        right, size = found[:, :num_classes], found[:, num_classes:]
        return (right / np.maximum(size, 1)).sum(1) / (size > 0).sum(1)

    return statistic


def ratio(above: np.ndarray, below: np.ndarray) -> Statistic:
    """Σ above / Σ below `[R]`; NaN where nothing is below."""
    sums = sums_of(np.stack([above, below], axis=1))

    def statistic(counts: np.ndarray) -> np.ndarray:
        found = sums(counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(found[:, 1] > 0, found[:, 0] / found[:, 1], np.nan)

    return statistic


def distance_from_uniform(values: np.ndarray) -> Statistic:
    """Kolmogorov's sup |F(u) − u| over [0, 1] of values `[N]`, as `[R]`."""
    order = np.argsort(values)
    ordered = values[order][:, None]

    def statistic(counts: np.ndarray) -> np.ndarray:
        steps = np.cumsum(counts.T[order], axis=0) / counts.sum(1)
        before = np.vstack([np.zeros((1, len(counts))), steps[:-1]])
        return np.maximum(np.abs(steps - ordered), np.abs(before - ordered)).max(0)

    return statistic

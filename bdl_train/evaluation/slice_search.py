"""Search a table for slices where the model is worse: found on one half of the rows, confirmed on the other.

Candidates are levels of categories, and decile thresholds and quartiles of numbers, joined by "and". A slice is ranked
by the lower bound of its difference to the rest,

    mean loss within − mean loss of the rest − √(2 ln C) · standard error,

where C is how many slices of as many conditions there are: the largest of C standard normal numbers is about
√(2 ln C), so a slice has to beat what the best of C slices of pure noise would show, and one of more conditions has to
be worse by more. From the second slice on, the bound has to hold without the rows of the slices before it too, as in
bump hunting: a part or a superset of a slice is not listed again unless it is worse for reasons of its own. SliceFinder
ranks by effect size under tests, SliceLine by mean error against size; both go through levels of ever more conditions,
as here.

Source:
    Chung et al. (2019), arXiv:1807.06068 (SliceFinder); Sagadeeva & Boehm (2021), SIGMOD (SliceLine); Friedman &
    Fisher (1999), Statistics and Computing 9 (covering, Section 2).

Shape letters: N rows, n rows of the searched half, C conditions, B slices of the beam.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError, unknown_choice
from bdl_train.evaluation.differences import CONFIDENCE, Regroupings, adjust, difference
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section
from bdl_train.evaluation.slices import losses_of, p_text, table_of
from bdl_train.evaluation.slicing import Column, Columns, Piece, short_number

TITLE = "Search for slices where it is worse"
MOST_SEARCHED, MOST_CONDITIONS, BEAM = 10_000, 600, 200
"""Rows of the searched half (all others confirm), conditions, and slices of a level that get one more condition."""
SAME = 0.8
"""Jaccard index above which two slices are one."""


@dataclass(frozen=True)
class Found:
    """A row of `found`: a slice in words, its rows in the table, and its mean loss in both halves.

    `rest`, `difference`, its interval and p-values are of the confirming half, of whose rows `n_confirm` are in it.
    """

    slice: str
    n: int
    loss_search: float
    loss_confirm: float
    rest: float
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    significant: bool
    n_confirm: int
    test: str
    reason: str | None


def find_slices(
    table: pd.DataFrame,
    rows: RowScores,
    *,
    loss: str,
    seed: int,
    max_conditions: int = 2,
    min_rows: int = 30,
    top: int = 5,
) -> pd.DataFrame:
    """The worst slices of a table, most conspicuous first on the searched half; columns are those of `Found`.

    Args:
        table: Raw cells of the N scored rows, without the target.
        rows: Their scores.
        loss: `nll`, or `error_rate` of classes, or `absolute_error` of numbers.
        seed: Of the halves, and of permutation tests.
        max_conditions: 1 to 3.
        min_rows: Of a slice, and of the rows outside it, in the searched half.
        top: How many slices at most are taken to the confirming half; p-values are adjusted over these.

    Raises:
        UsageError: a wrong setting, too few rows, or a loss that is not finite.
    """
    found, _ = _search(table, rows, loss, seed, max_conditions, min_rows, top)
    return table_of(Found, found)


def search_section(
    table: pd.DataFrame,
    rows: RowScores,
    *,
    loss: str,
    seed: int,
    max_conditions: int = 2,
    min_rows: int = 30,
    top: int = 5,
) -> Section:
    """`find_slices` as a section with the table `found`; see there."""
    found, notes = _search(table, rows, loss, seed, max_conditions, min_rows, top)
    tables = {"found": table_of(Found, found)}
    if len(table) // 2 > MOST_SEARCHED:
        notes.append(f"{MOST_SEARCHED} of {len(table)} rows were searched; all the others confirm.")
    if 0 < len(found) < top:
        notes.append(
            f"{len(found)} instead of {top} slices were found: no other has {min_rows} rows inside and outside that "
            "are in none of these."
        )
    untold = [f"'{one.slice}' ({one.reason})" for one in found if one.reason is not None]
    if untold:
        notes.append(f"Not tested on the confirming half: {', '.join(untold)}.")
    if not found:
        verdict = f"No slice has rows enough: none has {min_rows} inside and outside in the searched half."
        return Section("slice_search", TITLE, verdict, "note", tables, tuple(notes))
    confirmed = [one for one in found if one.significant]
    if not confirmed:
        verdict = (
            f"None of {len(found)} slices that looked worst on one half of the rows has a higher {loss} beyond chance "
            "on the other half."
        )
        return Section("slice_search", TITLE, verdict, "note", tables, tuple(notes))
    worst = max(confirmed, key=lambda one: one.difference)
    verdict = (
        f"Worst slice: {worst.slice} (n = {worst.n}), {loss} {worst.loss_confirm:.3g} against {worst.rest:.3g} in the "
        f"rest (difference {worst.low:.3g} to {worst.high:.3g}, adjusted {p_text(worst.p_adjusted)}). "
        f"{len(confirmed)} of {len(found)} slices that were found on one half of the rows are confirmed on the other."
    )
    return Section("slice_search", TITLE, verdict, "warn", tables, tuple(notes))


def _search(
    table: pd.DataFrame, rows: RowScores, loss: str, seed: int, max_conditions: int, min_rows: int, top: int
) -> tuple[list[Found], list[str]]:
    """The slices, and what was left out of the search."""
    values = _values(rows, loss)
    if not 1 <= max_conditions <= 3:
        raise UsageError(f"max_conditions of a slice search is 1, 2 or 3, not {max_conditions}.")
    if min_rows < 2 or top < 1:
        raise UsageError(f"A slice search needs min_rows ≥ 2 and top ≥ 1, not {min_rows} and {top}.")
    if len(table) != len(values):
        raise UsageError(f"The table has {len(table)} rows, but {len(values)} rows are scored.")
    if len(table) < 4 * min_rows:
        raise UsageError(
            f"A slice search needs 4 · min_rows = {4 * min_rows} rows, half of them to confirm, but there are "
            f"{len(table)}."
        )
    order = np.random.default_rng(seed).permutation(len(values))
    num_searched = min(len(values) // 2, MOST_SEARCHED)
    search, confirm = np.sort(order[:num_searched]), np.sort(order[num_searched:])
    regroup, compared = Regroupings(seed), []
    conditions, notes = _enough(conditions_of(table), search, min_rows)
    for name, mask in _worst(conditions, search, values[search], max_conditions, min_rows, top):
        inside = mask[confirm]
        gap = difference(values[confirm][inside], values[confirm][~inside], regroup)
        compared.append((name, mask, float(values[search][mask[search]].mean()), int(inside.sum()), gap))
    adjusted = adjust(np.array([gap.p for *_, gap in compared])).tolist()
    return [
        Found(
            name, int(mask.sum()), before, gap.mean, gap.rest, gap.difference, gap.low, gap.high, gap.p, p,
            p <= 1 - CONFIDENCE and gap.difference > 0, n_confirm, gap.test, gap.reason,
        )
        for (name, mask, before, n_confirm, gap), p in zip(compared, adjusted, strict=True)
    ], notes  # fmt: skip


def _values(rows: RowScores, key: str) -> np.ndarray:
    losses = {loss.key: loss.values for loss in losses_of(rows, "") if loss.is_loss}
    if key not in losses:
        raise UsageError(unknown_choice("loss of a slice search", key, losses))
    values = np.asarray(losses[key], np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        others = " or ".join(name for name in losses if name != key)
        raise UsageError(
            f"The {key} of {bad} rows is not finite, so no slice has a mean: search by {others}."
        )
    return values


# --- candidates ---------------------------------------------------------------------------------------------------


def conditions_of(table: pd.DataFrame) -> Iterator[Piece]:
    """Conditions in words, each an expression of `slicing`, and their rows `[N]`, column by column.

    A category has one a level; a number both sides of its deciles, and its quartiles. A column with another text in
    nearly every row has none.
    """
    columns = Columns(table)
    for name in reversed(columns.names):
        column = columns[name]
        try:
            pieces, _ = column.pieces()
        except UsageError:
            continue
        yield from (dict(pieces) | dict(_sides(column))).items()


def _sides(column: Column) -> list[Piece]:
    """Both sides of the deciles of a number; thresholds are short numbers between two values."""
    if column.numbers is None:
        return []
    present = column.numbers[~column.missing]
    values = np.unique(present)
    pieces = []
    for edge in np.unique(np.quantile(present, np.arange(1, 10) / 10, method="inverted_cdf")):
        place = int(np.searchsorted(values, edge))
        if place + 1 == len(values):
            continue
        text = short_number(float(edge), float(edge), float(np.nextafter(values[place + 1], -np.inf)))
        pieces.append((f"{column.name}<={text}", column.numbers <= edge))
        pieces.append((f"{column.name}>{text}", column.numbers > edge))
    return pieces


# --- the search ---------------------------------------------------------------------------------------------------


def _enough(conditions: Iterable[Piece], search: np.ndarray, min_rows: int) -> tuple[list[Piece], list[str]]:
    """Conditions that have rows enough inside and outside, the largest first; and a note if there are too many.

    They are taken one by one, and no more than twice the most are held: masks are as long as the table.
    """
    kept: list[tuple[int, int, Piece]] = []
    count = 0
    for place, piece in enumerate(conditions):
        size = int(piece[1][search].sum())
        if min_rows <= size <= len(search) - min_rows:
            count += 1
            kept.append((-size, place, piece))
        if len(kept) >= 2 * MOST_CONDITIONS:
            kept = sorted(kept, key=lambda one: one[:2])[:MOST_CONDITIONS]
    kept = sorted(kept, key=lambda one: one[:2])[:MOST_CONDITIONS]
    notes = []
    if count > MOST_CONDITIONS:
        notes.append(f"The {MOST_CONDITIONS} conditions of the most rows were searched, of {count}.")
    return [piece for *_, piece in kept], notes


@dataclass(frozen=True, eq=False)
class _Level:
    """Slices of one number of conditions, the best first: masks `[B, n]`, their conditions, and lower bounds `[B]`."""

    masks: np.ndarray
    parts: list[tuple[int, ...]]
    bound: np.ndarray


def _worst(
    conditions: list[Piece],
    search: np.ndarray,
    values: np.ndarray,
    max_conditions: int,
    min_rows: int,
    top: int,
) -> list[Piece]:
    """The worst slices, one after the other, with their rows `[N]`."""
    if not conditions:
        return []
    masks_Cn = np.stack([mask[search] for _, mask in conditions])
    # Around zero and of unit size, so that sums of float32 stay exact enough.
    scaled = ((values - values.mean()) / (values.std() or 1.0)).astype(np.float32)
    taken: list[np.ndarray] = []
    found: list[Piece] = []
    while len(found) < top:
        best = _next(masks_Cn, scaled, taken, max_conditions, min_rows)
        if best is None:
            break
        taken.append(np.logical_and.reduce(masks_Cn[list(best)]))
        name = " & ".join(conditions[i][0] for i in best)
        found.append((name, np.logical_and.reduce([conditions[i][1] for i in best])))
    return found


def _next(
    masks_Cn: np.ndarray, scaled: np.ndarray, taken: list[np.ndarray], max_conditions: int, min_rows: int
) -> tuple[int, ...] | None:
    """The conditions of the slice with the highest lower bound that is no near copy of those taken."""
    num_conditions = len(masks_Cn)
    level = _Level(np.ones((1, len(scaled)), bool), [()], np.zeros(1))
    best, highest = None, -np.inf
    for size in range(1, max_conditions + 1):
        reach = math.sqrt(2 * math.log(math.comb(num_conditions, size) or 1))
        # Every pair is looked at; a third condition is added to the best pairs alone.
        level = _deeper(
            level, masks_Cn, scaled, taken, min_rows, reach, num_conditions if size == 1 else BEAM
        )
        for mask, part, bound in zip(level.masks, level.parts, level.bound, strict=True):
            if bound <= highest:
                break
            if all((mask & other).sum() <= SAME * (mask | other).sum() for other in taken):
                best, highest = part, bound
                break
    return best


def _deeper(
    beam: _Level,
    masks_Cn: np.ndarray,
    scaled: np.ndarray,
    taken: list[np.ndarray],
    min_rows: int,
    reach: float,
    most: int,
) -> _Level:
    """The best slices of one condition more than those of the beam."""
    bound_BC = lower_bounds(beam.masks, masks_Cn, scaled, min_rows, reach)
    if taken:
        left = ~np.logical_or.reduce(taken)
        rows, columns = _known(bound_BC)
        without = lower_bounds(
            beam.masks[np.ix_(rows, left)], masks_Cn[np.ix_(columns, left)], scaled[left], min_rows, reach
        )
        bound_BC[np.ix_(rows, columns)] = np.minimum(bound_BC[np.ix_(rows, columns)], without)
    for b, part in enumerate(beam.parts):
        bound_BC[b, list(part)] = -np.inf
    # A slice is there once for each order of its conditions.
    flat = bound_BC.ravel()
    count = min(flat.size, most * (len(beam.parts[0]) + 1)) if beam.parts else 0
    picked = np.argpartition(-flat, count - 1)[:count] if count else np.empty(0, int)
    picked = picked[np.lexsort((picked, -flat[picked]))]
    places: dict[tuple[int, ...], int] = {}
    for place in picked[np.isfinite(flat[picked])].tolist():
        b, c = divmod(place, len(masks_Cn))
        places.setdefault(tuple(sorted((*beam.parts[b], c))), place)
    kept = np.array(list(places.values())[:most], int)
    masks = beam.masks[kept // len(masks_Cn)] & masks_Cn[kept % len(masks_Cn)]
    return _Level(masks, list(places)[:most], flat[kept])


def lower_bounds(
    masks_Bn: np.ndarray, masks_Cn: np.ndarray, values: np.ndarray, min_rows: int, reach: float
) -> np.ndarray:
    """`[B, C]`: mean within each slice and condition − mean of the rest − `reach` standard errors (Welch's).

    −inf where fewer than `min_rows` rows are inside or outside.
    """
    count = _product(masks_Bn, masks_Cn)
    enough = (count >= min_rows) & (count <= len(values) - min_rows)
    bound = np.where(enough, 0.0, -np.inf)
    # Small levels have few rows in common: sums are taken where some slice has rows enough.
    rows, columns = _known(bound)
    at = np.ix_(rows, columns)
    slices, conditions = masks_Bn[rows], masks_Cn[columns]
    total, squares = _product(slices * values, conditions), _product(slices * values**2, conditions)
    inside = np.where(enough[at], count[at], 2.0)
    outside = np.where(enough[at], len(values) - count[at], 2.0)
    every, all_squares = float(values.sum(dtype=np.float64)), float((values**2).sum(dtype=np.float64))
    a, b = total / inside, (every - total) / outside
    variance = np.maximum(squares / inside - a**2, 0.0) / (inside - 1)
    variance += np.maximum((all_squares - squares) / outside - b**2, 0.0) / (outside - 1)
    bound[at] += a - b - reach * np.sqrt(variance)
    return bound


def _known(bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that hold a finite number."""
    finite = np.isfinite(bound)
    return np.flatnonzero(finite.any(1)), np.flatnonzero(finite.any(0))


def _product(left_Bn: np.ndarray, right_Cn: np.ndarray) -> np.ndarray:
    return (left_Bn.astype(np.float32) @ right_Cn.T.astype(np.float32)).astype(np.float64)

"""How scores and uncertainty change as inputs leave the training data: sweeps over the severity of shifts.

A model that knows its limits becomes less certain where it becomes wrong (Ovadia et al., 2019, arXiv:1906.02530,
Section 4). Shape letters: N rows, F features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from numpy.random import Generator, SeedSequence, default_rng

from bdl_train.data import Part
from bdl_train.data._table import TableTransform
from bdl_train.errors import UsageError, unknown_choice
from bdl_train.evaluation._growth import (
    Curve,
    Measures,
    Scored,
    curves_table,
    growth_table,
    measured,
    verdict_of,
)
from bdl_train.evaluation.corruptions import CORRUPTIONS, SEVERITIES, check_images
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section
from bdl_train.evaluation.table_shifts import (
    covariate_shift,
    feature_noise,
    label_noise,
    missing_cells,
    missing_columns,
    table_features,
)
from bdl_train.specs import InputSpec, TargetSpec

KEY, TITLE = "robustness", "Robustness"
LEAST_ROWS = 50
"""Below so many rows, or rows' worth of weight, a warning says that the numbers are rough."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How far to go. Images use the first two, tables the others.

    Attributes:
        corruptions: Names out of `CORRUPTIONS`; None = all.
        severities: Some of 1..5, rising.
        noise: Strengths of `feature_noise`, rising, training standard deviations.
        num_missing: How many features each row loses at random, rising; more than there are is left out.
        tilts: Strengths of `covariate_shift`, rising, standard deviations.
        label_shares: Of wrong labels, rising.
        max_features: Most features that are left out alone, chosen at random; None = all.
        max_rows: Most rows, chosen at random; None = all.
    """

    corruptions: tuple[str, ...] | None
    severities: tuple[int, ...]
    noise: tuple[float, ...]
    num_missing: tuple[int, ...]
    tilts: tuple[float, ...]
    label_shares: tuple[float, ...]
    max_features: int | None
    max_rows: int | None

    def __post_init__(self) -> None:
        for name in ("severities", "noise", "num_missing", "tilts", "label_shares"):
            values = getattr(self, name)
            if any(low >= high for low, high in zip((0, *values), values, strict=False)):
                raise UsageError(f"{name} must rise from above 0, got {list(values)}: sort it and drop 0.")
        for severity in set(self.severities) - set(SEVERITIES):
            raise UsageError(f"severities are whole numbers from 1 to 5, got {severity}: change severities.")
        for share in self.label_shares:
            if share > 1:
                raise UsageError(f"label_shares lie between 0 and 1, got {share}: change label_shares.")
        for name in set(self.corruptions or ()) - set(CORRUPTIONS):
            raise UsageError(unknown_choice("image corruption", name, CORRUPTIONS))
        for name in ("max_features", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, or null for all, got {value}: change it.")


@dataclass(frozen=True)
class _Shift:
    """One kind of shift."""

    kind: str
    severities: tuple[float, ...]
    scored: Callable[[float, Generator], Scored]
    seed: SeedSequence  # the same noise at every severity, and whatever other kinds there are
    seen_in_inputs: bool = True


@dataclass(frozen=True)
class _Bench:
    """What every shift of a run needs."""

    score: Callable[[Part], RowScores]
    part: Part
    clean: RowScores
    measures: Measures
    inputs: InputSpec
    transform: TableTransform | None
    target: TargetSpec
    seed: int
    sweep: Sweep

    def stream(self, *key: int) -> SeedSequence:
        return SeedSequence(self.seed, spawn_key=key)

    def with_x(self, x: np.ndarray) -> Scored:
        return self.score(replace(self.part, x=x)), None


def robustness_section(
    score: Callable[[Part], RowScores],
    part: Part,
    *,
    inputs: InputSpec,
    transform: TableTransform | None,
    target: TargetSpec,
    seed: int,
    sweep: Sweep,
    say: Callable[[str], None] | None = None,
) -> Section:
    """Score a part under shifts of growing severity.

    Tables of the section: `curves` (kind, severity, metric, value, low, high, n; severity 0 is the clean part),
    `growth` (a row a kind, see `growth_table`), and for tables of data `missing` (a row a feature left out alone, the
    most harmful first; `damage` is the rise of the NLL). Edges are 95 % bootstrap intervals over rows; those of
    changes are paired, and a row that a covariate shift drew twice counts as one.

    Args:
        score: Of any part with inputs and targets like those of `part`.
        part: Clean rows; uint8 images, or an encoded table.
        inputs, transform, target: Of the run that made `score`.
        seed: Of the rows, of all shifts and of the resamples.
        sweep: How far to go.
        say: Called with a line of progress after every kind.

    Raises:
        UsageError: no rows, or inputs that are neither a table nor uint8 images.
    """
    if len(part) == 0:
        raise UsageError("This part of the data has no rows to shift: choose another `part`.")
    tell = say or (lambda line: None)
    chosen, warnings = _chosen_rows(part, seed, sweep)
    is_table = len(inputs.shape) == 1
    if not is_table:
        check_images(part.x)
    clean = score(chosen)
    bench = _Bench(score, chosen, clean, Measures.of(clean), inputs, transform, target, seed, sweep)
    curves = []
    for shift in _table_shifts(bench) if is_table else _image_shifts(bench):
        curve, notes = _curve(shift, bench)
        curves.append(curve)
        warnings += notes
        quality = bench.measures.quality
        ends = [f"{curve.values[i][quality][0]:.4g}" for i in (0, -1)]
        tell(f"{shift.kind} up to severity {shift.severities[-1]:g}: {quality} {ends[0]} to {ends[1]}")
    growth = growth_table(curves, bench.measures)
    tables = {"curves": curves_table(curves, len(chosen)), "growth": growth}
    verdict, level = verdict_of(growth, curves, bench.measures)
    if is_table:
        tables["missing"], notes = _missing(bench)
        warnings += notes
        most = tables["missing"].iloc[0]
        verdict += f" Of single features, {most['feature']} is missed most: the NLL changes by {most['damage']:+.3g}."
        tell(f"{len(tables['missing'])} features left out alone")
    return Section(KEY, TITLE, verdict, level, tables, tuple(warnings))


def _chosen_rows(part: Part, seed: int, sweep: Sweep) -> tuple[Part, list[str]]:
    notes = []
    if sweep.max_rows is not None and sweep.max_rows < len(part):
        random = default_rng(SeedSequence(seed, spawn_key=(0,)))
        rows = np.sort(random.permutation(len(part))[: sweep.max_rows])
        notes.append(f"{len(rows)} of {len(part)} rows, chosen at random (max_rows).")
        part = Part(part.x[rows], part.y[rows], part.rows[rows])
    if len(part) < LEAST_ROWS:
        notes.append(f"There are only {len(part)} rows: all numbers are rough, see their intervals.")
    return part, notes


# --- the shifts ---------------------------------------------------------------------------------------------------


def _image_shifts(bench: _Bench) -> Iterator[_Shift]:
    def scored(name: str, severity: float, random: Generator) -> Scored:
        return bench.with_x(CORRUPTIONS[name](bench.part.x, int(severity), random))

    asked, severities = bench.sweep.corruptions, bench.sweep.severities
    for i, name in enumerate(CORRUPTIONS):
        if severities and (asked is None or name in asked):
            yield _Shift(name, severities, partial(scored, name), bench.stream(1, i))
    if bench.sweep.label_shares:
        yield _wrong_labels(bench)


def _table_shifts(bench: _Bench) -> Iterator[_Shift]:
    part, inputs, transform, sweep = bench.part, bench.inputs, bench.transform, bench.sweep
    num_features = len(table_features(inputs))

    def noise(strength: float, random: Generator) -> Scored:
        return bench.with_x(feature_noise(part.x, inputs, transform, strength, random))

    def missing(count: float, random: Generator) -> Scored:
        # The ranks of random numbers are a random order of the features, row by row.
        ranks = random.random((len(part), num_features)).argsort(1).argsort(1)
        return bench.with_x(missing_cells(part.x, inputs, transform, ranks < count))

    def tilted(strength: float, random: Generator) -> Scored:
        rows = covariate_shift(part.x, strength, random)
        return bench.clean.take(rows), rows

    possible = tuple(count for count in sweep.num_missing if count <= num_features)
    found = (
        _Shift("feature_noise", sweep.noise, noise, bench.stream(2, 0)),
        _Shift("missing_features", possible, missing, bench.stream(2, 1)),
        _Shift("covariate_shift", sweep.tilts, tilted, bench.stream(2, 2)),
        _wrong_labels(bench),
    )
    yield from (shift for shift in found if shift.severities)


def _wrong_labels(bench: _Bench) -> _Shift:
    def labels(share: float, random: Generator) -> Scored:
        y = label_noise(bench.part.y, share, bench.target.num_classes or None, random)
        return bench.score(replace(bench.part, y=y)), None

    return _Shift("label_noise", bench.sweep.label_shares, labels, bench.stream(2, 3), seen_in_inputs=False)


# --- what they do -------------------------------------------------------------------------------------------------


def _curve(shift: _Shift, bench: _Bench) -> tuple[Curve, list[str]]:
    """Values and changes over the severities of one kind, and what a reader must know of them."""
    levels = [shift.scored(severity, default_rng(shift.seed)) for severity in shift.severities]
    values, changes = measured(bench.clean, levels, bench.measures, bench.seed)
    curve = Curve(shift.kind, shift.seen_in_inputs, (0.0, *map(float, shift.severities)), values, changes)
    notes = []
    for severity, (_, rows) in zip(shift.severities, levels, strict=True):
        effective = np.inf if rows is None else len(rows) ** 2 / np.square(np.bincount(rows)).sum()
        if effective < LEAST_ROWS <= len(bench.part):
            notes.append(
                f"{shift.kind} of severity {severity:g} rests on rows worth {effective:.0f} different ones only."
            )
    if not shift.seen_in_inputs and any(change[bench.measures.total][0] != 0 for change in changes):
        notes.append(
            f"{shift.kind} changed the uncertainty, which must not depend on targets: distrust `score`."
        )
    return curve, notes


def _missing(bench: _Bench) -> tuple[pd.DataFrame, list[str]]:
    """Every feature left out alone, the most harmful first."""
    names, most, notes = list(table_features(bench.inputs)), bench.sweep.max_features, []
    too_many = [count for count in bench.sweep.num_missing if count > len(names)]
    if too_many:
        notes.append(
            f"There are {len(names)} features, so {too_many} missing ones are left out (num_missing)."
        )
    if most is not None and most < len(names):
        picked = np.sort(default_rng(bench.stream(3)).permutation(len(names))[:most])
        notes.append(f"{most} of {len(names)} features are left out alone, chosen at random (max_features).")
        names = [names[i] for i in picked]
    rows, shown = [], bench.measures.shown
    for name in names:
        x = missing_columns(bench.part.x, bench.inputs, bench.transform, [name])
        values, changes = measured(bench.clean, [bench.with_x(x)], bench.measures, bench.seed)
        damage = dict(zip(("damage", "damage_low", "damage_high"), changes[1]["nll"], strict=True))
        found = {key: values[1][key][0] for key in shown}
        found |= {f"{key}_change": changes[1][key][0] for key in shown}
        rows.append({"feature": name, **damage, **found, "n": len(bench.part)})
    return pd.DataFrame(rows).sort_values("damage", ascending=False, ignore_index=True), notes

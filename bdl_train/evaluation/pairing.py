"""Which runs and rows of two experiments belong together, for paired differences; what is left over is told.

Runs are matched by split and seed, and their data must have the same fingerprint.

Shape letters: N rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bdl_train.errors import UsageError
from bdl_train.evaluation.paired import (
    RowMetric,
    SplitScores,
    row_metrics,
)

MOST_NAMED = 3
"""Runs that a message names; of more it tells the number."""


@dataclass(frozen=True)
class ScoredRun:
    """What pairing needs of a run.

    Attributes:
        name: For people.
        repeat: Split and seed, as in its config.
        fingerprint: Of its data.
        num_train: Training rows, or None if that is not known.
        columns: Of its scored rows: `row` (ids), `y`, and scores, `[N]` each.
        unit: Of a numeric target.
    """

    name: str
    repeat: tuple[object, object]
    fingerprint: str
    num_train: int | None
    columns: Mapping[str, np.ndarray]
    unit: str = ""


@dataclass(frozen=True)
class ScoredExperiment:
    """Runs that differ only in split and seed."""

    name: str
    runs: Sequence[ScoredRun]


Pair = tuple[ScoredRun, ScoredRun]
"""Of the baseline, and of the other experiment."""


def matched(
    experiments: Sequence[ScoredExperiment], baselines: Sequence[str], warnings: list[str]
) -> tuple[list[ScoredExperiment], dict[str, list[tuple[ScoredExperiment, list[Pair]]]]]:
    """Baselines, and by their name the experiments that can be paired with them."""
    chosen = [one for one in experiments if one.name in baselines]
    for i, one in enumerate(chosen):
        for base in chosen[:i]:
            if _pairs(base, one):
                raise UsageError(
                    f"baseline holds two experiments on the same data, {base.name} and {one.name}: name one of them."
                )
    found: dict[str, list[tuple[ScoredExperiment, list[Pair]]]] = {one.name: [] for one in chosen}
    for other in experiments:
        if other.name in found:
            continue
        base, pairs = next(((base, pairs) for base in chosen if (pairs := _pairs(base, other))), (None, []))
        if base is not None:
            found[base.name].append((other, pairs))
            warnings += _left_over(base, other, pairs)
        elif baselines:
            warnings += [_why_not(base, other) for base in chosen]
        else:
            chosen.append(other)
            found[other.name] = []
    if not baselines and len(chosen) > 1:
        lonely = [one for one in chosen if not found[one.name]]
        # Two that are both alone are told once.
        told = {frozenset((one.name, chosen[one is chosen[0]].name)): one for one in lonely}
        warnings += [_why_not(chosen[one is chosen[0]], one) for one in told.values()]
    return chosen, found


def _pairs(base: ScoredExperiment, other: ScoredExperiment) -> list[Pair]:
    """The first run of each split and seed, where both have one on the same data."""
    mine, theirs = _by_repeat(base), _by_repeat(other)
    both = [(mine[repeat], theirs[repeat]) for repeat in mine if repeat in theirs]
    return [(one, run) for one, run in both if one.fingerprint == run.fingerprint]


def _by_repeat(experiment: ScoredExperiment) -> dict[tuple[object, object], ScoredRun]:
    found: dict[tuple[object, object], ScoredRun] = {}
    for run in experiment.runs:
        found.setdefault(run.repeat, run)
    return found


def _why_not(base: ScoredExperiment, other: ScoredExperiment) -> str:
    mine, theirs = _by_repeat(base), _by_repeat(other)
    shared = [repeat for repeat in mine if repeat in theirs]
    head = f"{other.name} cannot be paired with {base.name}: "
    if not shared:
        return f"{head}they share no split and seed ({_repeats(theirs)} against {_repeats(mine)})."
    one, run = mine[shared[0]], theirs[shared[0]]
    return (
        f"{head}their data differ (at {_repeats(shared[:1])} the fingerprints are {run.fingerprint[:12]} and "
        f"{one.fingerprint[:12]})."
    )


def _left_over(base: ScoredExperiment, other: ScoredExperiment, pairs: Sequence[Pair]) -> Iterator[str]:
    mine, theirs = _by_repeat(base), _by_repeat(other)
    paired = {one.repeat for one, _ in pairs}
    for owner, own, others in ((base, mine, theirs), (other, theirs, mine)):
        alone = [repeat for repeat in own if repeat not in others]
        if alone:
            partner = other if owner is base else base
            yield f"{owner.name} has no partner in {partner.name} at {_repeats(alone)}: not paired."
        twice = len(owner.runs) - len(own)
        if twice:
            yield f"{owner.name} has {twice} more runs of the same split and seed: only the first is paired."
    differ = [repeat for repeat in mine if repeat in theirs and repeat not in paired]
    if differ:
        yield (
            f"{other.name} and {base.name} are on different data at {_repeats(differ)} (other fingerprints): "
            "not paired."
        )


def _repeats(repeats: Sequence[tuple[object, object]] | Mapping[tuple[object, object], ScoredRun]) -> str:
    texts = [f"seed {seed}" if split is None else f"split {split}, seed {seed}" for split, seed in repeats]
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return "; ".join(texts[:MOST_NAMED]) + more


def splits_of(
    base: ScoredExperiment, other: ScoredExperiment, pairs: Sequence[Pair], warnings: list[str]
) -> list[SplitScores]:
    """Pairs that score the same rows are one split, with their scores averaged row by row."""
    by_rows: dict[bytes, list[tuple[np.ndarray, Pair, list[dict[RowMetric, np.ndarray]]]]] = {}
    for pair in pairs:
        places, ids, note = _shared_rows(*pair)
        if note:
            warnings.append(f"{other.name} against {base.name}, {_repeats([pair[0].repeat])}: {note}")
        if len(ids):
            scores = [
                {metric: values[place] for metric, values in row_metrics(run.columns).items()}
                for run, place in zip(pair, places, strict=True)
            ]
            by_rows.setdefault(ids.tobytes(), []).append((ids, pair, scores))
    return [_split(members) for members in by_rows.values()]


def _shared_rows(mine: ScoredRun, theirs: ScoredRun) -> tuple[list[np.ndarray], np.ndarray, str]:
    """Places of the rows that both score, their ids, and what must be told."""
    ids, here, there = np.intersect1d(
        mine.columns["row"], theirs.columns["row"], assume_unique=True, return_indices=True
    )
    alone = len(mine.columns["row"]) + len(theirs.columns["row"]) - 2 * len(ids)
    note = f"{alone} rows are scored by one run only and left out." if alone else ""
    if not len(ids):
        return [here, there], ids, "the runs score no row in common: not paired."
    if ("correct" in mine.columns) != ("correct" in theirs.columns):
        return [here, there], ids[:0], "one predicts classes, the other numbers: not paired."
    if not np.array_equal(mine.columns["y"][here], theirs.columns["y"][there], equal_nan=True):
        return [here, there], ids[:0], "the same rows have different targets: not paired."
    return [here, there], ids, note


def _split(members: Sequence[tuple[np.ndarray, Pair, list[dict[RowMetric, np.ndarray]]]]) -> SplitScores:
    ids = members[0][0]
    sizes = [run.num_train for _, pair, _ in members for run in pair]
    known = [size for size in sizes if size]
    names = dict.fromkeys(
        "–" if pair[0].repeat[0] is None else str(pair[0].repeat[0]) for _, pair, _ in members
    )
    baseline, model = (
        {
            metric: np.mean([scores[i][metric] for _, _, scores in members], axis=0)
            for metric in members[0][2][i]
        }
        for i in (0, 1)
    )
    share = len(ids) / min(known) if len(known) == len(sizes) else None
    return SplitScores(", ".join(names), ids, model, baseline, share, len(members))

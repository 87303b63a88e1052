"""The privacy chapter: membership inference against the ensemble and its members, and a model-inversion probe.

Shape letters: M members, N rows.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError
from bdl_train.evaluation.inversion import ALL, Inversion
from bdl_train.evaluation.membership import Attack, judge, likelihood_ratios
from bdl_train.evaluation.section import Level, Section

KEY, TITLE = "privacy", "Privacy"
AUC_WARN, TPR_WARN = 0.55, 0.02
"""Lower bounds above which the verdict warns: this package's own thresholds, no standard."""
LEAST_ROWS = 20
"""Of each kind in a slice, before an attack on it is told."""


class Slice(Protocol):
    """A named part of the rows; `mask` is `[N]`."""

    @property
    def name(self) -> str: ...

    @property
    def mask(self) -> np.ndarray: ...


def privacy_section(
    nll: np.ndarray,
    is_train: np.ndarray,
    *,
    log_prob: np.ndarray,
    is_in: np.ndarray,
    is_density: bool,
    seed: int,
    slices: Sequence[Slice] = (),
    inversion: Inversion | None = None,
) -> Section:
    """How much the model gives away of its training rows.

    All arrays are of the same N rows, training and test rows mixed; rows of a validation part belong to neither.

    Args:
        nll: `[N]` of the ensemble, nats.
        is_train: `[N]` bool, rows of the train part.
        log_prob: `[M, N]`, log p(y|x) of each member alone.
        is_in: `[M, N]` bool, whether the member was trained on the row (`posteriors.artefact.training_rows`).
        is_density: The target is a number or a count, `log_prob` is no log probability of a class.
        seed: Of the resamples.
        slices: Of the rows, `[N]` masks.
        inversion: Of `inversion_probe`.

    Raises:
        UsageError: arrays that do not fit together, NaN, or no rows of one kind.
    """
    _check(nll, is_train, log_prob, is_in, slices)
    scored = [
        ("loss of the ensemble", -nll[None], is_train[None], ()),
        ("loss of a member", log_prob.astype(np.float64), is_in, ()),
    ]
    warnings: list[str] = []
    try:
        ratios, note = likelihood_ratios(log_prob, is_in, is_density=is_density)
        scored.append(("likelihood ratio", ratios, is_in, (note,)))
    except UsageError as error:
        warnings.append(f"No likelihood-ratio attack: {error}")
    every = [judge(scores, truth, seed=seed, name=name, notes=notes) for name, scores, truth, notes in scored]
    warnings += [f"{attack.name}: {note}" for attack in every for note in attack.notes]
    warnings.append(
        "Attacks by loss compare training rows with test rows: rows of another kind in the test part look like a leak. "
        "The likelihood ratio compares each row with itself."
    )
    on_slices, too_small = _on_slices(scored, slices, seed)
    warnings += too_small
    tables = {
        "attacks": pd.DataFrame(
            [*(_row(one, ALL) for one in every), *(_row(one, where) for where, one in on_slices)]
        ),
        "roc": pd.concat(
            [pd.DataFrame({"attack": one.name, "fpr": one.fpr, "tpr": one.tpr}) for one in every],
            ignore_index=True,
        ),
    }
    words, level = _verdict(every)
    words += _slice_words(on_slices)
    if inversion is not None:
        tables |= {"inversion": inversion.table, "reconstructions": inversion.reconstructions}
        warnings += [f"inversion: {text}" for text in inversion.warnings]
        more, is_near = _inversion_words(inversion)
        words, level = words + more, "warn" if is_near else level
    return Section(KEY, TITLE, words, level, tables, tuple(warnings))


def _check(
    nll: np.ndarray, is_train: np.ndarray, log_prob: np.ndarray, is_in: np.ndarray, slices: Sequence[Slice]
) -> None:
    rows = len(nll)
    shapes = [nll.shape, is_train.shape, log_prob.shape[1:], is_in.shape[1:], *(s.mask.shape for s in slices)]
    if set(shapes) != {(rows,)} or log_prob.shape != is_in.shape:
        raise UsageError(
            f"nll, is_train, log_prob, is_in and slices must be of the same rows, got {[list(s) for s in shapes]}."
        )
    for name, values in (("nll", nll), ("log_prob", log_prob)):
        if np.isnan(values).any():
            raise UsageError(f"{name} has {int(np.isnan(values).sum())} NaN values: no attack can be judged.")
    if is_train.all() or not is_train.any():
        raise UsageError(
            f"Membership inference compares training rows with others, got {int(is_train.sum())} training rows out of "
            f"{rows}."
        )
    if (is_in & ~is_train).any():
        raise UsageError("is_in says that members were trained on rows that is_train does not know.")


_Scored = tuple[str, np.ndarray, np.ndarray, tuple[str, ...]]
"""Name of an attack, its scores and the truth `[M, N]`, and notes."""


def _on_slices(
    scored: Sequence[_Scored], slices: Sequence[Slice], seed: int
) -> tuple[list[tuple[str, Attack]], list[str]]:
    """Attacks on the slices that are large enough, and a word on the others."""
    found, small = [], []
    for one in slices:
        for name, scores, truth, _ in scored:
            of_slice, its_truth = scores[:, one.mask], truth[:, one.mask]
            known = ~np.isnan(of_slice)
            counts = [int((known & kind).any(0).sum()) for kind in (its_truth, ~its_truth)]
            if min(counts) < LEAST_ROWS:
                small.append(
                    f"{name}: the slice {one.name} has {counts[0]} rows that were trained on and {counts[1]} that were "
                    f"not, it takes {LEAST_ROWS} of each"
                )
            else:
                found.append((one.name, judge(of_slice, its_truth, seed=seed, name=name)))
    return found, small


def _row(attack: Attack, where: str) -> dict[str, str | float]:
    return {
        "attack": attack.name,
        "slice": where,
        "auc": attack.auc.value,
        "low": attack.auc.low,
        "high": attack.auc.high,
        "tpr_at_1_fpr": attack.tpr_at_1_fpr.value,
        "low2": attack.tpr_at_1_fpr.low,
        "high2": attack.tpr_at_1_fpr.high,
        "tpr_at_01_fpr": attack.tpr_at_01_fpr.value,
        "low3": attack.tpr_at_01_fpr.low,
        "high3": attack.tpr_at_01_fpr.high,
        "advantage": attack.advantage.value,
        "advantage_by_chance": attack.advantage_by_chance,
        "n_in": attack.n_in,
        "n_out": attack.n_out,
    }


def _leaks(attack: Attack) -> bool:
    return attack.auc.low > AUC_WARN or attack.tpr_at_1_fpr.low > TPR_WARN


def _verdict(every: Sequence[Attack]) -> tuple[str, Level]:
    parts = []
    for one in every:
        auc, tpr = one.auc, one.tpr_at_1_fpr
        text = f"by {one.name}: AUC {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})"
        if np.isfinite(tpr.value):
            text += (
                f", {100 * tpr.value:.1f} % of training rows found at 1 % false alarms "
                f"({100 * tpr.low:.1f} to {100 * tpr.high:.1f} %)"
            )
        parts.append(text)
    told = f"Telling training rows from others {'; '.join(parts)}. Guessing gives 0.5 and 1 %. "
    limits = f"(own thresholds: lower bounds of {AUC_WARN} and {100 * TPR_WARN:.0f} %)"
    worst = [one.name for one in every if _leaks(one)]
    if worst:
        return f"{told}The model gives training rows away by {' and by '.join(worst)} {limits}.", "warn"
    if all(one.auc.high < AUC_WARN and not one.tpr_at_1_fpr.high > TPR_WARN for one in every):
        return f"{told}No attack tried here tells them apart {limits}; a stronger one might.", "good"
    return f"{told}None passes for a leak {limits}, but the intervals do not rule one out.", "note"


def _slice_words(on_slices: Sequence[tuple[str, Attack]]) -> str:
    if not on_slices:
        return ""
    where, worst = max(on_slices, key=lambda pair: pair[1].auc.low)
    count = len({name for name, _ in on_slices})
    return (
        f" Of {count} slices {where} is the easiest to attack, by {worst.name}: AUC {worst.auc.value:.3f} "
        f"({worst.auc.low:.3f} to {worst.auc.high:.3f}, the highest of {len(on_slices)} looked at)."
    )


def _inversion_words(inversion: Inversion) -> tuple[str, bool]:
    table = inversion.table
    total = table[table["slice"] == ALL].set_index("target").loc[ALL]
    is_near = bool(total["high"] < 1)
    end = "nearer than chance explains" if is_near else "no nearer than chance allows"
    return (
        f" Made-up inputs lie {total['ratio']:.3f} times as far from the nearest training row as from the nearest "
        f"held-out row ({total['low']:.3f} to {total['high']:.3f}, 1 = no leak): {end}.",
        is_near,
    )

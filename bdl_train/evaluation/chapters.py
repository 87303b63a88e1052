"""All chapters of an evaluation: those that every run has, and those that were asked for.

One that its input does not allow is empty and says why; the others do not depend on it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch

from bdl_train.data import Part
from bdl_train.data._foreign import Foreign
from bdl_train.errors import UsageError
from bdl_train.evaluation.asked import Asked
from bdl_train.evaluation.attacks import attacks_section
from bdl_train.evaluation.calibration import calibration_section
from bdl_train.evaluation.case import Case
from bdl_train.evaluation.conformal_chapter import conformal_section
from bdl_train.evaluation.costs import cost_section
from bdl_train.evaluation.data_summary import data_section
from bdl_train.evaluation.decision_log import read_decisions
from bdl_train.evaluation.decisions import decisions_section
from bdl_train.evaluation.deferral import deferral_section
from bdl_train.evaluation.inversion import Inversion, inversion_probe
from bdl_train.evaluation.members import members_section
from bdl_train.evaluation.ood import ood_section
from bdl_train.evaluation.privacy import privacy_section
from bdl_train.evaluation.recalibrate import recalibrated
from bdl_train.evaluation.recalibration import Recalibration
from bdl_train.evaluation.recalibration_chapter import recalibration_section
from bdl_train.evaluation.robustness import Sweep, robustness_section
from bdl_train.evaluation.section import Section, section_or_reason
from bdl_train.evaluation.sensitivity import sensitivity_section
from bdl_train.evaluation.slice_search import search_section
from bdl_train.evaluation.slices import slices_section
from bdl_train.evaluation.slicing import Slice, parse_slices
from bdl_train.evaluation.uncertainty import bands_section, examples_section, uncertainty_section

log = logging.getLogger(__name__)

SWEEP = Sweep(
    corruptions=None,
    severities=(1, 2, 3, 4, 5),
    noise=(0.25, 0.5, 1.0, 2.0),
    num_missing=(1, 2, 4),
    tilts=(0.5, 1.0, 1.5),
    label_shares=(0.05, 0.1, 0.2, 0.4),
    max_features=50,
    max_rows=None,
)


def standard_chapters(case: Case, seed: int) -> Iterator[Section]:
    """What every evaluation has."""
    target, rows = case.artefact.target, case.rows
    metrics = {metric.key: metric for metric in case.evaluation.metrics}
    values = {key: metric.value for key, metric in metrics.items()}
    yield section_or_reason("data", "Data", partial(_data, case))
    yield calibration_section(rows, metrics)
    yield members_section(case.evaluation.members, values, target.name)
    yield case.diagnosis.section
    yield uncertainty_section(rows, target)
    yield examples_section(rows, case.evaluation.row_ids, target, case.inputs, case.part.x)
    if rows.probs is None:
        yield bands_section(rows, target, case.inputs, seed)


def _data(case: Case) -> Section:
    parts = (
        {} if case.data is None else {"train": case.data.train, "val": case.data.val, "test": case.data.test}
    )
    scored = next((name for name, part in parts.items() if part is case.part), "scored")
    parts = {name: part for name, part in parts.items() if name != scored and len(part)} | {scored: case.part}
    tables = None
    if case.table is not None:
        tables = (
            {name: case.table_of(part) for name, part in parts.items() if name != scored} if case.own else {}
        )
        tables = {name: table for name, table in tables.items() if table is not None} | {scored: case.table}
    return data_section(parts, case.artefact.target, tables, case.notes)


def asked_chapters(
    case: Case, asked: Asked, read_file: Callable[[str, str], Foreign], say: Callable[[str], None]
) -> Iterator[tuple[Section, list[Recalibration]]]:
    """What was asked for, each with the recalibration maps that it fitted.

    Args:
        case: What is evaluated.
        asked: The settings.
        read_file: Reads the rows of a file for this run, given its path and the config key that names it.
        say: Called with a line of progress.
    """
    target = case.artefact.target
    slices, slice_warnings = _slices(case, asked)
    if asked.slices:
        say(f"slices: {len(slices)}")
        unit, seed = target.name, asked.seed
        yield (
            section_or_reason(
                "slices",
                "Slices",
                lambda: (
                    slices_section(
                        case.rows, slices, score=case.metrics, unit=unit, seed=seed, warnings=slice_warnings
                    )
                    if slices
                    else _refuse("; ".join(slice_warnings))
                ),
            ),
            [],
        )
    defer, is_class = asked.defer, target.num_classes > 0
    yield (
        section_or_reason(
            "deferral",
            "Deferral",
            lambda: deferral_section(
                case.val if defer.target is not None else None,
                case.rows,
                metric=defer.metric or ("risk" if is_class else "mae"),
                target_risk=defer.target,
                by=defer.by or "total",
                confidence=defer.confidence,
                slices=slices,
                unit=target.name,
                seed=asked.seed,
            ),
        ),
        [],
    )
    if asked.recalibrate:
        say("recalibration")
        maps: list[Recalibration] = []
        yield (
            section_or_reason("recalibration", "Recalibration", lambda: _recalibration(case, asked, maps)),
            maps,
        )
    for wanted, key, title, make in (
        (asked.find_slices, "slice_search", "Slices that were found", lambda: _search(case, asked)),
        (asked.ood, "ood", "Out of distribution", lambda: _ood(case, asked, read_file)),
        (asked.conformal, "conformal", "Conformal prediction", lambda: _conformal(case, asked)),
        (asked.cost.matrix, "costs", "Costs", lambda: _costs(case, asked)),
        (asked.robustness, "robustness", "Robustness", lambda: _robustness(case, asked, say)),
        (asked.sensitivity, "sensitivity", "Sensitivity", lambda: _sensitivity(case, asked)),
        (asked.attacks, "attacks", "Adversarial attacks", lambda: _attacks(case, asked)),
        (asked.privacy, "privacy", "Privacy", lambda: _privacy(case, asked, slices)),
        (asked.decisions, "decisions", "Decisions of people", lambda: _decisions(case, asked)),
    ):
        if wanted:
            say(title.lower())
            yield section_or_reason(key, title, make), []


def _refuse(words: str) -> Section:
    raise UsageError(words)


def _slices(case: Case, asked: Asked) -> tuple[list[Slice], list[str]]:
    """The slices that can be made, and why others cannot."""
    if not asked.slices:
        return [], []
    if case.table is None:
        return [], ["slices: these data have no columns, so that there is nothing to slice by."]
    try:
        return parse_slices(asked.slices, case.table)
    except UsageError as error:
        return [], [str(error)]


def _recalibration(case: Case, asked: Asked, maps: list[Recalibration]) -> Section:
    found, warnings = recalibrated(
        case.predictor, case.own_data.val, case.val, case.part, case.rows, case.artefact.target
    )
    maps += [one for one, _ in found]
    section = recalibration_section(case.rows, found, target=case.artefact.target, seed=asked.seed)
    return _with_warnings(section, warnings)


def _search(case: Case, asked: Asked) -> Section:
    if case.table is None:
        raise UsageError("find_slices: these data have no columns to search.")
    # Inputs, and what the user slices by: other columns may be known only after the outcome.
    named = {part for one in _slices(case, asked)[0] for part in one.column.split("×")}
    wanted = {*case.artefact.inputs.names, *named} - {case.artefact.target.name}
    table = case.table.loc[:, [name for name in case.table.columns if name in wanted]]
    return search_section(table, case.rows, loss="nll", seed=asked.seed)


def _ood(case: Case, asked: Asked, read_file: Callable[[str, str], Foreign]) -> Section:
    outside, reasons = {}, []
    for path in asked.ood:
        try:
            other = read_file(path, "ood")
        except UsageError as error:
            reasons.append(f"ood={path}: {str(error).removeprefix(f'ood={path}: ')}")
            continue
        outside[path if other.name in outside else other.name] = case.score(other.part)[0]
    if not outside:
        raise UsageError(" ".join(reasons))
    return _with_warnings(ood_section(case.rows, outside, seed=asked.seed), reasons)


def _conformal(case: Case, asked: Asked) -> Section:
    val, groups, warnings = case.val, None, []
    if asked.conformal_by is not None:
        own = case.table_of(case.own_data.val)
        if case.table is None or own is None:
            warnings.append("conformal_by: these data have no columns, so that there are no groups.")
        else:
            groups = _groups(own, asked.conformal_by), _groups(case.table, asked.conformal_by)
    if case.stops_early:
        warnings.append(
            "the validation part also chose the epochs of the members, so that its rows are not quite exchangeable "
            "with new ones"
        )
    section = conformal_section(
        val,
        case.rows,
        levels=asked.conformal,
        target=case.artefact.target,
        groups=groups,
        seed=asked.seed,
    )
    return _with_warnings(section, warnings)


def _groups(table: pd.DataFrame, column: str) -> np.ndarray:
    """The slice of one column that each row `[N]` belongs to, as text."""
    found, _ = parse_slices([column], table)
    names = np.full(len(table), "none", dtype=object)
    for one in found:
        names[one.mask] = one.name
    return names


def _costs(case: Case, asked: Asked) -> Section:
    classes = case.artefact.target.classes
    if not classes:
        raise UsageError("cost.matrix needs classes, and the target is a number.")
    assert asked.cost.matrix is not None
    actions = asked.cost.actions or list(classes)
    return cost_section(
        case.rows, matrix=asked.cost.matrix, classes=classes, actions=actions, seed=asked.seed
    )


def _some(part: Part, most: int, seed: int) -> Part:
    if len(part) <= most:
        return part
    picked = np.sort(np.random.default_rng(seed).permutation(len(part))[:most])
    return Part(part.x[picked], part.y[picked], part.rows[picked])


def _robustness(case: Case, asked: Asked, say: Callable[[str], None]) -> Section:
    artefact = case.artefact
    return robustness_section(
        lambda part: case.score(part)[0],
        _some(case.part, asked.max_rows, asked.seed),
        inputs=artefact.inputs,
        transform=artefact.transform,
        target=artefact.target,
        seed=asked.seed,
        sweep=SWEEP,
        say=say,
    )


def _sensitivity(case: Case, asked: Asked) -> Section:
    artefact = case.artefact
    return sensitivity_section(
        case.module,
        case.part,
        inputs=artefact.inputs,
        transform=artefact.transform,
        target=artefact.target,
        seed=asked.seed,
        max_rows=asked.max_rows,
    )


def _attacks(case: Case, asked: Asked) -> Section:
    return attacks_section(
        case.module,
        case.part,
        inputs=case.artefact.inputs,
        target=case.artefact.target,
        strengths=asked.attacks,
        seed=asked.seed,
        max_rows=min(asked.max_rows, 500),
        score=lambda part: case.score(part)[0],
    )


def _privacy(case: Case, asked: Asked, slices: Sequence[Slice]) -> Section:
    if not case.own:
        raise UsageError(
            "privacy needs rows that were drawn like the training rows: evaluate the run's own test part."
        )
    data, artefact = case.own_data, case.artefact
    if case.part is data.train:
        raise UsageError("privacy compares training rows with others: evaluate part=test.")
    seen, other = (_some(part, asked.max_rows, asked.seed) for part in (data.train, case.part))
    scored = [case.score(part) for part in (seen, other)]
    members = [one for _, one in scored]
    if any(one.nll.shape[1] == 0 for one in members):
        raise UsageError("privacy keeps the NLL of every member and row: lower max_rows.")
    rows = np.concatenate([seen.rows, other.rows])
    # A row of the training part was seen by the members that drew it; rows of other parts by none.
    is_in = np.stack([np.isin(rows, case.train_rows[m]) for m in members[0].ids])
    is_in[:, len(seen) :] = False
    tables = [case.table_of(part) for part in (seen, other)]
    known = [table for table in tables if table is not None]
    masks = parse_slices(asked.slices, pd.concat(known, ignore_index=True))[0] if slices and known else []
    return privacy_section(
        np.concatenate([one.columns["nll"] for one, _ in scored]),
        np.arange(len(rows)) < len(seen),
        log_prob=-np.concatenate([one.nll for one in members], axis=1).astype(np.float64),
        is_in=is_in,
        is_density=artefact.target.num_classes == 0,
        seed=asked.seed,
        slices=masks,
        inversion=_inversion(case, seen, other, asked.seed, masks) if artefact.target.num_classes else None,
    )


def _inversion(case: Case, seen: Part, other: Part, seed: int, slices: Sequence[Slice]) -> Inversion | None:
    artefact = case.artefact
    classes = min(artefact.target.num_classes, 10)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(classes).repeat_interleave(4)
    start = 0.5 * torch.randn(len(targets), *artefact.inputs.shape, generator=generator).to(artefact.dtype)
    device = case.predictor.device
    train_x, other_x = (
        artefact.inputs.prepare(torch.from_numpy(part.x).to(device), artefact.dtype) for part in (seen, other)
    )
    try:
        return inversion_probe(
            case.module.log_probs,
            start.to(device),
            targets.to(device),
            steps=100,
            lr=0.1,
            l2=1e-3,
            tv=1e-3 if artefact.inputs.is_image else 0.0,
            train_x=train_x,
            train_y=torch.from_numpy(seen.y).to(device),
            other_x=other_x,
            other_y=torch.from_numpy(other.y).to(device),
            seed=seed,
            names=artefact.target.classes[:classes],
            slices=[(one.name, one.mask[: len(seen)], one.mask[len(seen) :]) for one in slices],
        )
    except UsageError as error:
        log.warning("privacy: no inversion probe: %s", error)
        return None


def _decisions(case: Case, asked: Asked) -> Section:
    assert asked.decisions is not None
    decided = read_decisions(asked.decisions)
    return decisions_section(
        case.rows, case.evaluation.row_ids, decided, target=case.artefact.target, seed=asked.seed
    )


def _with_warnings(section: Section, warnings: Sequence[str]) -> Section:
    return replace(section, warnings=(*section.warnings, *warnings)) if warnings else section

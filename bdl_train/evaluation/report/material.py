"""Everything a report is made from, read from the run directory; what is missing or damaged is named, not fatal.

Shape letters: N rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError
from bdl_train.evaluation.calibration import calibration_section
from bdl_train.evaluation.deferral import deferral_section
from bdl_train.evaluation.diagnostics_chapter import KEY as DIAGNOSTICS
from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.report.history import History, read_history
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section, read_section
from bdl_train.evaluation.uncertainty import bands_section, uncertainty_section
from bdl_train.files import sha256
from bdl_train.runs import RunDir, glance_at_config, read_json
from bdl_train.specs import TargetKind, TargetSpec

ORDER = (
    "data", "calibration", "members", "diagnostics", "uncertainty", "deferral", "bands", "examples", "slices",
    "slice_search", "robustness", "ood", "recalibration", "conformal", "sensitivity", "attacks", "costs", "privacy",
    "decisions",
)  # fmt: skip
"""Chapters as they are read; others follow in the order of their names."""


@dataclass(frozen=True)
class Material:
    """What a report says.

    Attributes:
        run: Its directory.
        name: Of the evaluation.
        config, manifest: As stored; {} where they cannot be read.
        status: Of the run.
        part: The part of the data that was scored, from the keys of the metrics.
        metrics: By key without the part's name.
        num_rows: That were scored.
        sections: In the order of the report.
        history: Of training.
        posterior: The header of the posterior, {} where it cannot be read.
        hashes: Of the files of the evaluation.
        problems: What could not be read, a sentence each.
        asked: The words of `bdl evaluate`, where they were kept.
        only_scores: The evaluation has no chapters but what training says of its chains; those that its scores allow
            were made just now.
    """

    run: RunDir
    name: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    status: str
    part: str
    metrics: Mapping[str, Metric]
    num_rows: int
    sections: Sequence[Section]
    history: History
    posterior: Mapping[str, Any]
    hashes: Mapping[str, Any]
    problems: Sequence[str] = field(default_factory=list)
    asked: Sequence[str] = ()
    only_scores: bool = False

    def section(self, key: str) -> Section | None:
        return next((one for one in self.sections if one.key == key), None)

    def metric(self, key: str) -> Metric | None:
        """A metric that has a value."""
        found = self.metrics.get(key)
        return found if found is not None and found.value is not None and np.isfinite(found.value) else None


def read_material(run: RunDir, name: str) -> Material:
    """Read an evaluation and its run.

    Raises:
        UsageError: there is no such evaluation, or its metrics cannot be read.
    """
    folder = run.evaluation(name)
    if not (folder / "metrics_detail.parquet").is_file():
        held = sorted(path.parent.name for path in run.path.glob("evaluation/*/metrics_detail.parquet"))
        known = f"there are: {', '.join(held)}" if held else "there is none: bdl evaluate writes one"
        raise UsageError(f"name={name}: {run.path} has no evaluation of this name; {known}.")
    part, metrics, num_rows = _metrics(folder / "metrics_detail.parquet")
    problems: list[str] = []
    manifest = _json(run.manifest, problems) if run.manifest.is_file() else {}
    posterior = _json(run.posterior / "posterior.json", problems)
    sections = _sections(folder / "sections", problems)
    # Training writes one chapter itself: of chains.
    only_scores = all(section.key == DIAGNOSTICS for section in sections)
    if only_scores:
        made = _from_scores(folder / "predictions.parquet", metrics, posterior, problems)
        sections = sorted([*made, *sections], key=lambda section: ORDER.index(section.key))
    config = glance_at_config(run)
    if not config:
        problems.append(f"{run.config.name} cannot be read.")
    hashes = _json(folder / "hashes.json", problems)
    changed = [name for name, digest in hashes.items() if not _has_hash(folder / name, digest)]
    if changed:
        problems.append(f"Changed since they were written: {', '.join(changed[:8])}. Run bdl evaluate again.")
    asked = _json(folder / "asked.json", problems) if (folder / "asked.json").is_file() else {}
    kept = asked.get("words", ())
    words = [str(word) for word in kept] if isinstance(kept, list) else []
    status = str(manifest["status"]) if "status" in manifest else "without a manifest"
    return Material(
        run, name, config, manifest, status, part, metrics, num_rows, sections, read_history(run), posterior, hashes,
        problems, words, only_scores,
    )  # fmt: skip


def _has_hash(path: Path, digest: Any) -> bool:
    return path.is_file() and sha256(path) == digest


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = read_json(path)
    except UsageError as error:
        problems.append(str(error).replace(f"{path.parent}/", ""))
        return {}
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name} is damaged: expected a mapping.")
    return {}


def _metrics(path: Path) -> tuple[str, dict[str, Metric], int]:
    try:
        table = pd.read_parquet(path)
        rows = table.to_dict("records")
        parts = [str(row["key"]).partition("/") for row in rows]
        found = {
            key: Metric(
                key, *(_none(row.get(name)) for name in ("value", "unit", "meaning", "better", "low", "high", "reason"))  # pyright: ignore[reportArgumentType]
            )
            for row, (_, _, key) in zip(rows, parts, strict=True)
            if row.get("slice", "all") == "all"
        }  # fmt: skip
        return parts[0][0], found, int(table["n"].iloc[0]) if "n" in table else 0
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(
            f"{path} is damaged: {type(error).__name__} {error}. Run bdl evaluate again."
        ) from error


def _none(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def _sections(folder: Path, problems: list[str]) -> list[Section]:
    """All of them, the known ones first; a damaged one becomes an empty one that says so."""
    keys = {path.stem for path in folder.glob("*.json")}
    listed = [key for key in ORDER if key in keys] + sorted(keys - set(ORDER))
    found = []
    for key in listed:
        try:
            found.append(read_section(folder, key))
        except UsageError as error:
            words = str(error).replace(f"{folder}/", "")
            problems.append(words)
            title = key.replace("_", " ").capitalize()
            found.append(Section.empty(key, title, f"This chapter cannot be shown. {words}"))
    return found


def _from_scores(
    path: Path, metrics: Mapping[str, Metric], posterior: Mapping[str, Any], problems: list[str]
) -> list[Section]:
    """The chapters that need nothing but the scores of the rows."""
    try:
        rows, target = rows_of(pd.read_parquet(path), posterior)
    except (OSError, ValueError, KeyError) as error:
        problems.append(f"{path.name} cannot be read: {type(error).__name__} {error}.")
        return []
    by_default = "risk" if rows.probs is not None else "rmse"
    made = {
        "calibration": lambda: calibration_section(rows, dict(metrics)),
        "uncertainty": lambda: uncertainty_section(rows, target),
        "deferral": lambda: deferral_section(
            None, rows, metric=by_default, target_risk=None, by="total", confidence=None, slices=[], unit=target.name,
            seed=0,
        ),
        "bands": lambda: bands_section(rows, target, None, 0),
    }  # fmt: skip
    found = []
    for key, make in made.items():
        try:
            section = make()
        except (KeyError, UsageError) as error:  # an earlier version wrote fewer columns
            problems.append(f"The chapter {key} needs more than {path.name} holds: {error}.")
            continue
        if section.level != "empty":
            found.append(section)
    return found


def rows_of(table: pd.DataFrame, posterior: Mapping[str, Any]) -> tuple[RowScores, TargetSpec]:
    """The scores that `predictions.parquet` holds, and the target they are of."""
    classes = [name for name in table.columns if str(name).startswith("p_")]
    columns = {str(name): table[name].to_numpy() for name in table.columns if name not in {"row", *classes}}
    named = posterior.get("target")
    name = str(named.get("name", "target")) if isinstance(named, dict) else "target"
    if not classes:
        return RowScores(columns), TargetSpec(TargetKind.CONTINUOUS, name)
    probs = table[classes].to_numpy(dtype=float)
    return RowScores(columns, probs), TargetSpec(TargetKind.CLASS, name, tuple(one[2:] for one in classes))

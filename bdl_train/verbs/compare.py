"""Put runs side by side: mean ± standard error over splits, and paired differences to a baseline on the same rows.

Examples:
    bdl compare runs='runs/energy/*'
    bdl compare runs='runs/*/*' metrics=[test/nll,test/rmse] output=table.md
    bdl compare runs='runs/energy/*' baseline='runs/energy/20260101-*' report=compare.html
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field

from bdl_train.build import settings_of
from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError, unknown_choice
from bdl_train.evaluation.compare import (
    REPEATS,
    FinishedRun,
    compare,
    experiments,
    flatten,
    repeated,
    show,
    to_markdown,
)
from bdl_train.evaluation.comparison import paired_section, show_paired
from bdl_train.evaluation.pairing import ScoredExperiment, ScoredRun
from bdl_train.evaluation.section import Section
from bdl_train.files import write_bytes
from bdl_train.runs import RunDir, read_json
from bdl_train.verbs._runs import read_config, read_manifest

WRITERS = {
    ".csv": lambda table: table.to_csv(index=False).encode(),
    ".parquet": lambda table: table.to_parquet(index=False),
    ".md": lambda table: to_markdown(table).encode(),
}
OWN = "test"
"""The evaluation that every run has, with its metrics at the top of the run."""
SEED = 0
"""Of the resamples of rows."""
MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/compare.yaml`."""

    runs: str
    metrics: list[str] | None
    output: str | None
    evaluation: Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
    baseline: str | None
    report: str | None


def run(config: dict[str, Any], options: Options) -> Exit:
    """Print the comparison; runs without metrics are named and left out."""
    settings = settings_of(Settings, config, key="")
    output, report = (None if path is None else Path(path) for path in (settings.output, settings.report))
    if output is not None and output.suffix not in WRITERS:
        raise UsageError(f"output={output} must end in .csv, .parquet or .md.")
    if report is not None and report.suffix != ".html":
        raise UsageError(f"report={report} must end in .html.")
    paths = _matching("runs", settings.runs)
    baseline = [] if settings.baseline is None else _matching("baseline", settings.baseline)
    by_place = {path.resolve(): path for path in [*baseline, *paths]}
    found = [RunDir(path) for path in sorted(by_place.values())]
    finished = finished_runs(found, settings.metrics, settings.evaluation)
    table = compare(finished, settings.metrics)
    title = f"{settings.runs}: mean ± standard error over runs that differ only in split or seed"
    show(table, title)
    section = _paired(finished, [str(by_place[path.resolve()]) for path in baseline], settings.evaluation)
    if section is not None:
        show_paired(section)
    if output is not None:
        write_bytes(output, WRITERS[output.suffix](table))
        print(f"written: {output}")
    if report is not None:
        from bdl_train.evaluation.comparison_page import comparison_page

        heading = f"{settings.runs}, evaluation {settings.evaluation}"
        write_bytes(report, comparison_page(heading, table, section))
        print(f"written: {report}")
    return Exit.DONE


def _matching(key: str, pattern: str) -> list[Path]:
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in paths if (path / "config.yaml").is_file()]
    if not found:
        raise UsageError(f"{key}={pattern} matches no run directory. Quote the glob: {key}='runs/energy/*'.")
    return found


def compare_runs(runs: list[RunDir], metrics: list[str] | None) -> pd.DataFrame:
    """The comparison table of the runs that have metrics; what a reader must know of them is printed."""
    return compare(finished_runs(runs, metrics, OWN), metrics)


def finished_runs(runs: Sequence[RunDir], metrics: list[str] | None, evaluation: str) -> list[FinishedRun]:
    """The runs that have metrics of an evaluation; the others are named.

    Raises:
        UsageError: there is none, or no run knows one of `metrics`.
    """
    finished = []
    for one in runs:
        status = one.status()
        file = one.metrics if evaluation == OWN else one.evaluation(evaluation) / "metrics.json"
        if not file.is_file():
            what = "metrics" if evaluation == OWN else f"evaluation {evaluation}"
            print(f"{one.path} has no {what} ({status}): left out")
            continue
        if status != "complete":
            print(f"{one.path} is {status}")
        finished.append(FinishedRun(str(one.path), read_config(one), read_json(file)))
    if not finished:
        way = "bdl train resume=<run>" if evaluation == OWN else f"bdl evaluate run=<run> name={evaluation}"
        what = "metrics" if evaluation == OWN else f"an evaluation {evaluation}"
        raise UsageError(f"None of these runs has {what}: finish one with {way}.")
    known = {key for one in finished for key in one.metrics}
    for key in metrics or []:
        if key not in known:
            raise UsageError(unknown_choice("metric", key, known))
    for group in repeated(finished):
        print(
            f"warning: {' and '.join(group)} have the same settings, split and seed: counted twice, they make the "
            "standard error too small"
        )
    return finished


# --- paired differences -------------------------------------------------------------------------------------------


def _paired(finished: Sequence[FinishedRun], baseline: Sequence[str], evaluation: str) -> Section | None:
    """None for one experiment alone."""
    groups = experiments(finished)
    if len(groups) < 2:
        return None
    scored, missing = [], []
    for group in groups:
        runs = [_scored(one, evaluation) for one in group.runs]
        missing += [one.name for one, found in zip(group.runs, runs, strict=True) if found is None]
        present = [found for found in runs if found is not None]
        if present:
            scored.append(ScoredExperiment(group.name, present))
    named = [one.name for one in groups if any(run.name in baseline for run in one.runs)]
    lost = [name for name in named if name not in {one.name for one in scored}]
    if lost:
        raise UsageError(
            f"baseline={lost[0]} has no rows in evaluation/{evaluation}: score it with bdl evaluate name={evaluation}."
        )
    section = paired_section(scored, named, seed=SEED)
    if not missing:
        return section
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    note = (
        f"No scored rows in evaluation/{evaluation}, so not paired: {', '.join(missing[:MOST_NAMED])}{more}."
    )
    return Section(
        section.key, section.title, section.verdict, section.level, section.tables, (note, *section.warnings)
    )


def _scored(finished: FinishedRun, evaluation: str) -> ScoredRun | None:
    """The scored rows of a run; None if they are not there."""
    run = RunDir(Path(finished.name))
    file = run.evaluation(evaluation) / "predictions.parquet"
    if not file.is_file() or not run.manifest.is_file():
        return None
    manifest = read_manifest(run)
    try:
        table = pd.read_parquet(file)
        detail = pd.read_parquet(file.with_name("metrics_detail.parquet"), columns=["key", "unit"])
    except (OSError, ValueError) as error:
        raise UsageError(f"{file.parent} is damaged: {error}. Write it again with bdl evaluate.") from error
    units = detail.loc[detail["key"].str.endswith("/crps"), "unit"].tolist()
    flat = flatten(finished.config)
    columns = {str(name): np.asarray(table[name]) for name in table if not str(name).startswith("p_")}
    return ScoredRun(
        finished.name,
        (flat.get(REPEATS[0]), flat.get(REPEATS[1])),
        manifest["data"]["fingerprint"],
        manifest.get("num_data"),
        columns,
        str(units[0]) if units else "",
    )

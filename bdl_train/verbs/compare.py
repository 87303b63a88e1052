"""Put runs side by side: mean ± standard error over splits.

Examples:
    bdl compare runs='runs/energy/*'
    bdl compare runs='runs/*/*' metrics=[test/nll,test/rmse] output=table.md
"""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bdl_train.build import settings_of
from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError, unknown_choice
from bdl_train.evaluation.compare import FinishedRun, compare, repeated, show, to_markdown
from bdl_train.runs import RunDir, read_json, write_bytes
from bdl_train.verbs._runs import read_config

WRITERS = {
    ".csv": lambda table: table.to_csv(index=False).encode(),
    ".parquet": lambda table: table.to_parquet(index=False),
    ".md": lambda table: to_markdown(table).encode(),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/compare.yaml`."""

    runs: str
    metrics: list[str] | None
    output: str | None


def run(config: dict[str, Any], options: Options) -> Exit:
    """Print the comparison; runs without metrics are named and left out."""
    settings = settings_of(Settings, config, key="")
    output = None if settings.output is None else Path(settings.output)
    if output is not None and output.suffix not in WRITERS:
        raise UsageError(f"output={output} must end in .csv, .parquet or .md.")
    paths = [Path(path) for path in sorted(glob.glob(settings.runs, recursive=True))]
    found = [RunDir(path) for path in paths if (path / "config.yaml").is_file()]
    if not found:
        raise UsageError(
            f"runs={settings.runs} matches no run directory. Quote the glob: runs='runs/energy/*'."
        )
    table = compare_runs(found, settings.metrics)
    show(table, f"{settings.runs}: mean ± standard error over runs that differ only in split or seed")
    if output is not None:
        write_bytes(output, WRITERS[output.suffix](table))
        print(f"written: {output}")
    return Exit.DONE


def compare_runs(runs: list[RunDir], metrics: list[str] | None) -> pd.DataFrame:
    """The comparison table of the runs that have metrics; what a reader must know of them is printed."""
    finished = []
    for one in runs:
        status = one.status()
        if not one.metrics.is_file():
            print(f"{one.path} has no metrics ({status}): left out")
            continue
        if status != "complete":
            print(f"{one.path} is {status}")
        finished.append(FinishedRun(str(one.path), read_config(one), read_json(one.metrics)))
    if not finished:
        raise UsageError("None of these runs has metrics: finish one with bdl train resume=<run>.")
    known = {key for one in finished for key in one.metrics}
    for key in metrics or []:
        if key not in known:
            raise UsageError(unknown_choice("metric", key, known))
    for group in repeated(finished):
        print(
            f"warning: {' and '.join(group)} have the same settings, split and seed: counted twice, they make the "
            "standard error too small"
        )
    return compare(finished, metrics)

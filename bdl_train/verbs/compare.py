"""Put runs side by side: mean ± standard error over splits.

Examples:
    bdl compare runs='runs/energy/*'
    bdl compare runs='runs/*/*' metrics=[test/nll,test/rmse] output=table.md
"""

import glob
from pathlib import Path
from typing import Any

import pandas as pd

from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError, unknown_choice
from bdl_train.evaluation.compare import FinishedRun, compare, show, to_markdown
from bdl_train.runs import RunDir, read_json, write_bytes
from bdl_train.verbs._runs import read_config


def run(config: dict[str, Any], options: Options) -> Exit:
    """Print the comparison; runs without metrics are named and left out."""
    paths = sorted(path for path in glob.glob(str(config["runs"])) if (Path(path) / "config.yaml").is_file())
    if not paths:
        raise UsageError(
            f"runs={config['runs']} matches no run directory. Quote the glob: runs='runs/energy/*'."
        )
    table = compare_runs([RunDir(Path(path)) for path in paths], config["metrics"])
    show(table, f"{config['runs']}: mean ± standard error over runs that differ only in split or seed")
    if config["output"] is not None:
        _write(Path(config["output"]), table)
    return Exit.DONE


def compare_runs(runs: list[RunDir], metrics: list[str] | None) -> pd.DataFrame:
    """The comparison table of the runs that have metrics."""
    finished = []
    for one in runs:
        if one.metrics.is_file():
            finished.append(FinishedRun(read_config(one), read_json(one.metrics)))
        else:
            print(f"{one.path} has no metrics ({one.status()}): left out")
    if not finished:
        raise UsageError("None of these runs has metrics: finish one with bdl train resume=<run>.")
    known = {key for one in finished for key in one.metrics}
    for key in metrics or []:
        if key not in known:
            raise UsageError(unknown_choice("metric", key, known))
    return compare(finished, metrics)


def _write(path: Path, table: pd.DataFrame) -> None:
    content = {
        ".csv": lambda: table.to_csv(index=False).encode(),
        ".parquet": lambda: table.to_parquet(index=False),
        ".md": lambda: to_markdown(table).encode(),
    }
    if path.suffix not in content:
        raise UsageError(f"output={path} must end in .csv, .parquet or .md.")
    write_bytes(path, content[path.suffix]())
    print(f"written: {path}")

"""Predict the rows of a table with their uncertainty, streaming.

Examples:
    bdl predict run=runs/breast_cancer/20260101-120000-a1b2c3 input=patients.csv output=predictions.parquet
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bdl_train.config import Options
from bdl_train.data._stream import read_table_in_chunks
from bdl_train.errors import Exit, UsageError
from bdl_train.evaluation.predictions import prediction_columns
from bdl_train.posteriors.artefact import Artefact, read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir
from bdl_train.verbs._runs import device_of


def run(config: dict[str, Any], options: Options) -> Exit:
    """Write one row of predictions for each row of the input."""
    intervals = config["intervals"]
    if not isinstance(intervals, list) or not all(
        isinstance(one, float) and 0 < one < 1 for one in intervals
    ):
        raise UsageError(f"intervals must be a list of probabilities between 0 and 1, got {intervals!r}.")
    if not isinstance(config["chunk_rows"], int) or config["chunk_rows"] < 1:
        raise UsageError(f"chunk_rows must be 1 or more, got {config['chunk_rows']!r}.")
    output = Path(config["output"])
    write = _writer(output)
    artefact = read_artefact(RunDir.open(config["run"]).posterior)
    if artefact.transform is None:
        raise UsageError(
            f"run={config['run']} was trained on examples of shape {list(artefact.inputs.shape)}, not on a table: "
            "bdl predict reads tables. Score images with bdl evaluate."
        )
    predictor = Predictor(artefact, device=device_of(config["accelerator"]), num_draws=config["num_draws"])
    names = [column.name for column in artefact.transform.columns]
    columns = names + [name for name in config["keep"] if name not in names]
    chunks = read_table_in_chunks(config["input"], columns, config["chunk_rows"])
    partial = output.with_name(f".{output.name}.part")
    try:
        count = write(partial, _predict(artefact, predictor, chunks, config["keep"], intervals))
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{count} rows written to {output}")
    return Exit.DONE


def _predict(
    artefact: Artefact,
    predictor: Predictor,
    chunks: Iterator[pd.DataFrame],
    keep: list[str],
    intervals: list[float],
) -> Iterator[pd.DataFrame]:
    assert artefact.transform is not None
    for chunk in chunks:
        x = torch.from_numpy(artefact.transform.apply(chunk))
        tiles = [prediction_columns(tile, artefact.target, intervals) for tile in predictor(x)]
        joined = {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
        kept = {name: chunk[name].to_numpy() for name in keep}
        yield pd.DataFrame({**kept, **joined})


def _writer(output: Path) -> Any:
    if not output.parent.is_dir():
        raise UsageError(f"output={output}: the folder {output.parent} does not exist.")
    name = output.name.lower()
    if name.endswith(".csv"):
        return _write_csv
    if name.endswith((".parquet", ".pq")):
        return _write_parquet
    raise UsageError(f"output={output} must end in .csv or .parquet.")


def _write_csv(path: Path, tables: Iterator[pd.DataFrame]) -> int:
    count = 0
    for table in tables:
        table.to_csv(path, mode="a" if count else "w", header=count == 0, index=False)
        count += len(table)
    return count


def _write_parquet(path: Path, tables: Iterator[pd.DataFrame]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer = 0, None
    try:
        for table in tables:
            batch = pa.Table.from_pandas(table, preserve_index=False)
            writer = writer or pq.ParquetWriter(path, batch.schema)
            writer.write_table(batch.cast(writer.schema))
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count

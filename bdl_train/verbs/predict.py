"""Predict the rows of a table with their uncertainty, streaming.

Examples:
    bdl predict run=runs/breast_cancer/20260101-120000-a1b2c3 input=patients.csv output=predictions.parquet
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from bdl_train.build import settings_of
from bdl_train.config import Options
from bdl_train.data._stream import read_table_in_chunks
from bdl_train.errors import Exit, UsageError
from bdl_train.evaluation.predictions import prediction_columns
from bdl_train.evaluation.recalibrate import recorded
from bdl_train.evaluation.recalibration import Recalibration
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir
from bdl_train.verbs._runs import open_artefact, predictor_of

Write = Callable[[Path, Iterator[pd.DataFrame]], int]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/predict.yaml`."""

    run: str
    input: str
    output: str
    num_draws: Annotated[int, Field(ge=1)] | None
    intervals: list[Annotated[float, Field(gt=0, lt=1)]]
    keep: list[str]
    recalibration: str | None
    chunk_rows: Annotated[int, Field(ge=1)]
    accelerator: Literal["auto", "cpu", "gpu"]
    allow: list[str]


def run(config: dict[str, Any], options: Options) -> Exit:
    """Write one row of predictions for each row of the input."""
    settings = settings_of(Settings, config, key="")
    output = Path(settings.output)
    write = _writer(output, Path(settings.input), settings.keep)
    run_dir = RunDir.open(settings.run)
    artefact = open_artefact(run_dir)
    recalibration = None if settings.recalibration is None else recorded(run_dir, settings.recalibration)
    if artefact.transform is None:
        raise UsageError(
            f"run={settings.run} was trained on examples of shape {list(artefact.inputs.shape)}, not on a table: "
            "bdl predict reads tables. Score images with bdl evaluate."
        )
    predictor = predictor_of(artefact, settings.accelerator, settings.num_draws)
    names = artefact.transform.names
    columns = names + [name for name in settings.keep if name not in names]
    chunks = read_table_in_chunks(settings.input, columns, settings.chunk_rows)
    unseen: Counter[str] = Counter()
    unfinished = output.with_name(f".{output.name}.part")
    try:
        count = write(
            unfinished,
            _predict(artefact, predictor, chunks, settings.keep, settings.intervals, recalibration, unseen),
        )
        if count == 0:
            raise UsageError(f"input={settings.input} has no rows.")
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"{count} rows written to {output}")
    for name, rows in unseen.items():
        print(f"column {name}: {rows} of {count} rows have a category that training never saw")
    if recalibration is not None:
        print(
            f"recalibrated by {recalibration.describe()}; columns that the map leaves without a meaning are empty"
        )
    return Exit.DONE


def _predict(
    artefact: Artefact,
    predictor: Predictor,
    chunks: Iterator[pd.DataFrame],
    keep: list[str],
    intervals: list[float],
    recalibration: Recalibration | None,
    unseen: Counter[str],
) -> Iterator[pd.DataFrame]:
    assert artefact.transform is not None
    for chunk in chunks:
        if len(chunk) == 0:
            continue
        x = torch.from_numpy(artefact.transform.apply(chunk))
        for name, rows in artefact.transform.unseen(chunk).items():
            unseen[name] += rows
        tiles = [prediction_columns(tile, artefact.target, intervals, recalibration) for tile in predictor(x)]
        joined = {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
        twice = [name for name in keep if name in joined]
        if twice:
            raise UsageError(
                f"keep: '{twice[0]}' is the name of a column of predictions too: rename it in the input."
            )
        yield pd.concat([chunk[keep].reset_index(drop=True), pd.DataFrame(joined)], axis=1)


def _writer(output: Path, source: Path, keep: list[str]) -> Write:
    if not output.parent.is_dir():
        raise UsageError(f"output={output}: the folder {output.parent} does not exist.")
    if output.is_dir():
        raise UsageError(f"output={output} is a folder, it must name a file.")
    if output.exists() and source.exists() and output.samefile(source):
        raise UsageError(f"output={output} is the input itself: choose another file.")
    name = output.name.lower()
    if name.endswith(".csv"):
        return partial(_write_csv, keep=keep)
    if name.endswith((".parquet", ".pq")):
        return _write_parquet
    raise UsageError(f"output={output} must end in .csv or .parquet.")


def _write_csv(path: Path, tables: Iterator[pd.DataFrame], keep: list[str]) -> int:
    count = 0
    for table in tables:
        # Predictions have float32's digits; numbers that are kept stay whole, which pandas does to objects.
        numbers = [name for name in keep if pd.api.types.is_float_dtype(table[name])]
        shown = table.astype(dict.fromkeys(numbers, object))
        shown.to_csv(path, mode="a" if count else "w", header=count == 0, index=False, float_format="%.9g")
        count += len(table)
    return count


def _write_parquet(path: Path, tables: Iterator[pd.DataFrame]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer = 0, None
    try:
        for table in tables:
            batch = pa.Table.from_pandas(table, preserve_index=False)
            if writer is None:
                # A kept column that is empty so far may hold anything later, and anything can be text.
                fields = [
                    pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in batch.schema
                ]
                writer = pq.ParquetWriter(path, pa.schema(fields))
            writer.write_table(batch.cast(writer.schema))
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count

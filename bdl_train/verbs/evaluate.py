"""Score the posterior predictive of a run, and analyse what it is worth; `bdl report` shows the result.

Examples:
    bdl evaluate run=runs/energy/20260101-120000-a1b2c3 part=val
    bdl evaluate run=runs/adult/20260101-120000-a1b2c3 slices='[sex, age>65, race×sex]' recalibrate=true
    bdl evaluate run=runs/adult/20260101-120000-a1b2c3 analysis=full
    bdl evaluate run=runs/adult/20260101-120000-a1b2c3 data.path=new.csv name=new
    bdl evaluate -m run=runs/energy/20260101-120000-a1b2c3 part=train,val,test
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from bdl_train.build import allowed_packages, build, settings_of
from bdl_train.config import Options
from bdl_train.data import Data, Part
from bdl_train.data._foreign import Foreign, read_foreign, seen_before
from bdl_train.distributed import Cluster, Launcher
from bdl_train.errors import Exit, UsageError
from bdl_train.evaluation.asked import Asked
from bdl_train.evaluation.case import Case
from bdl_train.evaluation.chapters import asked_chapters, standard_chapters
from bdl_train.evaluation.evaluate import SECTIONS, assemble, write_evaluation
from bdl_train.evaluation.members import MOST_NLL
from bdl_train.evaluation.recalibrate import record
from bdl_train.evaluation.recalibration import Recalibration
from bdl_train.evaluation.section import Section
from bdl_train.evaluation.shards import Posterior, Scores, plan_shards, score_in_shards, score_part
from bdl_train.evaluation.table import show_metrics
from bdl_train.posteriors.artefact import Artefact, training_rows
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir
from bdl_train.verbs._runs import (
    load_data,
    open_artefact,
    predictor_of,
    read_config,
    read_manifest,
    source_of,
)

log = logging.getLogger(__name__)

MULTIRUN = True
ROWS_A_SHARD = 10_000
MOST_WARNINGS = 3
TELL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/evaluate.yaml` that say what is scored, and how."""

    run: str
    part: Literal["train", "val", "test"]
    name: Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
    num_draws: Annotated[int, Field(ge=1)] | None
    accelerator: Literal["auto", "cpu", "gpu"]
    member_shards: Annotated[int, Field(ge=1)]
    allow: list[str]
    data: dict[str, str | None]


def run(config: dict[str, Any], options: Options) -> Exit:
    """Write `<run>/evaluation/<name>/` and print its metrics."""
    launcher = build(config["cluster"], Cluster, key="cluster")
    if not isinstance(launcher, Launcher):
        raise UsageError("bdl evaluate scores from here: use cluster=inline, ray_local or ray_cluster.")
    words = {one.name for one in fields(Settings)}
    settings = settings_of(Settings, {key: value for key, value in config.items() if key in words}, key="")
    words = {one.name for one in fields(Asked)}
    asked = settings_of(Asked, {key: value for key, value in config.items() if key in words}, key="")
    try:
        return _evaluate(settings, asked, launcher, options.overrides)
    finally:
        launcher.close()


def _evaluate(settings: Settings, asked: Asked, launcher: Launcher, words: Sequence[str]) -> Exit:
    path = settings.data["path"]
    if settings.name == "test" and (
        settings.part != "test" or settings.num_draws is not None or path is not None
    ):
        raise UsageError(
            "name=test is the run's own evaluation of its test part: give this one another name."
        )
    if path is not None and (settings.part != "test" or settings.name in ("train", "val")):
        raise UsageError(
            f"data.path scores the rows of a file, so that part={settings.part} would mean nothing: leave `part` out, "
            "and give the evaluation a name of its own, name=..."
        )
    run_dir = RunDir.open(settings.run)
    manifest, artefact, stored = read_manifest(run_dir), open_artefact(run_dir), read_config(run_dir)
    if settings.data["root"] is not None:
        stored["data"]["root"] = settings.data["root"]
    root = stored["data"]["root"]
    predictor = predictor_of(artefact, settings.accelerator, settings.num_draws)
    data, raw, missing = _own_data(stored, manifest, needed=path is None)
    read = partial(
        read_foreign, root=root, inputs=artefact.inputs, target=artefact.target, transform=artefact.transform
    )
    remarks: dict[str, str] = {}
    if path is None:
        assert data is not None
        part, name = getattr(data, settings.part), f"{data.name}: {settings.part}"
        table = None if raw is None else raw.iloc[part.rows].reset_index(drop=True)
    else:
        foreign = read(path, key="data.path", needs_target=True)
        part, name, table = foreign.part, foreign.name, foreign.table
        remarks = _remarks(foreign, data)
    if len(part) == 0:
        raise UsageError(
            "This part of the data has no rows to score: choose another `part`, or data.val_fraction above 0."
        )
    score = _scorer(run_dir, artefact, predictor, settings, launcher)
    rows, members = score(part)
    evaluation = assemble(rows, members, part.rows, artefact.target)
    title = f"{name} metrics of {artefact.posterior.num_members} members ({len(part)} rows)"
    show_metrics(title, evaluation.metrics)
    case = Case(
        artefact=artefact,
        predictor=predictor,
        score=score,
        part=part,
        evaluation=evaluation,
        table=table,
        data=data,
        raw=raw,
        stops_early=stored["inference"].get("patience") is not None,
        train_rows=_train_rows(run_dir, artefact, data),
        own=path is None,
        notes=_notes(manifest) if path is None else remarks,
        missing=missing,
    )

    def read_file(file: str, key: str) -> Foreign:
        return read(file, key=key, needs_target=False)

    before = {path.stem for path in (run_dir.evaluation(settings.name) / SECTIONS).glob("*.json")}
    maps: list[Recalibration] = []
    told: list[Section] = []

    def chapters() -> Iterator[Section]:
        print()
        for one in standard_chapters(case, asked.seed):
            told.append(one)
            yield one
        for one, fitted in asked_chapters(
            case, asked, read_file, lambda line: print(f"  {line}", flush=True)
        ):
            told.append(one)
            maps.extend(fitted)
            yield one

    split = settings.part if path is None else "test"
    write_evaluation(
        run_dir, settings.name, evaluation, split, chapters(), words, diagnostics=case.diagnosis.metrics
    )
    if maps and settings.num_draws is not None:
        print(
            "  the maps are not recorded: they were fitted with another num_draws than bdl predict uses by itself"
        )
    elif maps:
        print(f"  recorded in {record(run_dir, maps)}: {', '.join(one.describe() for one in maps)}")
    _show(told)
    gone = sorted(before - {one.key for one in told})
    if gone:
        print(
            f"\nthe evaluation '{settings.name}' that was here before had more chapters: {', '.join(gone)}. They are "
            "gone; with another name=... both are kept."
        )
    print(f"\nwritten: {run_dir.evaluation(settings.name)}")
    more = "" if settings.name == "test" else f" name={settings.name}"
    print(f"look at it with: bdl report run={run_dir.path}{more}")
    return Exit.DONE


def _own_data(
    stored: dict[str, Any], manifest: dict[str, Any], *, needed: bool
) -> tuple[Data | None, pd.DataFrame | None, str]:
    """The run's data and its raw columns; without them, why there are none, if the scored rows come from elsewhere."""
    try:
        data = load_data(stored)
        expected = manifest["data"]["fingerprint"]
        if data.fingerprint() != expected:
            raise UsageError(
                f"The data at data.root={stored['data']['root']} differ from those the run was trained on "
                f"(fingerprint {data.fingerprint()[:12]}, the manifest says {expected[:12]}): scores would not compare."
            )
    except UsageError as error:
        if needed:
            raise
        return None, None, str(error)
    source, root = source_of(stored)
    return data, source.table(root), ""


def _notes(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in manifest["data"].items() if key not in ("name", "fingerprint", "augment")
    }


def _remarks(foreign: Foreign, data: Data | None) -> dict[str, str]:
    """What makes scores of a file mislead: rows that were trained on, categories that training never saw."""
    count = len(foreign.part)
    found = {
        f"column {name}": f"{rows} of {count} rows have a category that training never saw"
        for name, rows in foreign.unseen.items()
    }
    known = 0 if data is None else seen_before(foreign.part, data.train)
    if known:
        found["training rows"] = f"{known} of {count} rows have the inputs of a row that was trained on"
    for name, words in found.items():
        log.warning("%s: %s", name, words)
    return found


def _scorer(
    run_dir: RunDir, artefact: Artefact, predictor: Predictor, settings: Settings, launcher: Launcher
) -> Any:
    """Scores a part: in this process if the launcher is one process, else in shards over its workers."""

    def keeps(part: Part) -> bool:
        return len(part) * artefact.posterior.num_members <= MOST_NLL

    if not launcher.remote:
        if settings.member_shards > 1:
            raise UsageError(
                "member_shards needs processes to hand the shards to: cluster=ray_local or ray_cluster."
            )
        return lambda part: score_part(
            predictor, part, artefact.target, keep_nll=keeps(part), tick=told_of(part)
        )
    posterior = Posterior(
        run_dir.posterior.absolute(),
        predictor.device.type,
        settings.num_draws,
        allow=tuple(allowed_packages()),
    )
    workers = launcher.num_workers or max(1, launcher.resources().cpus)

    def score(part: Part) -> Scores:
        shares = max(workers, -(-len(part) // ROWS_A_SHARD))
        shards = plan_shards(len(part), artefact.posterior.ids, shares, settings.member_shards)
        return score_in_shards(part, artefact, posterior, shards, launcher.map, told_of(part))

    return score


def told_of(part: Part) -> Callable[[int], None]:
    """Prints how far a long scoring has come, now and then."""
    last = time.monotonic()

    def tick(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > TELL_S and done < len(part):
            last = time.monotonic()
            print(f"  scored {done:,} of {len(part):,} rows", flush=True)

    return tick


def _train_rows(run_dir: RunDir, artefact: Artefact, data: Data | None) -> dict[int, np.ndarray]:
    try:
        return training_rows(run_dir.posterior, artefact.meta)
    except (KeyError, UsageError):  # of an earlier version: all members saw the whole part
        rows = np.empty(0, np.int64) if data is None else data.train.rows
        return dict.fromkeys(artefact.posterior.ids, rows)


def _show(told: list[Section]) -> None:
    """What the chapters say, those that need attention first in line."""
    marks = {"good": "ok  ", "note": "    ", "warn": "LOOK", "empty": "none"}
    print()
    for one in told:
        print(f"{marks[one.level]} {one.title}: {one.verdict}")
        for warning in one.warnings[:MOST_WARNINGS]:
            print(f"       ({warning})")
        if len(one.warnings) > MOST_WARNINGS:
            print(f"       (and {len(one.warnings) - MOST_WARNINGS} more remarks in the report)")

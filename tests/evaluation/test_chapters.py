"""Chapters of runs that went wrong: constant predictions, members that predict NaN, parts that are missing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_posteriors import INPUTS, small_artefact

from bdl_train.data import Data, Part
from bdl_train.data._foreign import Foreign
from bdl_train.errors import UsageError
from bdl_train.evaluation.asked import Asked, Costs, Deferral
from bdl_train.evaluation.case import Case
from bdl_train.evaluation.chapters import asked_chapters, standard_chapters
from bdl_train.evaluation.evaluate import assemble, write_evaluation
from bdl_train.evaluation.section import Section
from bdl_train.evaluation.shards import score_part
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.atoms import Atoms
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, read_json

ASKED = Asked(
    slices=["a>0", "b"],
    find_slices=True,
    ood=["other.csv"],
    recalibrate=True,
    conformal=[0.9],
    conformal_by="b",
    defer=Deferral(metric=None, target=0.2, by=None, confidence=None),
    cost=Costs(matrix=[[0, 1, 1], [1, 0, 1], [1, 1, 0]], actions=None),
    robustness=True,
    sensitivity=True,
    attacks=[],
    privacy=True,
    decisions=None,
    max_rows=60,
    seed=0,
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def part_of(artefact: Artefact, count: int, start: int, seed: int) -> Part:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 3)).astype(np.float32)
    classes = artefact.target.num_classes
    y = random.integers(0, classes, count) if classes else random.normal(size=count).astype(np.float32)
    return Part(x, y, np.arange(start, start + count))


def case_of(artefact: Artefact, *, num_val: int = 80) -> Case:
    train, val = part_of(artefact, 120, 0, 0), part_of(artefact, num_val, 120, 1)
    test = part_of(artefact, 150, 200, 2)
    raw = pd.DataFrame(np.random.default_rng(3).normal(size=(350, 3)), columns=pd.Index(list("abc")))
    predictor = Predictor(artefact)
    score = lambda part: score_part(predictor, part, artefact.target)  # noqa: E731
    rows, members = score(test)
    return Case(
        artefact=artefact,
        predictor=predictor,
        score=score,
        part=test,
        evaluation=assemble(rows, members, test.rows, artefact.target),
        table=raw.iloc[test.rows].reset_index(drop=True),
        data=Data("toy", train, val, test, INPUTS, artefact.target),
        raw=raw,
        stops_early=True,
        train_rows=dict.fromkeys(artefact.posterior.ids, train.rows),
        own=True,
        notes={},
    )


def chapters(case: Case, asked: Asked = ASKED) -> dict[str, Section]:
    def read(path: str, key: str) -> Foreign:
        return Foreign("other", part_of(case.artefact, 40, 0, 9), None, False)

    said: list[str] = []
    found = [*standard_chapters(case, 0), *(one for one, _ in asked_chapters(case, asked, read, said.append))]
    assert len({one.key for one in found}) == len(found)
    return {one.key: one for one in found}


def with_weights(artefact: Artefact, change) -> Artefact:
    atoms = [one for one in artefact.posterior.members if isinstance(one, Atoms)]
    members = [Atoms(change(m, one.flat.clone()), one.buffers) for m, one in enumerate(atoms)]
    return replace(artefact, posterior=replace(artefact.posterior, members=members))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_a_healthy_run_has_all_its_chapters(likelihood: str, tmp_path: Path):
    case = case_of(small_artefact(likelihood))
    found = chapters(case)
    empty = {key for key, one in found.items() if one.level == "empty"}
    assert empty == ({"costs"} if likelihood == "gaussian" else set())
    write_evaluation(RunDir(tmp_path), "test", case.evaluation, "test", found.values())
    hashes = read_json(tmp_path / "evaluation" / "test" / "hashes.json")
    assert sum(name.endswith(".json") for name in hashes) == len(found) + 1
    # Written again with fewer chapters, the old ones are gone.
    write_evaluation(RunDir(tmp_path), "test", case.evaluation, "test", [found["members"]])
    left = {path.name for path in (tmp_path / "evaluation" / "test" / "sections").glob("*.json")}
    assert left == {"members.json"}


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_constant_predictions_are_named_and_hinder_nothing(likelihood: str):
    artefact = with_weights(small_artefact(likelihood), lambda m, flat: flat.zero_())
    found = chapters(case_of(artefact))
    assert "the same for every row" in found["uncertainty"].verdict
    for key in (
        "data",
        "calibration",
        "members",
        "slices",
        "deferral",
        "conformal",
        "robustness",
        "sensitivity",
    ):
        assert found[key].level != "empty", (key, found[key].verdict)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_a_member_that_predicts_nan_shows_and_breaks_no_chapter(likelihood: str):
    def broken(member: int, flat: torch.Tensor) -> torch.Tensor:
        return flat.fill_(float("nan")) if member == 1 else flat

    case = case_of(with_weights(small_artefact(likelihood), broken))
    values = {metric.key: metric.value for metric in case.evaluation.metrics}
    assert values["nll"] is not None
    assert np.isnan(values["nll"])
    assert values["best_member_nll"] is not None
    assert np.isfinite(values["best_member_nll"])
    found = chapters(case)
    assert "not finite" in found["members"].verdict
    for key in ("recalibration", "conformal"):
        assert found[key].level == "empty", key
        assert "NaN" in found[key].verdict or "finite" in found[key].verdict, found[key].verdict


def test_without_a_validation_part_only_what_needs_it_is_empty():
    found = chapters(case_of(small_artefact(), num_val=0))
    empty = {key for key, one in found.items() if one.level == "empty"}
    assert empty == {"recalibration", "conformal", "deferral"}
    assert "data.val_fraction" in found["conformal"].verdict


def test_rows_of_another_file_without_the_runs_data():
    case = replace(case_of(small_artefact()), data=None, raw=None, own=False, missing="data.root is gone.")
    found = chapters(case)
    assert found["recalibration"].verdict.endswith("data.root is gone.")
    assert "test part" in found["privacy"].verdict
    assert found["slices"].level != "empty"
    assert found["ood"].level != "empty"


def test_files_that_cannot_be_read_leave_the_others():
    case = case_of(small_artefact())

    def read(path: str, key: str) -> Foreign:
        if path == "broken":
            raise UsageError(f"{key}=broken: there is no such file")
        return Foreign(path, part_of(case.artefact, 40, 0, 9), None, False)

    asked = replace(ASKED, ood=["broken", "fine"])
    found = {one.key: one for one, _ in asked_chapters(case, asked, read, lambda line: None)}
    assert set(found["ood"].tables["detection"]["out_set"]) == {"fine"}
    assert "ood=broken: there is no such file" in found["ood"].warnings

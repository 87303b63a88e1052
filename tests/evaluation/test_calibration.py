"""Chapters on calibration, uncertainty and data: rows drawn from the model are calibrated, sharpened ones are not."""

# pandas-stubs take a column for anything that a table can hold.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Normal

from bdl_train.data import Part
from bdl_train.evaluation.calibration import calibration_section, reliability, share_interval
from bdl_train.evaluation.data_summary import data_section
from bdl_train.evaluation.metrics import metrics_of
from bdl_train.evaluation.rows import RowScores, score_rows
from bdl_train.evaluation.section import Section
from bdl_train.evaluation.uncertainty import bands_section, examples_section, uncertainty_section
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.predict import TilePrediction
from bdl_train.predictive.stats import stats_of
from bdl_train.specs import TargetKind, TargetSpec

CLASSES = TargetSpec(TargetKind.CLASS, "species", ("a", "b", "c"))
PRICE = TargetSpec(TargetKind.CONTINUOUS, "price", loc=10.0, scale=2.0)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def classes(sharper: float = 1.0, count: int = 3000) -> RowScores:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, count, 3, generator=generator, dtype=torch.float64)
    logits = logits + 2 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(-1).mean(0), 1, generator=generator)[:, 0]
    weights = torch.full((3,), -math.log(3), dtype=torch.float64)
    components = stats_of(Categorical(logits=sharper * logits), weights, y)
    return score_rows(
        TilePrediction(slice(0, count), components, None, None, torch.arange(3)), y.numpy(), CLASSES
    )


def numbers(narrower: float = 1.0, count: int = 2000) -> RowScores:
    generator = torch.Generator().manual_seed(1)
    loc = torch.randn(2, count, generator=generator, dtype=torch.float64)
    scale = 0.1 + torch.rand(2, count, generator=generator, dtype=torch.float64)
    which = torch.randint(0, 2, (count,), generator=generator)
    rows = torch.arange(count)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    y = (loc[which, rows] + scale[which, rows] * noise).numpy()
    middle = loc.mean(0)
    told = Normal(middle + (loc - middle) / narrower, scale / narrower)
    weights = torch.full((2,), -math.log(2), dtype=torch.float64)
    stats_ = stats_of(told, weights, torch.from_numpy(y))
    return score_rows(
        TilePrediction(slice(0, count), stats_, Mixture(told, weights), None, torch.arange(2)), y, PRICE
    )


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    return table[name].to_numpy()


def calibration(rows: RowScores) -> Section:
    return calibration_section(rows, {metric.key: metric for metric in metrics_of(rows, "price")})


def test_exact_intervals_of_shares_are_those_of_scipy():
    hits, count = np.array([0, 3, 10]), np.array([10, 12, 10])
    low, high = share_interval(hits, count)
    for i in range(3):
        expected = stats.binomtest(int(hits[i]), int(count[i])).proportion_ci(0.95, "exact")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high))


def test_the_diagram_has_bins_of_equal_mass_that_hold_all_rows():
    random = np.random.default_rng(0)
    said = random.random(301).round(2)
    table = reliability(said, (random.random(301) < said).astype(float))
    size = column(table, "n")
    assert size.sum() == 301
    assert column(table, "probability") @ size / 301 == pytest.approx(said.mean())
    assert size.max() < 30


def test_classes_drawn_from_the_model_come_true_and_sharpened_ones_do_not():
    own, sharp = calibration(classes()), calibration(classes(3.0))
    assert own.level == "good"
    assert "come true" in own.verdict
    assert sharp.level == "warn"
    assert "too sure of itself" in sharp.verdict
    assert "not sure enough" in calibration(classes(0.3)).verdict


def test_targets_drawn_from_the_mixture_have_flat_pit_and_narrow_ones_do_not():
    own, narrow, wide = (calibration(numbers(k)) for k in (1.0, 2.0, 0.5))
    assert own.level == "good"
    assert "too narrow" in narrow.verdict
    assert "too wide" in wide.verdict
    pit = own.tables["pit"]
    left, right, density, low, high = (
        column(pit, name) for name in ("left", "right", "density", "low", "high")
    )
    assert density @ (right - left) == pytest.approx(1)
    assert np.mean((low <= 1) & (high >= 1)) > 0.8
    ninety = own.tables["coverage"].set_index("level").loc[0.9].to_dict()
    assert ninety["low"] <= 0.9 <= ninety["high"]


def test_nan_rows_are_counted_and_left_out():
    rows = classes(count=300)
    rows.columns["confidence"][:3] = np.nan
    assert calibration(rows).warnings == ("3 rows have no finite probability",)


def test_uncertainty_finds_errors_or_says_that_it_does_not():
    useful = uncertainty_section(classes(), CLASSES)
    assert useful.level == "good"
    groups = useful.tables["error_by_uncertainty"]
    assert groups["error"].iloc[-1] > groups["error"].iloc[0]
    assert groups["n"].sum() == 3000
    histogram = useful.tables["histogram"]
    assert histogram.groupby("part")["n"].sum().to_dict() == {
        "total": 3000,
        "aleatoric": 3000,
        "epistemic": 3000,
    }
    shuffled = classes()
    shuffled.columns["total"] = np.random.default_rng(0).permutation(shuffled.columns["total"])
    assert "does not find the errors" in uncertainty_section(shuffled, CLASSES).verdict
    constant = classes()
    constant.columns["total"][:] = 0.7
    assert "the same for every row" in uncertainty_section(constant, CLASSES).verdict
    assert uncertainty_section(numbers(), PRICE).level == "good"


def test_the_worst_rows_come_first_with_their_raw_columns_and_pixels():
    rows = classes(count=50)
    table = pd.DataFrame({"sex": ["f", "m"] * 25})
    ids = np.arange(100, 150)
    found = examples_section(rows, ids, CLASSES, table, np.zeros((50, 3), np.float32)).tables["wrong"]
    worst = int(np.argmax(rows.columns["nll"]))
    assert found["row"].iloc[0] == ids[worst]
    assert found["input sex"].iloc[0] == table["sex"][worst]
    assert found["true"].iloc[0] == CLASSES.classes[int(rows.columns["y"][worst])]
    images = np.random.default_rng(0).integers(0, 255, (50, 1, 4, 4)).astype(np.uint8)
    found = examples_section(rows, ids, CLASSES, None, images).tables["wrong"]
    assert found["pixels"].iloc[0] == images[worst].tobytes()
    assert found["shape"].iloc[0] == "1,4,4"


def test_bands_hold_features_and_are_thinned_with_a_word():
    rows = numbers()
    table = pd.DataFrame({"u": [str(i) for i in range(2000)], "name": ["x"] * 2000, "price": range(2000)})
    section = bands_section(rows, PRICE, table, 0)
    assert section.warnings == ("1500 of 2000 rows, chosen at random",)
    points = section.tables["points"]
    assert [name for name in points if name.startswith("input")] == ["input u"]
    picked = points["input u"].astype(int).to_numpy()
    np.testing.assert_allclose(points["y"], rows.columns["y"][picked])
    assert bands_section(classes(count=20), CLASSES, None, 0).level == "empty"


def test_the_data_chapter_counts_parts_and_names_absent_classes():
    def part(y: list[int]) -> Part:
        return Part(np.zeros((len(y), 2), np.float32), np.array(y), np.arange(len(y)))

    parts = {"train": part([0, 1, 2, 2]), "test": part([0, 0])}
    tables = {
        "train": pd.DataFrame({"age": ["1", "3", None, "2"], "sex": ["f", "f", "m", None]}),
        "test": pd.DataFrame({"age": ["5", "7"], "sex": ["f", "m"]}),
    }
    section = data_section(parts, CLASSES, tables, {"duplicated_rows": 3})
    assert section.tables["parts"]["rows"].tolist() == [4, 2]
    assert section.tables["target"]["train"].tolist() == [0.25, 0.25, 0.5]
    columns = section.tables["columns"].set_index("column")
    assert columns.loc["age", "train"] == "2 ± 0.816"
    assert columns.loc["age", "train missing"] == 0.25
    assert columns.loc["sex", "train"] == "f (50 %), 2 levels"
    assert "no scored row is of class b, c" in section.warnings
    assert "duplicated rows: 3" in section.warnings
    numeric = data_section(
        {"test": Part(np.zeros((2, 1)), np.array([0.0, 1.0]), np.arange(2))}, PRICE, None, {}
    )
    assert numeric.tables["target"].set_index("statistic").loc["mean", "test"] == 11.0


def test_few_rows_tell_nothing_and_rows_without_errors_have_nothing_to_find():
    few, numeric = classes(count=12), numbers(count=12)
    for section in (calibration(few), calibration(numeric), uncertainty_section(few, CLASSES)):
        assert section.level == "note"
        assert "Too few rows to tell" in section.verdict
    right = classes(count=200)
    right.columns["correct"][:] = 1.0
    section = uncertainty_section(right, CLASSES)
    assert section.level == "note"
    assert "nothing for uncertainty to find" in section.verdict

"""The chapter on conformal prediction: its table by the functions, groups, and rows of another kind."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from miscovered_rows import classes, edges_of, numbers, own_scores, probs_of

from bdl_train.errors import UsageError
from bdl_train.evaluation.conformal import (
    cqr_scores,
    lac_scores,
    normalised_intervals,
    normalised_scores,
    prediction_sets,
    threshold,
)
from bdl_train.evaluation.conformal_chapter import conformal_section
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section, read_section, write_section
from bdl_train.specs import TargetKind, TargetSpec

PRICE = TargetSpec(TargetKind.CONTINUOUS, "price")
SPECIES = TargetSpec(TargetKind.CLASS, "species", ("a", "b", "c", "d"))


COLUMNS = [
    "method", "level", "threshold_from", "group", "num_val", "n", "threshold", "coverage", "low", "high",
    "expected_low", "expected_high", "verdict", "size", "size_p10", "size_p90", "empty",
]  # fmt: skip


def table_of(section: Section) -> pd.DataFrame:
    table = section.tables["coverage"]
    assert list(table) == COLUMNS
    return table


def section_of(val: RowScores, test: RowScores, **settings) -> Section:
    target = PRICE if val.probs is None else SPECIES
    arguments = {"levels": (0.5, 0.95), "target": target, "groups": None, "seed": 0}
    return conformal_section(val, test, **{**arguments, **settings})


@pytest.mark.parametrize(
    ("make", "methods"), [(numbers, ["normalised", "cqr"]), (classes, ["lac", "aps", "aps_randomised"])]
)
def test_rows_that_are_alike_are_covered_as_promised(make, methods: list[str], tmp_path):
    section = section_of(make(400, 13), make(600, 14))
    table = table_of(section)
    assert section.level == "good", section.verdict
    assert table["method"].tolist() == methods * 2
    assert set(table["verdict"]) == {"as expected"}
    assert section.warnings == ()
    first = table.iloc[0]
    covered = round(first["coverage"] * 600)
    expected = scipy.stats.beta.ppf([0.025, 0.975], [covered, covered + 1], [601 - covered, 600 - covered])
    assert (first["low"], first["high"]) == pytest.approx(tuple(expected))
    assert np.all(table["size_p10"] <= table["size_p90"])
    write_section(tmp_path, section)
    pd.testing.assert_frame_equal(read_section(tmp_path, "conformal").tables["coverage"], table)


@pytest.mark.parametrize("make", [numbers, classes])
def test_rows_of_another_kind_are_found_out(make):
    section = section_of(make(400, 13), make(600, 14, shift=2.0))
    assert section.level == "warn"
    assert "too low" in section.verdict
    assert "do not look alike" in section.verdict


def test_table_counts_what_the_functions_give():
    val, test = numbers(400, 13), numbers(600, 14)
    row = table_of(section_of(val, test)).iloc[0]
    intervals = normalised_intervals(test, threshold(normalised_scores(val), 0.5))
    y = test.columns["y"]
    assert row["coverage"] == np.mean((intervals[:, 0] <= y) & (y <= intervals[:, 1]))
    assert row["size"] == pytest.approx(np.diff(intervals, axis=1).mean())
    sets_row = table_of(section_of(classes(400, 13), classes(600, 14))).iloc[0]
    val, test = classes(400, 13), classes(600, 14)
    sets = prediction_sets(
        lac_scores(probs_of(test)), threshold(own_scores(val, lac_scores(probs_of(val))), 0.5)
    )
    assert sets_row["size"] == sets.sum(1).mean()
    assert sets_row["empty"] == (~sets.any(1)).mean()


def test_groups_have_thresholds_of_their_own_and_small_ones_a_warning():
    val, test = numbers(120, 15), numbers(200, 16)
    groups = (np.array(["north"] * 110 + ["south"] * 10), np.array(["north", "south", "west", "north"] * 50))
    section = section_of(val, test, groups=groups)
    table = table_of(section)
    assert len(table) == 2 * 2 * 2 * 4
    own = table[(table["threshold_from"] == "own group") & (table["method"] == "cqr")].set_index(
        ["level", "group"]
    )
    scores = cqr_scores(val.columns["y"], edges_of(val))
    assert own.loc[(0.95, "north"), "threshold"] == threshold(scores[:110], 0.95)
    assert own.loc[(0.95, "south"), "threshold"] == own.loc[(0.5, "west"), "threshold"] == math.inf
    assert own.loc[(0.95, "south"), "coverage"] == 1
    assert own.loc[(0.5, "west"), "coverage"] == 1
    assert own.loc[(0.95, "south"), "size"] == math.inf
    assert own["threshold"].to_dict()[0.5, "south"] < math.inf
    assert own.loc[(0.5, "south"), "num_val"] == 10
    marginal = table[(table["threshold_from"] == "all rows") & (table["group"] != "all")]
    assert set(marginal["verdict"]) == {"not judged"}
    assert np.isnan(marginal["expected_low"]).all()
    assert sorted(section.warnings) == [
        "Group 'south' has 10 validation rows, at least 19 are needed for level 0.95: with its own threshold "
        "everything is covered.",
        "Group 'west' has 0 validation rows, at least 1 are needed for level 0.5: with its own threshold everything "
        "is covered.",
        "Group 'west' has 0 validation rows, at least 19 are needed for level 0.95: with its own threshold everything "
        "is covered.",
    ]


def test_cqr_needs_quantiles_of_its_level():
    val, test = numbers(120, 15), numbers(200, 16)
    section = section_of(val, test, levels=(0.7,))
    assert table_of(section)["method"].tolist() == ["normalised"]
    assert section.warnings == ("cqr is left out at level 0.7: the scores hold no quantiles of 0.7.",)
    section = section_of(val, test, levels=(0.7,), edges=({0.7: edges_of(val)}, {0.7: edges_of(test)}))
    row = table_of(section).set_index("method").loc["cqr"]
    assert row["threshold"] == threshold(cqr_scores(val.columns["y"], edges_of(val)), 0.7)
    assert section.warnings == ()


def test_the_seed_decides_the_randomised_sets_only():
    val, test = classes(100, 17), classes(100, 18)
    one, other = (table_of(section_of(val, test, seed=seed)).set_index("method") for seed in (0, 1))
    assert (one.loc["aps_randomised", "size"] != other.loc["aps_randomised", "size"]).all()
    pd.testing.assert_frame_equal(one.drop(index="aps_randomised"), other.drop(index="aps_randomised"))


def test_what_cannot_be_ranked_is_refused():
    rows = numbers(50, 0)
    with pytest.raises(UsageError, match="needs validation rows, there are none"):
        section_of(rows.take(np.zeros(0, int)), rows)
    with pytest.raises(UsageError, match=r"between 0 and 1, got 1\.0"):
        section_of(rows, rows, levels=(1.0,))
    rows.columns["total_std"][3] = 0
    with pytest.raises(UsageError, match="1 of 50 rows have a predictive standard deviation"):
        section_of(rows, numbers(50, 1))
    rows = classes(50, 0)
    probs_of(rows)[:3] = np.nan
    with pytest.raises(UsageError, match="3 of 50 validation rows are predicted as NaN"):
        section_of(rows, classes(50, 1))
    with pytest.raises(UsageError, match="3 of 50 test rows are predicted as NaN"):
        section_of(classes(50, 1), rows)

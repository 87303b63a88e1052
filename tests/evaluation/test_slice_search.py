"""A slice that was planted is found and confirmed, noise is not, and the search is that of trying every pair."""

import itertools
import math
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.slice_search import conditions_of, find_slices, lower_bounds, search_section
from bdl_train.evaluation.slicing import parse_slices


def table_of(count: int, seed: int, num_columns: int = 6) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {}
    for i in range(num_columns):
        name = f"column-{i}"
        is_number = i % 2 == 1
        columns[name] = (
            random.normal(50, 15, count).round(1) if is_number else random.choice(list("abcd"), count)
        )
    return pd.DataFrame(columns)


def rows_of(nll: np.ndarray, seed: int = 0) -> RowScores:
    random = np.random.default_rng(seed)
    correct = (random.random(len(nll)) < np.exp(-nll)).astype(float)
    y = np.zeros(len(nll), int)
    return RowScores({"nll": nll, "correct": correct, "prediction": y, "y": y}, np.full((len(nll), 3), 1 / 3))


def records(found: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]


def mask_of(name: str, table: pd.DataFrame) -> np.ndarray:
    (one,), _ = parse_slices([name], table)
    return one.mask


def planted(count: int = 3000, seed: int = 0) -> tuple[pd.DataFrame, RowScores, np.ndarray]:
    table = table_of(count, seed)
    bad = ((table["column-0"] == "b") & (table["column-3"] > 60)).to_numpy()
    nll = np.random.default_rng(seed + 1).exponential(0.3, count) + bad
    return table, rows_of(nll), bad


@pytest.mark.parametrize("max_conditions", [2, 3])
def test_a_planted_slice_of_two_conditions_is_found_and_confirmed(max_conditions: int):
    table, rows, bad = planted()
    section = search_section(table, rows, loss="nll", seed=0, max_conditions=max_conditions)
    found = section.tables["found"]
    assert list(found.columns)[:11] == [
        "slice", "n", "loss_search", "loss_confirm", "rest", "difference", "low", "high", "p", "p_adjusted",
        "significant",
    ]  # fmt: skip
    first = records(found)[0]
    mask = mask_of(first["slice"], table)
    assert (mask & bad).sum() / (mask | bad).sum() > 0.8
    assert first["n"] == mask.sum()
    assert first["significant"]
    assert first["low"] < 1 < first["high"]
    assert section.level == "warn"
    assert "adjusted p < 0.001" in section.verdict


def test_a_slice_is_not_listed_again_as_its_parts():
    table, rows, bad = planted()
    found = find_slices(table, rows, loss="nll", seed=0)
    masks = [mask_of(one["slice"], table) for one in records(found)]
    for a, b in itertools.combinations(masks, 2):
        assert (a & b).sum() <= 0.8 * (a | b).sum()
    # The column-3 half of the planted rows, the column-0 half and the like are worse by the planted rows alone.
    for mask in masks[1:]:
        beside = mask & ~masks[0]
        assert beside.sum() >= 30
        assert (beside & bad).sum() < 0.3 * beside.sum()


def test_two_planted_slices_are_both_found():
    table, rows, bad = planted(4000)
    other = ((table["column-2"] == "c") & (table["column-5"] <= 40)).to_numpy()
    found = find_slices(table, rows_of(rows.columns["nll"] + 0.8 * other), loss="nll", seed=1)
    masks = [mask_of(one["slice"], table) for one in records(found) if one["significant"]]
    for wanted in (bad, other):
        assert max((mask & wanted).sum() / (mask | wanted).sum() for mask in masks) > 0.7


def test_numbers_are_those_of_the_named_half():
    table, rows, _ = planted(1000, seed=3)
    found = find_slices(table, rows, loss="error_rate", seed=5, min_rows=20, top=3)
    order = np.random.default_rng(5).permutation(1000)
    wrong = 1 - rows.columns["correct"]
    for row in records(found):
        mask = mask_of(row["slice"], table)
        search, confirm = np.isin(np.arange(1000), order[:500]), np.isin(np.arange(1000), order[500:])
        assert row["loss_search"] == pytest.approx(wrong[mask & search].mean())
        assert row["loss_confirm"] == pytest.approx(wrong[mask & confirm].mean())
        assert row["rest"] == pytest.approx(wrong[~mask & confirm].mean())
        assert row["difference"] == pytest.approx(row["loss_confirm"] - row["rest"])
        assert row["n_confirm"] == (mask & confirm).sum()
        assert (mask & search).sum() >= 20


def test_noise_is_confirmed_in_less_than_one_search_of_twenty():
    times, false = 100, 0
    for seed in range(times):
        table = table_of(400, seed, num_columns=2)
        nll = np.random.default_rng(1000 + seed).exponential(0.4, 400)
        found = find_slices(table, rows_of(nll), loss="nll", seed=seed, min_rows=20)
        false += any(row["significant"] for row in records(found))
    assert false / times <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / times)


def test_on_the_searched_half_noise_would_look_significant():
    """The reason for two halves: the best of many slices of noise, tested where it was found."""
    looks = 0
    for seed in range(20):
        table = table_of(400, seed)
        nll = np.random.default_rng(2000 + seed).exponential(0.4, 400)
        found = find_slices(table, rows_of(nll), loss="nll", seed=seed, min_rows=20, top=1)
        search = np.isin(np.arange(400), np.random.default_rng(seed).permutation(400)[:200])
        mask = mask_of(records(found)[0]["slice"], table)
        test: Any = scipy.stats.ttest_ind(nll[mask & search], nll[~mask & search], equal_var=False)
        looks += bool(test.pvalue < 0.05)
    assert looks >= 8


def test_lower_bounds_are_those_of_every_pair_by_hand():
    random = np.random.default_rng(0)
    masks = random.random((7, 300)) < random.uniform(0.05, 0.9, (7, 1))
    values = random.exponential(size=300)
    found = lower_bounds(masks, masks, values.astype(np.float32), 30, 1.5)
    for i, j in itertools.product(range(7), range(7)):
        both = masks[i] & masks[j]
        inside, outside = values[both], values[~both]
        if min(len(inside), len(outside)) < 30:
            assert found[i, j] == -np.inf
        else:
            error = np.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
            assert found[i, j] == pytest.approx(inside.mean() - outside.mean() - 1.5 * error, abs=1e-4)
    assert np.isinf(found).any()
    assert np.isfinite(found).any()


def test_the_first_slice_is_the_best_of_all_that_are_tried_one_by_one():
    table, rows, _ = planted(600, seed=7)
    found = find_slices(table, rows, loss="nll", seed=2, top=1)
    search = np.sort(np.random.default_rng(2).permutation(600)[:300])
    values = rows.columns["nll"][search]
    conditions = [(name, mask[search]) for name, mask in list(conditions_of(table))]
    conditions = [(name, mask) for name, mask in conditions if 30 <= mask.sum() <= 270]
    scores: dict[frozenset[str], float] = {}
    for size in (1, 2):
        reach = math.sqrt(2 * math.log(math.comb(len(conditions), size)))
        for some in itertools.combinations(conditions, size):
            mask = np.logical_and.reduce([part for _, part in some])
            if 30 <= mask.sum() <= 270:
                inside, outside = values[mask], values[~mask]
                error = math.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
                name = frozenset(name for name, _ in some)
                scores[name] = inside.mean() - outside.mean() - reach * error
    best = max(scores, key=lambda name: scores[name])
    assert frozenset(records(found)[0]["slice"].split(" & ")) == best


def test_conditions_are_expressions_for_their_rows():
    table = table_of(300, 0)
    table.loc[:9, "column-1"] = np.nan
    table["gain"] = np.repeat([0, 7, 9], [200, 90, 10])
    for name, mask in list(conditions_of(table)):
        (one,), _ = parse_slices([name], table)
        np.testing.assert_array_equal(one.mask, mask)
    names = [name for name, _ in list(conditions_of(table))]
    assert {"column-0=a", "column-1=missing", "gain>0", "gain<=0", "gain=7"} <= set(names)
    assert len(names) == len(set(names))


def test_the_same_seed_finds_the_same_slices():
    table, rows, _ = planted(800)
    first, again = (find_slices(table, rows, loss="nll", seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)


def test_noise_and_tables_without_candidates_are_said_in_words():
    table = table_of(400, 11, num_columns=2)
    rows = rows_of(np.random.default_rng(12).exponential(0.4, 400))
    section = search_section(table, rows, loss="nll", seed=0, top=2)
    assert section.level == "note"
    assert section.verdict.startswith("None of 2 slices that looked worst")
    section = search_section(pd.DataFrame({"id": [f"row {i}" for i in range(400)]}), rows, loss="nll", seed=0)
    assert len(section.tables["found"]) == 0
    assert section.verdict.startswith("No slice has rows enough")
    assert section.level == "note"


def test_wrong_settings_are_refused():
    table, rows, _ = planted(400)
    cases = [
        ({"loss": "nlll"}, "Did you mean 'nll'"),
        ({"max_conditions": 4}, "1, 2 or 3, not 4"),
        ({"min_rows": 200}, "needs 4 · min_rows = 800 rows"),
        ({"top": 0}, "top ≥ 1"),
    ]
    for change, words in cases:
        with pytest.raises(UsageError, match=words):
            find_slices(table, rows, **{"loss": "nll", "seed": 0, **change})
    with pytest.raises(UsageError, match="399 rows, but 400 rows are scored"):
        find_slices(table.iloc[:399], rows, loss="nll", seed=0)
    rows.columns["nll"][0] = np.inf
    with pytest.raises(UsageError, match=r"nll of 1 rows is not finite.*search by error_rate"):
        find_slices(table, rows, loss="nll", seed=0)


def test_ten_thousand_rows_of_twenty_columns_take_seconds():
    table = table_of(10_000, 0, num_columns=20)
    rows = rows_of(np.random.default_rng(1).exponential(0.4, 10_000))
    start = time.process_time()  # of this process alone: the machine may be busy
    find_slices(table, rows, loss="nll", seed=0)
    assert time.process_time() - start < 5


def test_a_column_like_an_identifier_hinders_no_search():
    random = np.random.default_rng(0)
    table = pd.DataFrame({"note": [f"text {i}" for i in range(400)], "sex": random.choice(["f", "m"], 400)})
    assert {name for name, _ in conditions_of(table)} == {"sex=f", "sex=m"}

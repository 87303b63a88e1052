"""Slices from words: each form of the grammar against pandas, and what a wrong expression leaves."""

import numpy as np
import pandas as pd
import pytest

from bdl_train.errors import UsageError
from bdl_train.evaluation.slicing import MOST_COMBINATIONS, MOST_LEVELS, Slice, parse_slices, short_number


def people(count: int = 400, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    age = random.integers(17, 91, count)
    return pd.DataFrame(
        {
            "age": [str(value) for value in age],  # CSV cells are text
            "sex": random.choice(["Male", "Female", "?"], count, p=[0.6, 0.3, 0.1]),
            "race": random.choice(["White", "Black", "Asian-Pac-Islander"], count),
            "marital-status": random.choice(["Never-married", "Divorced"], count),
            "marital": random.choice(["a", "b"], count),
            "income-per-year": random.normal(50, 10, count),
            "d.time": random.integers(0, 5, count),
            "native country": random.choice(["Trinadad&Tobago", "Outlying-US(Guam-USVI-etc)"], count),
        }
    )


TABLE = people()
AGE = TABLE["age"].astype(int)


def parse(*expressions: str, table: pd.DataFrame = TABLE) -> tuple[dict[str, Slice], list[str]]:
    slices, warnings = parse_slices(expressions, table)
    return {one.name: one for one in slices}, warnings


@pytest.mark.parametrize(
    ("expression", "name", "rows"),
    [
        ("age>65", "age>65", AGE > 65),
        ("age > 65", "age>65", AGE > 65),
        ("age>=65", "age>=65", AGE >= 65),
        ("age≥65", "age>=65", AGE >= 65),
        ("age<=40", "age<=40", AGE <= 40),
        ("age<40", "age<40", AGE < 40),
        ("age==40", "age=40", AGE == 40),
        ("age==40.0", "age=40", AGE == 40),
        ("age!=40", "age!=40", AGE != 40),
        ("age in 18..25", "age 18..25", AGE.between(18, 25)),
        ("age 18..25", "age 18..25", AGE.between(18, 25)),
        ("d.time=3", "d.time=3", TABLE["d.time"] == 3),
        ("income-per-year in -1e3..49.5", "income-per-year -1e3..49.5", TABLE["income-per-year"] <= 49.5),
        ("sex==Female", "sex=Female", TABLE["sex"] == "Female"),
        ('sex=="Female"', "sex=Female", TABLE["sex"] == "Female"),
        ("sex==missing", "sex=missing", TABLE["sex"] == "?"),
        ("sex!=missing", "sex!=missing", TABLE["sex"] != "?"),
        ("race!=White", "race!=White", TABLE["race"] != "White"),
        ("sex!=Male", "sex!=Male", TABLE["sex"] == "Female"),
        ("race==Asian-Pac-Islander", "race=Asian-Pac-Islander", TABLE["race"] == "Asian-Pac-Islander"),
        ("marital-status='Divorced'", "marital-status=Divorced", TABLE["marital-status"] == "Divorced"),
        ("marital==a", "marital=a", TABLE["marital"] == "a"),
        (
            "native country==Trinadad&Tobago & age>30",
            "native country=Trinadad&Tobago & age>30",
            (TABLE["native country"] == "Trinadad&Tobago") & (AGE > 30),
        ),
        (
            "sex==Female & age>65&race!='White'",
            "sex=Female & age>65 & race!=White",
            (TABLE["sex"] == "Female") & (AGE > 65) & (TABLE["race"] != "White"),
        ),
    ],
)
def test_a_comparison_selects_the_rows_that_pandas_selects(expression: str, name: str, rows: pd.Series):
    slices, _ = parse(expression)
    assert list(slices) == [name]
    assert 0 < rows.sum() < len(TABLE)
    np.testing.assert_array_equal(slices[name].mask, rows.to_numpy())


def test_a_column_alone_is_one_slice_a_level_and_missing_cells_are_one():
    slices, warnings = parse("sex", "d.time")
    assert list(slices) == ["sex=Female", "sex=Male", "sex=missing", *(f"d.time={i}" for i in range(5))]
    assert {one.column for one in slices.values()} == {"sex", "d.time"}
    assert warnings == []
    counts = TABLE["sex"].replace("?", "missing").value_counts()
    assert {name: len(slices[f"sex={name}"]) for name in counts.index} == counts.to_dict()


def test_a_number_of_many_values_is_cut_into_quartiles_named_by_their_edges():
    slices, _ = parse("age", "income-per-year")
    ages = [one for one in slices.values() if one.column == "age"]
    bins = pd.qcut(AGE, 4, labels=False)
    for number, one in enumerate(ages):
        inside = AGE[one.mask]
        assert one.name == f"age {inside.min()}..{inside.max()}"
        np.testing.assert_array_equal(one.mask, bins == number)
    incomes = [one for one in slices.values() if one.column == "income-per-year"]
    assert [len(one) for one in incomes] == [100, 100, 100, 100]
    assert all(len(one.name) < 36 for one in incomes)


def test_one_value_that_fills_a_quartile_is_a_slice_of_its_own():
    gain = np.concatenate([np.zeros(900), np.arange(1, 101)])
    slices, _ = parse("gain", table=pd.DataFrame({"gain": gain}))
    assert {name: len(one) for name, one in slices.items()} == {"gain=0": 900, "gain 1..100": 100}


@pytest.mark.parametrize("expression", ["race×sex", "race*sex", "sex × age>65", "age", "income-per-year*sex"])
def test_names_are_expressions_for_the_same_rows(expression: str):
    slices, _ = parse(expression)
    again, _ = parse(*slices)
    assert list(again) == list(slices)
    for name, one in slices.items():
        np.testing.assert_array_equal(again[name].mask, one.mask)


def test_a_crossing_has_the_counts_of_a_groupby():
    slices, warnings = parse("race×sex")
    sizes = TABLE.replace("?", "missing").groupby(["race", "sex"]).size()
    assert {name: len(one) for name, one in slices.items()} == {
        f"race={race} & sex={sex}": count
        for (race, sex), count in sizes.items()  # pyright: ignore[reportGeneralTypeIssues]
    }
    assert np.sum([one.mask for one in slices.values()], axis=0).tolist() == [1] * len(TABLE)
    assert {one.column for one in slices.values()} == {"race×sex"}
    assert warnings == []
    slices, _ = parse("sex×age>65")
    assert {name: len(one) for name, one in slices.items()} == {
        f"sex={sex} & age>65": np.sum((TABLE["sex"].replace("?", "missing") == sex) & (AGE > 65))
        for sex in ("Female", "Male", "missing")
    }


def test_combinations_without_rows_are_counted():
    table = pd.DataFrame({"a": ["x", "x", "y"], "b": ["u", "v", "u"]})
    slices, warnings = parse("a×b", table=table)
    assert list(slices) == ["a=x & b=u", "a=x & b=v", "a=y & b=u"]
    assert warnings == ["slices: 'a×b' has 1 combinations without rows, which are left out."]


def test_the_longest_known_name_wins():
    table = pd.DataFrame({"a": [1, 2, 3], "a-b": [3, 2, 1], "a>1": ["u", "v", "v"], "x*y": [0, 0, 1]})
    for expression, rows in {
        "a-b>2": [1, 0, 0],
        "a>2": [0, 0, 1],
        "a>1==u": [1, 0, 0],
        "x*y=1": [0, 0, 1],
    }.items():
        slices, warnings = parse(expression, table=table)
        assert [one.mask.tolist() for one in slices.values()] == [rows]
        assert warnings == []


def test_one_wrong_expression_does_not_hinder_the_others():
    slices, warnings = parse(
        "sxe", "age>65", "race>3", "age in 30..20", "age>old", "marital-statu==x", "&", "age>"
    )
    assert list(slices) == ["age>65"]
    for warning, words in zip(
        warnings,
        [
            "no column 'sxe'. Did you mean 'sex'? Change `slices`",
            "'race' holds text",
            "ends before it begins",
            "a number after > was expected, 'old' came",
            "no column 'marital-statu'. Did you mean 'marital-status'?",
            "a column's name was expected",
            "a value was expected after 'age>'",
        ],
        strict=True,
    ):
        assert warning.startswith("slices: ")
        assert words in warning


def test_no_right_expression_is_refused():
    with pytest.raises(UsageError, match=r"slices: 'sxe': the table has no column 'sxe'.*'sex'"):
        parse("sxe")
    with pytest.raises(UsageError, match="slices is empty"):
        parse_slices([], TABLE)
    with pytest.raises(UsageError, match="has none"):
        parse("age", table=TABLE.iloc[:0])


def test_an_expression_without_rows_is_an_empty_slice_and_one_of_all_rows_is_said():
    slices, warnings = parse("age>200", "sex==Femal", "sex×age>200", "age>0")
    assert {name: len(one) for name, one in slices.items()} == {
        "age>200": 0, "sex=Femal": 0, "sex×age>200": 0, "age>0": 400,
    }  # fmt: skip
    assert warnings == [
        "slices: 'age>200' selects no row.",
        "slices: 'sex==Femal' selects no row. sex has no value 'Femal'. Did you mean 'Female'?",
        "slices: 'sex×age>200' selects no row.",
        "slices: 'age>0' selects all 400 rows, so there is nothing to compare with.",
    ]


def test_missing_cells_fulfil_no_comparison_and_are_counted():
    table = pd.DataFrame({"age": ["20", "NA", "70", "", "40"], "sex": ["f", None, "m", "missing", "f"]})
    slices, warnings = parse("age>30", "sex!=f", "sex", table=table)
    assert slices["age>30"].mask.tolist() == [0, 0, 1, 0, 1]
    assert slices["sex!=f"].mask.tolist() == [0, 0, 1, 1, 0]
    assert slices["sex=missing"].mask.tolist() == [0, 1, 0, 0, 0]
    assert slices["sex='missing'"].mask.tolist() == [0, 0, 0, 1, 0]
    assert warnings == [
        "slices: 'age>30' leaves out 2 rows without age.",
        "slices: 'sex!=f' leaves out 1 rows without sex.",
    ]
    assert parse("sex=='missing'", table=table)[0]["sex='missing'"].mask.tolist() == [0, 0, 0, 1, 0]


def test_rare_levels_are_pooled_and_a_slice_listed_twice_counts_once():
    cities = [f"city {i:02}" for i in range(60) for _ in range(3 if i < MOST_LEVELS else 2)]
    slices, warnings = parse("city", "city==city 01", table=pd.DataFrame({"city": cities}))
    assert len(slices) == MOST_LEVELS + 1
    assert len(slices["city=other"]) == 20
    assert np.sum([one.mask for one in slices.values()], axis=0).tolist() == [1] * len(cities)
    assert "city has 60 levels: the 50 most frequent" in warnings[0]
    assert warnings[1] == "slices: 'city=city 01' is listed twice and counted once."


def test_a_crossing_of_too_many_keeps_the_largest():
    table = pd.DataFrame(
        {"a": [f"a{i % 40}" for i in range(1200)], "b": [f"b{i // 40}" for i in range(1200)]}
    )
    table = pd.concat([table, table.head(50)])
    slices, warnings = parse("a×b", table=table)
    assert len(slices) == MOST_COMBINATIONS
    assert sum(len(one) == 2 for one in slices.values()) == 50
    assert "has 1200 slices" in warnings[0]


def test_typed_columns_mean_the_same_as_text():
    random = np.random.default_rng(3)
    number = pd.Series(random.integers(0, 30, 100)).astype(float)
    number[:5] = np.nan
    typed = pd.DataFrame(
        {"n": number, "flag": random.random(100) < 0.5, "c": pd.Categorical(["u", "v"] * 50)}
    )
    text = typed.astype({"flag": str, "c": str})
    text["n"] = number.astype(object).where(number.notna(), "?").astype(str)
    for expression in ("n", "n>7", "flag", "flag==True", "c×flag", "n=missing"):
        a, b = parse(expression, table=typed)[0], parse(expression, table=text)[0]
        assert list(a) == list(b)
        for name in a:
            np.testing.assert_array_equal(a[name].mask, b[name].mask)


def test_a_short_number_stays_between_its_limits():
    random = np.random.default_rng(1)
    for _ in range(200):
        low, near, high = np.sort(random.normal(size=3) * 10.0 ** random.integers(-6, 7))
        assert low <= float(short_number(near, low, high)) <= high
    assert short_number(0.31237, 0.3, 0.4) == "0.3"
    assert short_number(37, 37, 37.5) == "37"


def test_a_column_with_another_text_in_most_rows_is_refused_and_hinders_nothing():
    table = pd.DataFrame({"note": [f"text {i}" for i in range(80)], "sex": ["f", "m"] * 40})
    slices, warnings = parse_slices(["note", "sex"], table)
    assert [one.name for one in slices] == ["sex=f", "sex=m"]
    assert any("'note' has 80 different texts in 80 rows" in one for one in warnings)

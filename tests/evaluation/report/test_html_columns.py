"""Markup that cannot be broken by its texts, numbers as people read them, and typed columns."""

import html
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from bdl_train.evaluation.report import columns
from bdl_train.evaluation.report.html import (
    Html,
    facts,
    folded,
    interval,
    number,
    picture,
    seconds,
    table_of,
    tag,
)

NASTY = "<script>alert('x')</script> & \"quotes\""


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "made",
    [
        tag("p", NASTY), tag("p", [NASTY, None]), tag("td", title=NASTY), folded(NASTY, NASTY), facts([(NASTY, NASTY)]),
        table_of(pd.DataFrame({NASTY: [NASTY], "n": [1.5]})),
    ],
)  # fmt: skip
def test_texts_stay_texts(made: Html):
    seen = Seen(made)
    assert "script" not in seen.tags
    assert NASTY in seen.text or seen.attributes["title"] == NASTY
    assert html.escape("<script>") in made


def test_markup_is_kept_and_attributes_are_named_as_in_html():
    made = tag("p", tag("b", "x"), class_="a", stroke_dasharray="1 2", hidden=True, open=False, id=None)
    assert made == '<p class="a" stroke-dasharray="1 2" hidden><b>x</b></p>'
    assert tag("img", src="data:x") == '<img src="data:x">'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"), (-0.5, "−0.5"), (12345.678, "12,346"), (1234.5678, "1235"), (1e-7, "1e−7"), (0.0, "0"),
        (-0.0, "0"), (float("nan"), "–"), (None, "–"), (float("inf"), "∞"), (float("-inf"), "−∞"), (10_000, "10,000"),
        (np.float64(2.0), "2"), (np.int64(3), "3"), (True, "yes"), (np.bool_(False), "no"), (3e12, "3e12"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_intervals_and_durations():
    assert interval(0.12345, 2) == "0.123 to 2"
    assert interval(None, 1) == interval(float("nan"), 1) == ""
    assert [seconds(x) for x in (1.234, 75, 7300)] == ["1.23 s", "1 min 15 s", "2 h 1 min"]


def test_a_long_table_says_how_much_is_shown_and_bytes_are_left_out():
    made = table_of(pd.DataFrame({"x": range(250), "pixels": [b"\x00"] * 250}))
    assert made.count("<tr>") == 201
    assert "first 200 of 250 rows" in made
    assert "pixels" not in made


def test_pictures_are_inside():
    made = picture(np.zeros((4, 4), np.uint8), NASTY)
    assert 'src="data:image/png;base64,' in made
    assert html.escape(NASTY) in made


# --- columns ------------------------------------------------------------------------------------------------------


def test_columns_have_plain_types():
    table = pd.DataFrame({"a": [2.0, None, 1.0], "b": ["y", "x", "y"], "c": [True, False, True]})
    np.testing.assert_array_equal(columns.numbers(table, "a"), [2, np.nan, 1])
    np.testing.assert_array_equal(columns.numbers(table, "c"), [1, 0, 1])
    assert columns.texts(table, "b") == ["y", "x", "y"]
    assert [(name, len(part)) for name, part in columns.parts(table, "b")] == [("y", 2), ("x", 1)]
    assert columns.numbers(columns.ordered(table, "a"), "a").tolist() == [1, 2]
    assert list(columns.only(table, ["c", "nothing", "a"]).columns) == ["c", "a"]
    assert columns.records(columns.where(table, table["b"] == "x"))[0]["c"] is False

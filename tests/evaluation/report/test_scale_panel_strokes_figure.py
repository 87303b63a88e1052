"""Axes with round ticks, marks at their places, and figures with their numbers."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from bdl_train.evaluation.report.figure import Figure, drawn
from bdl_train.evaluation.report.html import tag
from bdl_train.evaluation.report.panel import Panel, rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.report.strokes import DASHES, NUM_STYLES, SHAPES, path, rounded, shape, short

UNIT = Scale.over(edges=(0.0, 1.0))
NASTY = "<script>&\"'"


@pytest.mark.parametrize(
    "edges", [(0, 1), (-3.2, 7.9), (1e-6, 3e-6), (0, 123456), (0.985, 0.9991), (-1e-3, 1e-3)]
)
def test_ticks_are_round_and_inside(edges: tuple[float, float]):
    scale = Scale.over(edges=edges)
    values = [value for value, _ in scale.ticks]
    assert 2 <= len(values) <= 7
    assert min(values) >= edges[0] - 1e-12
    assert max(values) <= edges[1] + 1e-12
    texts = [text for _, text in scale.ticks]
    assert len(set(texts)) == len(texts)
    for value, text in scale.ticks:
        assert float(text.replace("−", "-").replace(",", "")) == pytest.approx(value, rel=1e-2, abs=1e-12)


@pytest.mark.parametrize("values", [[], [np.nan], [5.0], [5.0, 5.0], [0.0], [1e300, -1e300], [np.inf, 1.0]])
def test_any_values_give_a_scale(values: list[float]):
    scale = Scale.over(values)
    assert np.isfinite([scale.low, scale.high]).all()
    assert scale.high > scale.low
    assert len(scale.ticks) >= 1


def test_places_are_linear_or_logarithmic():
    assert Scale.over(edges=(2.0, 4.0)).at(3).item() == pytest.approx(0.5)
    scale = Scale.logarithmic(1e-3, 1.0)
    np.testing.assert_allclose(scale.at([1e-3, 1e-2, 1.0]), [0, 1 / 3, 1])
    assert scale.at([0.0]).item() < 0  # outside, not an error
    assert [text for _, text in scale.ticks] == ["0.001", "0.01", "0.1", "1"]


def test_zero_is_kept_as_the_foot_of_bars():
    assert Scale.over([2.0, 3.0], zero=True).low == 0
    assert Scale.over([-2.0, -1.0], zero=True).high == 0


def places(svg: str, class_: str) -> list[float]:
    found = ElementTree.fromstring(svg).findall(f".//*[@class='{class_}']")
    return [float(x) for x in re.findall(r"-?[\d.]+", found[0].attrib["d"])]


def test_a_point_lies_where_its_numbers_say():
    panel = Panel(UNIT, UNIT, width=120, height=140, left=20)
    wide, high = panel.inner
    panel.cloud([0.25], [0.75], 0)
    x, y, _ = places(panel.svg("k", "n", "d"), "cloud c0")
    assert x == pytest.approx(0.25 * wide, abs=0.06)
    assert y == pytest.approx(0.25 * high, abs=0.06)


def test_marks_without_finite_numbers_are_left_out():
    panel = Panel(UNIT, UNIT)
    panel.line([0, 0.5, 1], [0, np.nan, 1])
    panel.points([np.nan, 0.5], [0.5, np.nan])
    panel.error_bars([0.1], [np.nan], [1])
    panel.band([0, 1], [np.nan, 0], [1, 1])
    panel.bars([0], [1], [np.nan])
    text = panel.svg("k", "n", "d")
    assert "nan" not in text
    assert text.count("M0 ") >= 1


def test_equal_numbers_give_equal_bytes_and_texts_are_escaped():
    def draw() -> str:
        panel = Panel(UNIT, UNIT, NASTY, NASTY, NASTY)
        panel.points([0.5], [0.5], tips=[NASTY])
        panel.note(0.5, 0.5, NASTY)
        panel.cell(0, 1, 0, 1, 0.5, NASTY, NASTY)
        return panel.svg("k", NASTY, NASTY)

    assert draw() == draw()
    assert {element.tag for element in ElementTree.fromstring(draw()).iter()} <= {
        "svg", "g", "path", "rect", "text", "title", "desc",
    }  # fmt: skip


@pytest.mark.parametrize(
    "labels", [["a", "bb"], ["a", "a very long label of a row that has to stand above it"]]
)
def test_rows_have_their_labels_and_values(labels: list[str]):
    panel = rows_panel(labels, UNIT, right=["n 1", "n 2"])
    panel.points([0.5, 0.5], [0, -1])
    root = ElementTree.fromstring(panel.svg("k", "n", "d"))
    texts = ["".join(text.itertext()) for text in root.findall("./text")]
    assert "n 2" in texts
    assert any("a" in text for text in texts)
    ys = [float(one.attrib["y"]) for one in root.findall("./text[@class='row']")]
    assert 0 < ys[0] < ys[1] < panel.height


def test_styles_differ_without_colour():
    assert len(set(DASHES)) == len(set(SHAPES)) == NUM_STYLES
    assert len({shape(name, 0, 0, 3) for name in SHAPES}) == NUM_STYLES
    assert rounded(1.04) == "1"
    assert short("abcdef", 4) == "abc…"
    assert path(np.array([0, 1, 2]), np.array([0, np.nan, 2])) == "M0 0M2 2"


# --- figures ------------------------------------------------------------------------------------------------------


def figure(panels: int = 1) -> Figure:
    table = pd.DataFrame({"x": [1.25]})
    legend = [
        (mark, i, mark)
        for i, mark in enumerate(("line", "dot", "both", "ring", "bar", "band", "even", "error"))
    ]
    return Figure("Title", [Panel(UNIT, UNIT)] * panels, table, "How to read it.", legend)


def test_a_figure_holds_its_numbers_and_says_what_it_is():
    text = figure().html("key-0")
    root = ElementTree.fromstring(text)
    assert root.find(".//details//td").text == "1.25"  # pyright: ignore[reportOptionalMemberAccess]
    panel = root.find(".//svg[@role='img']")
    assert panel is not None
    ids = panel.attrib["aria-labelledby"].split()
    assert [element.text for element in panel if element.attrib.get("id") in ids] == [
        "Title",
        "How to read it.",
    ]


def test_ids_are_unique_and_narrow_figures_share_the_width():
    text = drawn([figure(), figure(), tag("p", "between"), figure(), figure(2)], "key")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(ids)) == len(ids) == 10
    assert text.count('class="pair"') == 1

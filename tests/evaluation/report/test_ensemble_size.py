"""The number of members in the report: words, figures, and what a damaged manifest makes of them."""

import re

import pytest
from report_runs import CLASS, class_rows

from bdl_train.evaluation.report.ensemble_size import ensemble_size
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import Html
from bdl_train.evaluation.report.material import read_material
from bdl_train.evaluation.report.training import curves

CURVE = [
    {
        "members": 1,
        "nll": 0.9,
        "gain": None,
        "gain_se": None,
        "disagreement": 0,
        "growth": None,
        "growth_se": None,
    },
    {
        "members": 2,
        "nll": 0.8,
        "gain": 0.1,
        "gain_se": 0.01,
        "disagreement": 0.2,
        "growth": 0.2,
        "growth_se": 0.3,
    },
    {
        "members": 3,
        "nll": 0.79,
        "gain": 0.01,
        "gain_se": 0.01,
        "disagreement": 0.25,
        "growth": 0.05,
        "growth_se": 0.01,
    },
]
LAST = {"members": [2], "gain": 0.004, "gain_se": 0.001, "disagreement": 0.003, "disagreement_se": 0.001}
CHOSEN = {
    "decision": "tolerance", "reason": "it <adds> too little", "tolerance": 0.005, "curve": CURVE,
    "waves": [{"members": [0, 1]}, LAST],
}  # fmt: skip


def blocks(make_run, chosen: object) -> list[Html | Figure]:
    return list(ensemble_size(read_material(make_run(class_rows(), CLASS, num_members=chosen), "test")))


def test_the_decision_is_told_and_its_curves_are_drawn(make_run):
    words, figure = blocks(make_run, CHOSEN)
    assert isinstance(words, str)
    assert "chose its number of members: 3 in 2 waves, then one more would have added too little" in words
    assert "it &lt;adds&gt; too little" in words
    assert isinstance(figure, Figure)
    assert figure.numbers["nll"].tolist() == [0.9, 0.8, 0.79]
    nll, disagreement, steps = figure.panels
    assert [len(panel.marks) for panel in (nll, disagreement)] == [
        1 + 1 + 3
    ] * 2  # the end of a wave, a line, points
    # Two steps of each kind and what one more would add, open; a number that is missing is no point.
    dots = [str(mark) for mark in steps.marks if "dot" in str(mark)]
    assert len(dots) == 2 * (2 + 1)
    assert sum("open" in dot for dot in dots) == 2
    assert steps.y.log
    assert (steps.y.low, steps.y.high) == pytest.approx((0.001, 1))
    assert len(re.findall(r'class="panel"', figure.html("size"))) == 3


def test_a_step_of_nothing_makes_the_scale_linear(make_run):
    curve = [*CURVE[:2], {**CURVE[2], "gain": 0.0}]
    _, figure = blocks(make_run, {**CHOSEN, "curve": curve})
    assert isinstance(figure, Figure)
    assert not figure.panels[2].y.log
    assert figure.panels[2].y.low == 0


def test_the_chapter_of_training_holds_it(make_run):
    text = curves(read_material(make_run(class_rows(), CLASS, num_members=CHOSEN), "test"))
    assert text.index("chose its number of members") < text.index("Learning curves")
    assert "Number of members" in text


@pytest.mark.parametrize(
    "chosen",
    [
        None,
        8,
        {},
        {**CHOSEN, "curve": None},
        {**CHOSEN, "curve": [3, {"nll": 1}, {"members": "two"}, {"members": 1}]},
        {**CHOSEN, "curve": [{"members": 1, "nll": "x"}, {"members": 2, "nll": [1]}]},
        {**CHOSEN, "waves": [1, {"members": 2}], "tolerance": "small"},
        {**CHOSEN, "waves": "many", "decision": 3},
        {**CHOSEN, "curve": [{**row, "gain": None, "growth": None} for row in CURVE], "waves": []},
    ],
)
def test_what_is_damaged_is_left_out(make_run, chosen):
    material = read_material(make_run(class_rows(), CLASS, num_members=chosen), "test")
    assert "Learning curves" in curves(material)
    found = list(ensemble_size(material))
    assert (found == []) == (not isinstance(chosen, dict))
    assert len(found) <= 2

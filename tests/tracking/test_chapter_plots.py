"""Pictures from tables of chapters, as the analyses themselves make them."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bdl_train.errors import UsageError
from bdl_train.evaluation.calibration import reliability
from bdl_train.evaluation.section import Section, write_section
from bdl_train.runs import RunDir
from bdl_train.tracking.chapter_plots import PLOTS, _columns, draw_plot, example_images, plots_of
from bdl_train.tracking.chapters import SECTIONS

CURVE = {"low": [0.0, 0.1], "high": [0.3, 0.4], "n": [50, 50]}
CLASSES = reliability(np.array([0.6, 0.7, 0.9, 0.95]), np.array([1.0, 0, 1, 1]), 2)
TABLES = {
    "reliability": [CLASSES],
    "pit": [pd.DataFrame({"left": [0, 0.5], "right": [0.5, 1], "density": [1.2, 0.8], **CURVE})],
    "coverage": [pd.DataFrame({"level": [0.5, 0.9], "coverage": [0.4, 0.95], **CURVE})],
    "risk_coverage": [pd.DataFrame({"coverage": [0.5, 1], "risk": [0.1, 0.2], "ideal": [0, 0.2], **CURVE})],
    "slices": [
        pd.DataFrame(
            {
                "slice": [rf"price>$\frac{i} and $x" for i in range(40)] * 2,
                "loss": ["nll"] * 40 + ["error_rate"] * 40,
                "difference": [None, *np.linspace(-1, 1, 79)],
                "low": -1.5,
                "high": 1.5,
                "significant": [True, False] * 40,
            }
        )
    ],
    "ood": [
        pd.DataFrame(
            {
                "out_set": ["mnist"] * 4,
                "score": ["energy"] * 4,
                "set": ["in", "in", "out", "out"],
                "left": [0, 1, 0, 1],
                "right": [1, 2, 1, 2],
                "density": [0.2, 0.8, 0.5, 0.5],
            }
        )
    ],
    "robustness": [
        pd.DataFrame(
            {"kind": ["fog", "fog"], "severity": [1, 0], "metric": "nll", "value": [0.5, 0.2], **CURVE}
        )
    ],
    "members": [
        pd.DataFrame({"member": [0, 3], "nll": [0.4, 0.5], "ece": [0.1, None]}),
        pd.DataFrame({"metric": ["nll"], "ensemble": [0.35]}),
    ],
}


def write(run: RunDir, key: str, tables: dict[str, pd.DataFrame]) -> None:
    write_section(run.evaluation("test") / SECTIONS, Section(key, key, "v", "note", tables))


def test_every_picture_is_tried():
    assert set(TABLES) == set(PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_is_drawn_from_its_tables(name, tmp_path):
    run, plot = RunDir(tmp_path), PLOTS[name]
    write(run, plot.chapter, dict(zip(plot.tables, TABLES[name], strict=True)))
    image = Image.open(BytesIO(draw_plot(run, "test", name)))
    image.load()
    assert image.width >= 540
    assert np.ptp(np.asarray(image.convert("L"))) > 100


def test_pictures_need_all_their_tables():
    assert plots_of({"members": ["members"], "deferral": ["curve", "policy"]}) == ["risk_coverage"]


def test_a_table_of_another_form_is_one_clear_sentence(tmp_path):
    run = RunDir(tmp_path)
    write(run, "deferral", {"curve": pd.DataFrame({"coverage": [1.0]})})
    with pytest.raises(
        UsageError, match="'risk_coverage' cannot be drawn from the tables of 'deferral': KeyError 'risk'"
    ):
        draw_plot(run, "test", "risk_coverage")
    write(run, "slices", {"gaps": TABLES["slices"][0].iloc[:0]})
    with pytest.raises(UsageError, match="'slices' cannot be drawn"):
        draw_plot(run, "test", "slices")


def drawn(name: str) -> Figure:
    figure = Figure()
    PLOTS[name].draw(figure, *(_columns(one.to_dict("records")) for one in TABLES[name]))
    return figure


def test_error_bars_are_the_intervals_of_the_table():
    (bars,) = drawn("reliability").axes[0].containers
    ends = np.array([segment[:, 1] for segment in bars[2][0].get_segments()])
    np.testing.assert_allclose(ends, CLASSES[["low", "high"]])


def test_severities_stand_in_their_order():
    (line,) = drawn("robustness").axes[0].lines
    assert list(np.asarray(line.get_ydata())) == [0.2, 0.5]


def test_of_many_slices_those_with_the_largest_gaps_are_shown_and_the_rest_is_told():
    figure = drawn("slices")
    assert len(figure.axes) == 2
    assert len(figure.axes[0].get_yticks()) == 30
    assert "30 of 40 slices" in figure.get_supxlabel()


PIXELS = np.arange(12, dtype=np.uint8)


def test_images_have_a_caption_and_the_pixels_of_the_data(tmp_path):
    run = RunDir(tmp_path)
    row = {"row": 5, "true": "cat", "predicted": "dog", "confidence": 0.98765, "pixels": PIXELS.tobytes()}
    write(
        run,
        "examples",
        {"wrong": pd.DataFrame([{**row, "shape": "3,2,2"}] * 20), "plain": pd.DataFrame([row])},
    )
    found = example_images(run, "test", "wrong")
    assert len(found) == 16
    pixels, caption = found[0]
    assert caption == "true cat, predicted dog, confidence 0.988"
    np.testing.assert_array_equal(pixels[1, 0], [2, 6, 10])  # channels last
    assert example_images(run, "test", "plain") == []


def test_images_of_a_number_say_its_interval(tmp_path):
    run = RunDir(tmp_path)
    row = {"row": 5, "y": 2.0, "mean": 1.5, "lower_95": 1.0, "upper_95": 2.25, "shape": "1,3,4"}
    write(run, "examples", {"uncertain": pd.DataFrame([{**row, "pixels": PIXELS.tobytes()}])})
    ((pixels, caption),) = example_images(run, "test", "uncertain")
    assert (pixels.shape, caption) == ((3, 4), "true 2, predicted 1.5, 95 % 1 to 2.25")


@pytest.mark.parametrize("shape", ["3,2,3", "x", "2,2,3"])
def test_pixels_that_do_not_fit_are_named(shape, tmp_path):
    run = RunDir(tmp_path)
    write(run, "examples", {"wrong": pd.DataFrame([{"row": 5, "shape": shape, "pixels": PIXELS.tobytes()}])})
    with pytest.raises(UsageError, match=r"(?i)row 5"):
        example_images(run, "test", "wrong")

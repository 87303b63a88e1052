"""Curves from event files, what is said of their end, and commands that make a run again."""

import math

import numpy as np
import pandas as pd
import pytest
from report_runs import CLASS, class_rows

from bdl_train.config import compose
from bdl_train.evaluation.report.history import end_of, read_history
from bdl_train.evaluation.report.material import read_material
from bdl_train.evaluation.report.provenance import command_of, configuration, provenance
from bdl_train.evaluation.report.training import curves
from bdl_train.events import EventWriter
from bdl_train.runs import RunDir


def test_the_last_report_of_a_step_counts_and_damage_is_left_out(tmp_path):
    run = RunDir(tmp_path)
    events = EventWriter(run.stack("000") / "events.jsonl")
    events.write("val/nll", [(0, 3.0), (1, 4.0)], step=10)
    events.write("val/nll", [(0, 1.0)], step=10)  # again, from a checkpoint
    events.write("val/nll", [(0, math.nan)], step=20)
    events.write("stopped", [(None, "on request")], step=20)
    events.close()
    with (run.stack("000") / "events.jsonl").open("a") as file:
        file.write('{"key": "val/nll"}\nnot json\n{"key": 3, "step": 1}\n')
    history = read_history(run)
    frame = history.frame("val/nll")
    assert frame.loc[10].tolist() == [1.0, 4.0]
    assert math.isnan(frame.loc[20, 0])  # pyright: ignore[reportArgumentType]
    assert [one["what"] for one in history.decisions] == ["stopped"]
    assert read_history(RunDir(tmp_path / "nothing")).frame("val/nll").empty


def test_the_end_of_a_curve_by_hand():
    # 11 points of 1 - t: the last 20 % are 3 points, over which a line falls by 0.2 of the whole fall of 1.
    falling = end_of(pd.DataFrame({0: 1 - np.linspace(0, 1, 11)}))
    assert falling is not None
    assert (falling.fall, falling.last_fall) == (pytest.approx(1), pytest.approx(0.2))
    assert falling.still_falls
    flat = end_of(pd.DataFrame({0: np.r_[np.linspace(1, 0, 5), np.zeros(20)]}))
    assert flat is not None
    assert not flat.still_falls
    rising = end_of(pd.DataFrame({0: np.linspace(0, 1, 11)}))
    assert rising is not None
    assert rising.last_fall == pytest.approx(-0.2)
    assert not rising.still_falls


def test_members_that_stopped_before_do_not_move_the_end():
    values = np.linspace(1, 0, 20)
    frame = pd.DataFrame({0: values, 1: np.where(np.arange(20) < 10, 100.0, np.nan)})
    alone = end_of(pd.DataFrame({0: values}))
    assert end_of(frame) == alone
    assert end_of(frame.iloc[:4]) is None


def test_training_is_told_in_words(make_run):
    text = curves(read_material(make_run(class_rows(), CLASS), "test"))
    assert "All 2 members were trained to the end." in text
    assert "epoch 18 (median; 18 to 19) of at most 20" in text
    assert "had stopped falling" in text  # 1/epoch: the last fifth falls by less than 2 % of the whole fall
    assert ">epoch<" in text


def test_lost_members_are_named(make_run):
    members = [{"id": 0, "status": "done"}, {"id": 1, "status": "failed", "reason": "loss <became> NaN"}]
    text = curves(read_material(make_run(class_rows(), CLASS, members=members, status="partial"), "test"))
    assert "1 of 2 members were lost." in text
    assert "loss &lt;became&gt; NaN" in text


def test_a_run_without_events_says_so(make_run):
    run = make_run(class_rows(), CLASS)
    (run.stack("000") / "events.jsonl").unlink()
    assert "kept no learning curves" in curves(read_material(run, "test"))


# --- provenance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        [
            "data=uci",
            "data.name=energy",
            "likelihood=heteroscedastic_gaussian",
            "inference=deep_ensemble",
            "seed=3",
        ],
        [
            "data=csv",
            "data.path=a b's.csv",
            "data.target=y",
            "data.drop=[x,'a, b']",
            "model.hidden=[7,8]",
            "name=1e5",
        ],
        ["experiment=fashion_mnist", "optimizer.lr=3e-4", "trainer.compile=true"],
    ],
)
def test_the_command_composes_the_same_config(words: list[str]):
    words = ['data.path="a b\'s.csv"' if word.startswith("data.path") else word for word in words]
    config = compose("train", words)
    again = command_of(config)
    assert again is not None
    assert compose("train", again) == config


def test_no_command_is_shown_for_what_it_would_not_make():
    config = compose("train")
    assert command_of({**config, "model": {"_target_": "mine.Net"}}) is None
    assert command_of({**config, "unknown": 1}) is None
    assert command_of({}) is None


def test_provenance_and_configuration_show_what_is_stored(make_run):
    material = read_material(make_run(class_rows(), CLASS), "test")
    text = provenance(material)
    assert all(
        one in text for one in ("1 min 15 s", "c" * 12, "clean", "b" * 64, "bdl report", "vmap", "2026-01-01")
    )
    shown = configuration(material)
    assert "max_epochs: 20" in shown
    assert "swag" in shown

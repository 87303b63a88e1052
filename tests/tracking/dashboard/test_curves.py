"""Curves as sums: the same numbers as from all values at once, from any blocks, damaged lines left out."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdl_train.events import EventWriter
from bdl_train.runs import RunDir
from bdl_train.tracking.dashboard.curves import Curve, curve_of_member, merged, parse


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(0, 39))
def test_merging_two_parts_is_the_sum_over_all(values, cut):
    def sums(part: list[float]) -> list[float]:
        mean = float(np.mean(part))
        return [float(len(part)), mean, float(np.sum((np.array(part) - mean) ** 2)), min(part), max(part)]

    first, second = values[: cut % len(values)], values[cut % len(values) :]
    got = merged(sums(first) if first else None, sums(second))
    np.testing.assert_allclose(got, sums(values), rtol=1e-9, atol=1e-6)


def test_points_are_mean_population_spread_and_range_of_each_step():
    random = np.random.default_rng(0)
    steps, values = random.integers(0, 5, 200), random.normal(3, 1, 200)
    curve = Curve()
    for part in np.array_split(np.arange(200), 7):
        curve.add(steps[part], values[part])
    curve.add(np.array([3]), np.array([np.nan]))
    points = curve.points(100)
    for i, step in enumerate(points["step"]):
        own = values[steps == step]
        assert points["count"][i] == len(own)
        np.testing.assert_allclose(points["mean"][i], own.mean())
        np.testing.assert_allclose(points["std"][i], own.std())
        assert (points["low"][i], points["high"][i]) == (own.min(), own.max())


def test_few_points_are_sent_of_a_long_curve_with_both_ends():
    curve = Curve()
    curve.add(np.arange(10_000), np.arange(10_000.0))
    points = curve.points(100)
    assert len(points["step"]) == 100
    assert (points["step"][0], points["step"][-1]) == (0, 9999)


LINES = [
    ("train/nll", 3, 0.25), ("val/nll", 3, None), ("train/nll", 12, -1.5e-7), ("val/stack_nll", None, 2),
    ("progress", None, {"step": 5, "num_steps": 9, "nll": 0.5}), ("member", 3, "done"), ("stopped", None, "on request"),
]  # fmt: skip


def written(tmp_path) -> bytes:
    writer = EventWriter(tmp_path / "events.jsonl")
    for key, member, value in LINES:
        writer.write(key, [(member, value)], step=7)
    writer.close()
    return (tmp_path / "events.jsonl").read_bytes()


def test_lines_are_read_as_json_reads_them(tmp_path):
    others: list[dict] = []
    found = parse(written(tmp_path), others.append)
    assert {key: [one.tolist() for one in arrays] for key, arrays in found.items() if key != "val/nll"} == {
        "train/nll": [[3, 12], [7, 7], [0.25, -1.5e-7]],
        "val/stack_nll": [[-1], [7], [2.0]],
    }
    assert np.isnan(found["val/nll"][2]).all()  # null: not finite
    assert sorted((one["key"], str(one["value"])) for one in others) == [
        ("member", "done"), ("progress", str(LINES[4][2])), ("stopped", "on request"),
    ]  # fmt: skip


DAMAGE = [b'{"time": 1.0, "mem\n', b"{}\n[]\n\n", b'{"key": "train/nll", "value": {}}\n', b"a,b,c,d,e\n"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lines_cost_themselves_only(damage, tmp_path):
    others: list[dict] = []
    good = written(tmp_path)
    found = parse(good + damage + good, others.append)
    assert found["train/nll"][2].tolist() == [0.25, -1.5e-7] * 2
    assert len(others) == 6


def test_a_block_with_bytes_that_are_no_text_breaks_nothing(tmp_path):
    others: list[dict] = []
    parse(written(tmp_path) + b"\xff\xfe,,,,\n", others.append)
    assert "progress" in [one["key"] for one in others]


def test_one_members_curve_is_its_last_value_at_each_step(tmp_path):
    run = RunDir(tmp_path)
    writer = EventWriter(run.stack("000") / "events.jsonl")
    for step, value in ((10, 1.0), (20, 2.0), (10, 1.5)):  # trained again from a checkpoint
        writer.write("train/nll", [(1, value), (11, 9.0)], step=step)
    writer.close()
    assert curve_of_member(run.stack("000") / "events.jsonl", 1, 50) == {
        "train/nll": [[10.0, 1.5], [20.0, 2.0]]
    }
    assert json.dumps(curve_of_member(run.stack("000") / "events.jsonl", 7, 50)) == "{}"

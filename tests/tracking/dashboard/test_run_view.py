"""What the page of a run is told, from hand-made files that grow."""

import json

import pytest

from bdl_train.events import EventWriter
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking.dashboard.run_view import RunView


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir(tmp_path / "energy" / "20260101-000000-abcdef")
    made.path.mkdir(parents=True)
    made.config.write_text("seed: 3\n")
    stacks = [{"id": "000", "members": [0, 1]}, {"id": "001", "members": [2, 3]}]
    write_json(made.plan, {"stacks": stacks, "reasons": ["two stacks"], "num_workers": 1})
    return made


def write(run: RunDir, stack: str, *events: tuple) -> None:
    writer = EventWriter(run.stack(stack) / "events.jsonl")
    for key, member, step, value in events:
        writer.write(key, [(member, value)], step=step)
    writer.close()


def states(view: RunView) -> list[str]:
    return [one["state"] for one in view.answer()["members"]]


STARTED = {
    "members": [0, 1],
    "executor": "vmap",
    "device": "cpu",
    "host": "h",
    "node": "n7",
    "pid": 5,
    "ranks": 1,
}


def test_members_go_from_queued_to_where_they_end(run, monkeypatch):
    monkeypatch.setattr(RunDir, "status", lambda self: "running")
    view = RunView(run)
    assert states(view) == ["queued"] * 4
    write(run, "000", ("started", None, 0, STARTED), ("train/nll", 1, 10, 0.5), ("train/nll", 1, 20, 0.25))
    answer = view.answer()
    assert states(view) == ["running", "running", "queued", "queued"]
    second = answer["members"][1]
    assert (second["where"], second["device"], second["train/nll"], second["step"]) == ("n7", "cpu", 0.25, 20)
    write(run, "000", ("stopped", None, 20, "on request"))
    assert states(view)[:2] == ["stopped", "stopped"]
    write(run, "000", ("started", None, 20, STARTED), ("member", 0, 30, "done"), ("member", 1, 30, "failed"))
    answer = view.answer()
    assert [one["state"] for one in answer["members"]] == ["done", "failed", "queued", "queued"]
    assert answer["members"][0]["retries"] == 1
    assert answer["stacks"][0]["state"] == "done"
    write_json(
        run.manifest, {"status": "partial", "members": [{"id": 1, "status": "failed", "reason": "NaN"}]}
    )
    assert view.answer()["members"][1]["reason"] == "NaN"


def test_a_run_without_a_driver_has_no_running_members(run):
    write(run, "000", ("started", None, 0, STARTED))
    assert states(RunView(run))[:2] == ["interrupted", "interrupted"]


def test_progress_speed_and_what_is_left(run, monkeypatch):
    monkeypatch.setattr(RunDir, "status", lambda self: "running")
    monkeypatch.setattr("bdl_train.events.time.time", lambda: clock[0])
    clock = [1000.0]
    write(
        run,
        "000",
        ("started", None, 0, STARTED),
        ("progress", None, 0, {"step": 0, "num_steps": 100, "active": 2}),
    )
    clock[0] += 10
    write(run, "000", ("progress", None, 50, {"step": 50, "num_steps": 100, "active": 2}))
    progress = RunView(run).answer()["progress"]
    assert progress["share"] == pytest.approx(100 / 400)
    assert progress["per_s"] == pytest.approx(10.0)  # 2 members · 50 steps in 10 s
    assert progress["left_s"] == pytest.approx(30.0)


def test_steps_that_were_trained_twice_count_once(run):
    write(run, "000", *(("val/nll", member, step, float(member)) for step in (10, 20) for member in (0, 1)))
    view = RunView(run)
    view.answer()
    # From the checkpoint of step 10 on, in the same block of the file as what is new.
    write(
        run,
        "000",
        ("val/nll", 1, 20, 1.0),
        ("val/nll", 0, 20, 0.0),
        ("val/nll", 0, 30, 4.0),
        ("val/nll", 0, 30, 4.0),
    )
    for answer in (view.answer(), RunView(run).answer()):
        curve = answer["curves"]["val/nll"]
        assert (curve["step"], curve["count"]) == ([10.0, 20.0, 30.0], [2, 2, 1])
        assert curve["mean"] == [0.5, 0.5, 4.0]


def test_a_stack_that_has_ended_adds_nothing_to_the_speed(run, monkeypatch):
    monkeypatch.setattr(RunDir, "status", lambda self: "running")
    monkeypatch.setattr("bdl_train.events.time.time", lambda: clock[0])
    clock = [1000.0]
    second = {**STARTED, "members": [2, 3]}
    for stack, start in (("000", STARTED), ("001", second)):
        write(run, stack, ("started", None, 0, start), ("progress", None, 0, {"step": 0, "num_steps": 100}))
    clock[0] += 10
    write(run, "000", ("progress", None, 100, {"step": 100, "num_steps": 100}))
    write(run, "000", ("member", 0, 100, "done"), ("member", 1, 100, "done"))
    write(run, "001", ("progress", None, 20, {"step": 20, "num_steps": 100}))
    progress = RunView(run).answer()["progress"]
    assert progress["share"] == pytest.approx(240 / 400)
    assert progress["per_s"] == pytest.approx(4.0)
    assert progress["left_s"] == pytest.approx(40.0)
    clock[0] += 40  # nothing was heard for longer than the window
    assert RunView(run).answer()["progress"]["per_s"] is None


def test_decisions_and_curves_and_plan_are_told(run):
    writer = EventWriter(run.driver_events)
    writer.write("launched", [(None, {"stack": "000"})], step=0)
    writer.write("retry", [(None, {"stack": "000", "reason": "its worker died"})], step=0)
    writer.close()
    write(run, "000", ("val/nll", 0, 10, 1.0), ("val/nll", 1, 10, 3.0), ("val/stack_nll", None, 10, 1.5))
    answer = RunView(run).answer()
    assert [(one["key"], one["reason"]) for one in answer["decisions"]] == [("retry", "its worker died")]
    assert answer["plan"] == ["two stacks"]
    curve = answer["curves"]["val/nll"]
    assert (curve["mean"], curve["std"], curve["low"], curve["high"]) == ([2.0], [1.0], [1.0], [3.0])
    assert answer["curves"]["val/stack_nll"]["mean"] == [1.5]
    assert RunView(run).member(1)["curves"] == {"val/nll": [[10.0, 3.0]]}


@pytest.mark.parametrize("damage", ["plan", "manifest", "config", "events", "metrics"])
def test_a_damaged_file_breaks_no_page(run, damage):
    write(run, "000", ("started", None, 0, STARTED), ("train/nll", 0, 10, 0.5))
    write_json(run.manifest, {"status": "complete", "members": []})
    path = {
        "plan": run.plan, "manifest": run.manifest, "config": run.config,
        "events": run.stack("000") / "events.jsonl", "metrics": run.evaluation("test") / "metrics_detail.parquet",
    }[damage]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"status": [\xff')
    answer = RunView(run).answer()
    json.dumps(answer)
    if damage == "manifest":
        assert answer["status"] == "damaged"
    if damage == "metrics":
        assert "damaged" in answer["outcome"]

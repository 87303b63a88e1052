"""`num_members=auto`: waves of members, what ends them, and that a stopped run comes to the same ensemble."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from bdl_train.distributed.ray_local import RayLocal
from bdl_train.evaluation.member_gain import curve, gain_of_one_more
from bdl_train.evaluation.member_views import MemberViews, member_views
from bdl_train.inference.deep_ensemble import DeepEnsemble
from bdl_train.posteriors.artefact import read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, find_runs, read_json
from bdl_train.training.callbacks import Checkpoint
from bdl_train.verbs._runs import load_data, read_config

AUTO = ("num_members=auto", "inference=deep_ensemble", "cluster.members_per_stack=2", "budget.wave=2")
SIX = (*AUTO, "budget.tolerance=1e-9", "budget.max_members=6")
"""Waves of 4 and of 2 members, in three stacks of 2."""


def hashes(run: RunDir) -> list[str]:
    return [member["sha256"] for member in read_json(run.manifest)["members"]]


def decisions(run: RunDir) -> list[dict[str, Any]]:
    """The waves without what clocks say."""
    waves = read_json(run.plan)["waves"]
    return [{name: value for name, value in wave.items() if "time" not in name} for wave in waves]


def reread(run: RunDir) -> MemberViews:
    """What the members of a run say of its validation part, by the artefact and the data as they are on disk."""
    artefact, data = read_artefact(run.posterior), load_data(read_config(run))
    return member_views(Predictor(artefact), data.val, data.target)


@contextmanager
def stopping_in(stack: str) -> Iterator[None]:
    """Every run is asked to stop after the first steps of this stack."""
    true_end = Checkpoint.on_train_batch_end

    def end(self, *args):
        if self._folder.name == stack:
            self._stop_files[0].touch()
        return true_end(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "on_train_batch_end", end)
        yield


def test_a_run_ends_when_one_more_member_would_add_too_little(train):
    said = train(*AUTO, "budget.tolerance=100")
    assert "with their standard errors below tolerance 100: no more are added" in said.out
    run = said.run
    manifest = read_json(run.manifest)
    assert [member["id"] for member in manifest["members"]] == [
        0,
        1,
        2,
        3,
    ]  # budget.min_members in the first wave
    chosen = manifest["num_members"]
    assert chosen["decision"] == "tolerance"
    views = reread(run)
    gain = gain_of_one_more(views)
    (wave,) = chosen["waves"]
    told = [wave[name] for name in ("gain", "gain_se", "disagreement", "disagreement_se")]
    expected = [gain.nll.value, gain.nll.se, gain.disagreement.value, gain.disagreement.se]
    np.testing.assert_allclose(told, expected, rtol=1e-4)
    expected = curve(views, seed=0)
    np.testing.assert_allclose([row["nll"] for row in chosen["curve"]], expected["nll"], rtol=1e-5)
    assert "4/4 members" in said.out


def test_waves_make_the_members_that_one_plan_makes(train, bdl):
    said = train(*SIX)
    run = said.run
    assert "4 members: one more member would lower the validation NLL by" in said.out
    assert "members 4 to 5: 1 stack with" in said.out
    plan = read_json(run.plan)
    assert [(one["id"], one["members"]) for one in plan["stacks"]] == [
        ("000", [0, 1]), ("001", [2, 3]), ("002", [4, 5]),
    ]  # fmt: skip
    assert [wave["members"] for wave in plan["waves"]] == [[0, 1, 2, 3], [4, 5]]
    assert [wave["decision"] for wave in plan["waves"]] == ["go on", "max_members"]
    at_once = train("inference=deep_ensemble", "cluster.members_per_stack=2", "num_members=6").run
    assert hashes(run) == hashes(at_once)
    assert read_json(run.metrics) == read_json(at_once.metrics)
    chosen = read_json(run.manifest)["num_members"]
    assert len(chosen["curve"]) == 6
    assert "num_members" not in read_json(at_once.manifest)
    times = sum(wave["device_time_s"] for wave in plan["waves"])
    assert chosen["spent"]["device_hours"] == pytest.approx(times / 3600)
    assert times == pytest.approx(read_json(run.manifest)["device_time_s"])
    assert "6/6 members" in bdl("runs").out
    assert "complete: nothing to resume" in bdl("train", f"resume={run.path}").out
    assert bdl("evaluate", f"run={run.path}").status == 0
    assert bdl("report", f"run={run.path}").status == 0
    assert "chose its number of members: 6 in 2 waves" in (run.evaluation("test") / "report.html").read_text()


@pytest.mark.parametrize("stack", ["001", "002"])
def test_a_stopped_run_goes_on_with_its_waves(train, bdl, stack):
    whole = train(*SIX).run
    with stopping_in(stack):
        train(*SIX, status=75)
    run = find_runs("runs")[-1]
    assert run != whole
    assert len(read_json(run.plan)["waves"]) == (1 if stack == "001" else 2)
    assert read_json(run.plan)["waves"][-1]["wall_time_s"] > 0
    assert bdl("train", f"resume={run.path}").status == 0
    assert hashes(run) == hashes(whole)
    assert decisions(run) == decisions(whole)
    assert read_json(run.metrics) == read_json(whole.metrics)
    assert read_json(run.plan)["stacks"] == read_json(whole.plan)["stacks"]


def test_a_driver_that_was_killed_before_it_wrote_a_decision_comes_to_the_same(train, bdl):
    run = train(*SIX).run
    before = decisions(run), hashes(run)
    plan = read_json(run.plan)
    plan["waves"][-1] = {**plan["waves"][-1], "decision": None, "reason": None, "gain": None, "gain_se": None}
    run.plan.write_text(json.dumps(plan))
    run.manifest.unlink()
    assert bdl("train", f"resume={run.path}").status == 0
    assert (decisions(run), hashes(run)) == before


def test_a_damaged_record_of_waves_is_refused(train, bdl):
    run = train(*SIX).run
    plan = read_json(run.plan)
    plan["waves"][0]["members"] = [0, 1, 2]
    run.plan.write_text(json.dumps(plan))
    run.manifest.unlink()
    said = bdl("train", f"resume={run.path}")
    assert said.status == 2
    assert "plan.json is damaged" in said.err


def test_a_plan_may_be_looked_at_first(train, bdl):
    train(*AUTO, "budget.tolerance=100", "plan_only=true")
    (run,) = find_runs("runs")
    assert [stack["members"] for stack in read_json(run.plan)["stacks"]] == [[0, 1], [2, 3]]
    assert bdl("train", f"resume={run.path}").status == 0
    assert read_json(run.manifest)["num_members"]["decision"] == "tolerance"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("budget.wall_time_s=1e-3",), "budget.wall_time_s=0.001 is spent"),
        (("budget.device_hours=1e-9",), "budget.device_hours=1e-09 is spent"),
        (("budget.cost=1e-3", "budget.cost_per_device_hour=1e6"), "budget.cost=0.001 is spent"),
    ],
)
def test_a_budget_ends_it_after_a_wave(train, words, reason):
    said = train(*AUTO, "budget.tolerance=1e-9", *words)
    chosen = read_json(said.run.manifest)["num_members"]
    assert chosen["decision"] == "budget"
    assert chosen["reason"].startswith(reason)
    assert "one more member would lower" in chosen["reason"]
    assert len(hashes(said.run)) == 4
    assert ("cost" in chosen["spent"]) == ("cost" in words[0])


def test_a_wave_that_loses_all_its_members_is_the_last(train):
    said = train(*AUTO, "optimizer=sgd", "optimizer.lr=1e30", status=1)
    manifest = read_json(said.run.manifest)
    assert manifest["status"] == "failed"
    assert manifest["num_members"]["decision"] == "lost"
    assert manifest["num_members"]["curve"] == []
    assert len(manifest["members"]) == 4


def test_members_that_are_lost_do_not_count(train, user_package):
    words = ("model=module", f"model._target_={user_package}.Diverging", f"allow=[{user_package}]", "seed=3")
    run = train(*AUTO, *words, "budget.tolerance=100", "budget.max_members=16", status=3).run
    manifest = read_json(run.manifest)
    usable = sum(member["status"] == "done" for member in manifest["members"])
    assert 3 <= usable < len(manifest["members"])  # fewer than three say nothing of what one more adds
    assert manifest["num_members"]["decision"] == "tolerance"
    assert len(manifest["num_members"]["curve"]) == usable


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("num_members=3", "budget.tolerance=0.1"),
            "budget.tolerance=0.1.*has no effect beside num_members=3",
        ),
        (("budget.wall_time_s=9",), "budget.wall_time_s=9.*beside num_members=8.*set num_members=auto"),
        (("num_members=auto", "data.val_fraction=0"), "data.val_fraction"),
        (("num_members=auto", "budget.cost=3"), "budget.cost_per_device_hour"),
        (("num_members=auto", "cluster=collect"), "cluster=collect"),
        (("num_members=some",), "num_members"),
    ],
)
def test_what_does_not_go_together_is_refused(bdl, words, told):
    said = bdl("train", "cluster=inline", "inference=deep_ensemble", "inference.patience=null", *words)
    assert said.status == 2
    assert re.search(told, said.err), said.err
    assert not find_runs(".")


def test_members_that_interact_cannot_be_added_later(train, monkeypatch):
    monkeypatch.setattr(DeepEnsemble, "members_interact", "they push each other")
    said = train(*AUTO, status=2)
    assert "they push each other. Set num_members to a number" in said.err


def test_an_array_of_jobs_needs_to_know_its_stacks(bdl):
    said = bdl("submit", "num_members=auto", "cluster.shape=array")
    assert said.status == 2
    assert "use cluster.shape=ray" in said.err
    assert not find_runs(".")


@pytest.mark.ci
def test_trials_of_a_sweep_may_choose_too(bdl):
    words = ("cluster=inline", "trainer.max_epochs=2", "inference=deep_ensemble", "num_members=auto")
    said = bdl("sweep", *words, "budget.tolerance=1e-9,100", "budget.max_members=6", "budget.wave=2")
    assert said.status == 0, said.out + said.err
    sizes = [len(read_json(run.manifest)["members"]) for run in find_runs("runs")]
    assert sorted(sizes) == [4, 6]


@pytest.mark.ci
@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_waves_on_ray_are_those_of_one_process(train, ray_session, monkeypatch):
    monkeypatch.setattr(RayLocal, "close", lambda self: None)  # the Ray of the test session
    here = train(*SIX).run
    there = train(*SIX, "cluster=ray_local", "cluster.num_cpus=2").run
    assert hashes(there) == hashes(here)
    assert decisions(there) == decisions(here)

"""Members that diverge and are to be tried again."""

import sys

import torch

from bdl_train.runs import read_json
from bdl_train.seeds import Stream, member_seed


def test_diverged_members_are_trained_once_more_with_other_seeds(train, bdl, user_package):
    words = ("model=module", f"model._target_={user_package}.Diverging", f"allow=[{user_package}]")
    words += ("inference=deep_ensemble", "num_members=6", "seed=1")
    marked = train(*words, status=3).run
    said = train(*words, "trainer.on_divergence=retry", status=3)
    before, after = (read_json(run.manifest)["members"] for run in (marked, said.run))
    lost = [one["id"] for one in before if one["status"] == "failed"]
    assert 1 < len(lost) < 6
    bad = {}
    for one in after:
        if one["id"] in lost:
            # Other seeds: whether the second network is a bad one is known from them alone.
            assert one["seed"] == member_seed(1, one["id"], Stream.INIT, attempt=1)
            torch.manual_seed(one["seed"])
            bad[one["id"]] = sys.modules[user_package].Diverging().bad
            assert one["stack"].endswith("r")
        else:
            assert one["sha256"] == before[one["id"]]["sha256"]
    assert {one["id"]: one["status"] == "failed" for one in after if one["id"] in lost} == bad
    assert set(bad.values()) == {True, False}
    saved = 6 - sum(bad.values())
    assert f"{saved}/6 members" in said.out
    # A second call finds the retry's result: nothing is trained a third time.
    times = {path: path.stat().st_mtime_ns for path in said.run.path.glob("stacks/*/result.json")}
    assert bdl("train", f"resume={said.run.path}", f"allow=[{user_package}]").status == 3
    assert times == {path: path.stat().st_mtime_ns for path in said.run.path.glob("stacks/*/result.json")}

"""Joining what the jobs of an array left."""

import shutil

from bdl_train.runs import read_json
from bdl_train.verbs import _stack_job

WORDS = ("num_members=3", "cluster.members_per_stack=1", "inference=deep_ensemble")


def hashes(run) -> list[str | None]:
    return [member.get("sha256") for member in read_json(run.manifest)["members"]]


def test_stacks_trained_as_jobs_of_their_own_are_the_run_of_one_process(train, bdl):
    whole = train(*WORDS).run
    said = train(*WORDS, "plan_only=true")
    path = said.out.split("resume=")[1].split()[0]
    for number in (2, 0):
        assert _stack_job.main([path, str(number)]) == 0
    # One job never ran: its member is lost until somebody trains it.
    assert bdl("train", f"resume={path}", "cluster=collect").status == 3
    run = type(whole)(whole.path.parent / path.rpartition("/")[2])
    members = read_json(run.manifest)["members"]
    assert [one["status"] for one in members] == ["done", "failed", "done"]
    assert members[1]["reason"] == "its job ended without a result"
    assert _stack_job.main([path, "1"]) == 0
    assert bdl("train", f"resume={path}", "cluster=collect").status == 0
    assert hashes(run) == hashes(whole)
    # A result whose files are gone is no result.
    shutil.rmtree(run.posterior)
    run.manifest.unlink()
    assert bdl("train", f"resume={path}", "cluster=collect").status == 1


def test_a_number_outside_the_plan_is_wrong_usage(train, capsys):
    path = train(*WORDS, "plan_only=true").out.split("resume=")[1].split()[0]
    assert _stack_job.main([path, "3"]) == 2
    assert "has the stacks 0 to 2, got 3" in capsys.readouterr().err
    assert _stack_job.main([path]) == 2

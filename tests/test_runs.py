"""The run directory: what is one, its state, and what a listing reads of it."""

from pathlib import Path

import pytest

from bdl_train.errors import UsageError
from bdl_train.files import write_bytes, write_json
from bdl_train.locks import locked
from bdl_train.runs import RunDir, find_runs, glance_at_config, is_run, read_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.create(str(tmp_path), "breast_cancer")
    made.config.write_text("seed: 0\n")
    made.plan.write_text("{}")
    return made


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "[" * 100_000, '"\udc80"'])
def test_json_that_cannot_be_read_names_its_file(text: str, tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"plan\.json cannot be read"):
        read_json(path)
    with pytest.raises(UsageError, match=r"other\.json is missing"):
        read_json(tmp_path / "other.json")


def test_a_file_of_an_unfinished_run_that_is_missing_says_how_to_finish_the_run(tmp_path: Path):
    run = RunDir(tmp_path)
    path = run.posterior / "posterior.json"
    write_json(run.plan, {})
    with pytest.raises(UsageError) as caught:
        read_json(path)
    assert str(caught.value).endswith(f"Finish it with: bdl train resume={tmp_path}")
    write_json(run.manifest, {})
    with pytest.raises(UsageError) as caught:
        read_json(path)
    assert "resume" not in str(caught.value)


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path):
    made = {RunDir.create(str(tmp_path), "x").path for _ in range(20)}
    assert len(made) == 20
    assert all(path.parent == tmp_path / "x" and path.is_dir() for path in made)


def test_an_output_dir_that_cannot_be_made_is_the_users_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="change output_dir"):
        RunDir.create(str(tmp_path / "file"), "x")


def test_what_is_no_run_is_refused(tmp_path: Path, run: RunDir):
    assert RunDir.open(run.path) == run
    with pytest.raises(UsageError, match=r"run=.*nowhere is not a directory"):
        RunDir.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"resume=.* holds no run: config\.yaml is missing"):
        RunDir.open(tmp_path / "empty", key="resume")
    with pytest.raises(UsageError, match=r"^run= is empty: `bdl runs` lists the runs\.$"):
        RunDir.open("")


def test_of_a_folder_of_runs_the_newest_is_suggested(tmp_path: Path):
    for name in ("b/20260101-120000-aaaaaa", "a/20260102-120000-bbbbbb", "c/20251231-120000-cccccc"):
        (tmp_path / name / "stacks").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    with pytest.raises(
        UsageError, match=r"run=.*a folder of runs: .* newest is .*/a/20260102-120000-bbbbbb\.$"
    ):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("status", ["complete", "partial", "failed"])
def test_status_comes_from_the_manifest_even_while_locked(status: str, run: RunDir):
    write_json(run.manifest, {"status": status})
    assert run.status() == status
    with locked(run.lock):
        assert run.status() == status


@pytest.mark.parametrize("said", ["driver.jsonl", "stacks/stack-000/events.jsonl"])
def test_without_a_manifest_the_lock_decides_then_whether_it_ever_began(said: str, run: RunDir):
    assert run.status() == "planned"
    with locked(run.lock):
        assert run.status() == "running"
    write_json(run.submission, {})
    assert run.status() == "queued"
    write_bytes(run.path / said, b"")
    assert run.status() == "interrupted"
    run.submission.unlink()
    assert run.status() == "interrupted"


def test_a_run_without_a_plan_is_not_planned(run: RunDir):
    run.plan.unlink()
    assert run.status() == "interrupted"


@pytest.mark.parametrize("content", ["{}", "[]", "3"])
def test_a_manifest_without_status_is_damaged(content: str, run: RunDir):
    run.manifest.write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json has no status"):
        run.status()


def test_runs_are_found_at_any_depth_oldest_first(tmp_path: Path):
    names = ["b/20260102-000000-aaaaaa", "a/x/20260101-000000-bbbbbb", "a/20260103-000000-cccccc"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / names[0] / "plan.json").write_text("{}")
    (tmp_path / names[1] / "stacks").mkdir()
    assert not is_run(tmp_path / names[2])
    assert [run.path for run in find_runs(tmp_path)] == [tmp_path / names[1], tmp_path / names[0]]
    assert find_runs(tmp_path / names[0]) == [RunDir(tmp_path / names[0])]
    assert find_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 3\ndata: {split: 1}\n", {"seed": 3, "data": {"split": 1}}),
        ("[" * 100_000, {}),  # libyaml's loader would overflow the stack
        ("- " * 100_000, {}),
        ("seed: [3\n", {}),
        ("- 3\n", {}),
        ("!!python/object/apply:os.getcwd []\n", {}),
    ],
)
def test_a_listing_reads_what_it_can_of_a_config(text, expected, run: RunDir):
    run.config.parent.mkdir(parents=True, exist_ok=True)
    run.config.write_text(text)
    assert glance_at_config(run) == expected
    run.config.unlink()
    assert glance_at_config(run) == {}

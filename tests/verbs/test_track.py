"""`bdl track`, and `bdl train` with a tracker: after the run, during it, and with servers that are not there."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml
from fake_wandb import wandb_server

from bdl_train.events import EventWriter
from bdl_train.files import write_json
from bdl_train.locks import locked
from bdl_train.runs import RunDir
from bdl_train.tracking._wandb_service import end_service

KEY = "0123456789abcdef" * 3
WANDB = ("tracking=wandb", "tracking.project=tests", "inference=deep_ensemble")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A wandb server, and a key for it."""
    end_service()
    with wandb_server() as one:
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
        monkeypatch.setenv("WANDB_BASE_URL", one.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield one
        end_service()


def files_that_hold(folder, text):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_training_is_followed_live_and_ends_with_metrics_tables_and_plots(train, server, tmp_path):
    said = train(*WANDB)
    name = said.run.path.name
    rows, summary = server.rows[name], server.summaries[name]
    assert {f"member/0{m}/val/nll" for m in (0, 1)} <= {key for row in rows for key in row}
    assert summary["status"] == "complete"
    assert 0 < summary["test/nll"] < 1
    assert summary["table/metrics"]["ncols"] == 8  # with the edges of the intervals
    assert summary["table/members"]["nrows"] == 2
    assert summary["plot/reliability"]["_type"] == "image-file"
    assert server.url in said.err  # where to look
    # The key is nowhere: not in the config, the events, the log, nor in what wandb itself keeps here.
    assert KEY not in said.out + said.err
    assert files_that_hold(tmp_path, KEY) == []


@pytest.mark.parametrize("behaviour", ["fails", "hangs"])
def test_a_training_survives_a_server_that_is_down(behaviour, train, server):
    server.behaviour = behaviour
    said = train(*WANDB, "tracking.init_timeout_s=1", "tracking.finish_timeout_s=1")
    assert [line[:20] for line in said.err.splitlines() if "wandb" in line] == ["wandb writes offline"]
    assert len(list((said.run.path / "wandb").glob("offline-run-*"))) == 1


def test_a_run_without_a_tracker_is_tracked_afterwards_and_only_once(bdl, train, server):
    run = train("tracking=none", "inference=deep_ensemble").run
    name = run.path.name
    said = bdl("track", f"run={run.path}", "tracking.project=tests", "tracking.mode=online")
    assert said.status == 0, said.err
    assert f"tracked: {run.path} (complete)" in said.out
    first = [
        (row["step"], row["member/01/val/nll"]) for row in server.rows[name] if "member/01/val/nll" in row
    ]
    assert len(first) == 4
    assert len(server.curve(name, "ensemble/val/nll/mean")) == 4
    assert server.summaries[name]["table/members"]["nrows"] == 2
    assert bdl("track", f"run={run.path}", "tracking.project=tests").status == 0
    assert server.curve(name, "member/01/val/nll") == first
    assert len(server.curve(name, "ensemble/val/nll/mean")) == 4
    # Deleted at the server: once more from the start.
    del server.rows[name]
    assert bdl("track", f"run={run.path}", "tracking.project=tests", "again=true").status == 0
    assert server.curve(name, "member/01/val/nll") == first


def test_a_resumed_training_goes_on_in_its_wandb_run(bdl, train, server):
    said = train(*WANDB, "plan_only=true")
    run = RunDir(Path(said.out.rpartition("resume=")[2].strip()))
    assert bdl("train", f"resume={run.path}").status == 0
    assert list(server.rows) == [run.path.name]
    assert len(server.curve(run.path.name, "member/00/val/nll")) == 4


@pytest.fixture
def bare_run(class_run, tmp_path) -> RunDir:
    """A run that goes on: a config and a plan, no manifest."""
    folder = tmp_path / "runs" / "x" / "20260101-120000-a1b2c3"
    folder.mkdir(parents=True)
    config = yaml.safe_load(class_run.config.read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(class_run.plan, folder / "plan.json")
    return RunDir(folder)


def test_a_running_run_is_followed_until_it_ends(bdl, bare_run, server):
    def work():
        writer = EventWriter(bare_run.stack("000") / "events.jsonl")
        for step in range(4):
            writer.write("train/nll", [(0, 1.0), (1, 2.0)], step=step)
            writer.flush()
            time.sleep(0.2)
        writer.close()
        write_json(bare_run.manifest, {"status": "failed", "members": [], "hashes": {}})
        end.set()

    end = threading.Event()

    def train():
        with locked(bare_run.lock):
            begun.set()
            work()

    begun = threading.Event()
    thread = threading.Thread(target=train)
    thread.start()
    begun.wait(10)
    said = bdl("track", f"run={bare_run.path}", "tracking.project=tests", "follow=true")
    thread.join()
    assert said.status == 0, said.err
    assert "(failed)" in said.out
    name = bare_run.path.name
    assert [step for step, _ in server.curve(name, "member/01/train/nll")] == [0, 1, 2, 3]
    assert server.summaries[name]["status"] == "failed"


def test_a_run_that_tracks_itself_is_left_to_it(bdl, bare_run):
    config = yaml.safe_load(bare_run.config.read_text())
    config["tracking"] = {"_target_": "bdl_train.tracking.wandb.Wandb"}
    bare_run.config.write_text(yaml.safe_dump(config))
    with locked(bare_run.lock):
        said = bdl("track", f"run={bare_run.path}")
    assert said.status == 2
    assert "is running and tracks itself with Wandb" in said.err


def test_what_cannot_be_tracked_is_refused(bdl, train, class_run, server, monkeypatch):
    assert bdl("track").status == 2
    assert "is not a directory" in bdl("track", "run=nowhere").err
    said = bdl("train", "num_members=51", "tracking=wandb", "tracking.member_runs=true", "cluster=inline")
    assert said.status == 2
    assert "tracking.member_runs=true makes a wandb run a member, 51 here" in said.err
    monkeypatch.delenv("WANDB_API_KEY")
    end_service()
    said = bdl("track", f"run={class_run.path}", "tracking.mode=online")
    assert said.status == 2
    assert "tracking.mode=online, but no key" in said.err


def test_a_tracker_that_fails_is_a_failed_track(bdl, bare_run, server):
    server.behaviour = "hangs"
    (bare_run.path / "wandb").write_text("no folder")
    said = bdl("track", f"run={bare_run.path}", "tracking.init_timeout_s=1")
    assert said.status == 1
    assert "Wandb failed" in said.err

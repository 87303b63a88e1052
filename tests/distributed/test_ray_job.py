"""Ray Jobs: a stand-in that answers badly, and a real cluster with a dashboard."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bdl_train.distributed.ray_job import state_of
from bdl_train.runs import find_runs, read_json

WORDS = ("num_members=2", "cluster.members_per_stack=1", "trainer.max_epochs=4")


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Invalid authentication token")

    def log_message(self, format, *args): ...


@pytest.fixture
def refusing() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_wrong_token_and_a_wrong_address_are_wrong_usage(refusing, bdl, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "my-secret")
    said = bdl("submit", "cluster=ray_job", f"cluster.address={refusing}", *WORDS)
    assert said.status == 2
    assert "refuses the token (Invalid authentication token)" in said.err
    said = bdl("submit", "cluster=ray_job", "cluster.address=http://127.0.0.1:1", *WORDS)
    assert said.status == 2
    assert "No dashboard of Ray answers at cluster.address=http://127.0.0.1:1 within 10 s" in said.err
    said = bdl("submit", "cluster=ray_job", "cluster.address=127.0.0.1:6379", *WORDS)
    assert "must be that of the dashboard" in said.err
    assert "my-secret" not in said.err
    assert not Path("runs").exists()


def test_a_dashboard_that_does_not_answer_tells_no_state():
    assert state_of({"ids": ["x"], "address": "http://127.0.0.1:1"}) == "unknown"
    assert state_of({"ids": ["x"], "address": "file:///etc/passwd"}) == "unknown"
    assert state_of({}) == "unknown"


@pytest.fixture
def cluster(monkeypatch) -> Iterator[str]:
    """A Ray with a dashboard, of its own folder, ports and token."""
    token = secrets.token_hex(32)
    folder = tempfile.mkdtemp(prefix="bdl-job-", dir="/tmp")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        gcs, dashboard = one.getsockname()[1], two.getsockname()[1]
    words = ["start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    words += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", "--node-ip-address=127.0.0.1"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    with Path(folder, "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words, f"--temp-dir={folder}/r"],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    address = f"http://127.0.0.1:{dashboard}"
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    end = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end, Path(folder, "log").read_text()
            time.sleep(0.3)
    yield address
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    os.killpg(process.pid, signal.SIGKILL) if _group_lives(process.pid) else None
    shutil.rmtree(folder, ignore_errors=True)


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.ci
@pytest.mark.ray
def test_a_job_of_a_real_cluster_gives_the_members_of_one_process(cluster, bdl, train):
    words = ("cluster=ray_job", f"cluster.address={cluster}", "cluster.cpus_per_stack=1", *WORDS)
    words += ("cluster.timeout_s=90",)  # on a busy machine the dashboard learns late what its nodes have
    said = bdl("submit", *words, "follow=true")
    assert said.status == 0, said.out + said.err
    (run,) = find_runs("runs")
    assert "[complete]" in said.out
    assert run.status() == "complete"
    # Whoever wrote a run directory is not sent the token.
    assert state_of(read_json(run.submission)) == "unknown"
    token = os.environ["RAY_AUTH_TOKEN"]
    assert not any(token in path.read_text(errors="ignore") for path in run.path.rglob("*") if path.is_file())
    lines = [json.loads(line) for line in run.driver_events.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["launched", "launched"]
    theirs = train(*WORDS).run
    assert [one["sha256"] for one in read_json(run.manifest)["members"]] == [
        one["sha256"] for one in read_json(theirs.manifest)["members"]
    ]
    assert bdl("submit", *words, f"resume={run.path}").status == 2

"""`bdl dashboard` as a process."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request


def test_it_serves_until_ctrl_c(class_run, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "bdl_train", "dashboard", f"root={class_run.path.parent}", "port=0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    url = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert url, line
    with urllib.request.urlopen(url.group() + "api/runs", timeout=30) as answer:
        assert class_run.path.name in answer.read().decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    process.stdout.close()


def test_a_missing_folder_and_a_taken_port_are_wrong_usage(bdl, tmp_path):
    said = bdl("dashboard", "root=nowhere")
    assert said.status == 2
    assert "root=nowhere is no folder" in said.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = bdl("dashboard", f"root={tmp_path}", f"port={taken.getsockname()[1]}")
    assert said.status == 2
    assert "choose another port" in said.err

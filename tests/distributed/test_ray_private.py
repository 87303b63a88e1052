"""The Ray that a run starts is of this user and this machine only."""

import json
import os
import subprocess
import sys

START = """
import json, os, stat
from pathlib import Path
from bdl_train.distributed import Resources, ray_local

def descendants(pid):
    children = Path(f"/proc/{pid}/task").glob("*/children")
    for child in [int(one) for path in children for one in path.read_text().split()]:
        yield child
        yield from descendants(child)

def listening():
    inodes = set()
    for pid in [os.getpid(), *descendants(os.getpid())]:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(fd))
            except OSError:  # closed meanwhile
                continue
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                yield words[1]

ray = ray_local.start(Resources(1, 0))
folder = ray_local._session.folder
told = {
    "task": ray.get(ray.remote(lambda: 6 * 7).remote()),
    "nodes": [node["NodeManagerAddress"] for node in ray.nodes()],
    "listening": sorted(listening()),
    "mode": stat.S_IMODE(os.stat(folder).st_mode),
    "length": len(os.path.join(folder, "r")),
    "folder": folder,
}
ray_local.stop()
print(json.dumps(told))
"""
LOOPBACK = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")


def test_ray_listens_on_loopback_in_a_folder_of_this_user_and_leaves_nothing():
    # In a process of its own: Ray reads its settings when it is imported.
    made = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout.splitlines()[-1])
    assert told["task"] == 42
    assert told["nodes"] == ["127.0.0.1"]
    assert told["mode"] == 0o700
    assert told["length"] < 45
    assert len(told["listening"]) > 0
    assert [one for one in told["listening"] if not one.startswith(LOOPBACK)] == []
    assert not os.path.exists(told["folder"])

"""A disk that is really full: a file system of its own, of a few pages or a few megabytes."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bdl_train.runs import RunDir, find_runs, read_json

pytestmark = pytest.mark.ci

MEMBERS = ("model.hidden=[300]", "num_members=8", "trainer.max_epochs=20", "trainer.checkpoint_every_s=0")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of this size, or gives the mounted one another."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")

    def sized(size: str) -> Path:
        options = f"remount,size={size}" if os.path.ismount(folder) else f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def hashes(run: RunDir) -> list[str]:
    return [member["sha256"] for member in read_json(run.manifest)["members"]]


@pytest.mark.parametrize("size", ["1m", "2m"])
def test_a_full_disk_fails_cleanly_and_with_room_the_run_is_finished(size, disk, bdl, train):
    folder = disk(size)
    said = train(*MEMBERS, f"output_dir={folder}/runs", status=1)
    assert "No space left on device" in said.out + said.err
    assert "Traceback" not in said.err
    (run,) = find_runs(folder)
    # What is there is whole.
    for path in run.path.rglob("*.json"):
        read_json(path)
    disk("100m")
    assert bdl("train", f"resume={run.path}").status == 0
    assert hashes(run) == hashes(train(*MEMBERS).run)


@pytest.mark.parametrize("size", ["8k", "16k", "24k"])
def test_a_disk_without_room_for_the_run_itself_is_said_in_one_line(size, disk, bdl):
    folder = disk(size)
    said = bdl(
        "train", "cluster=inline", "num_members=2", "trainer.max_epochs=4", f"output_dir={folder}/runs"
    )
    assert said.status == 1
    assert "Traceback" not in said.err
    assert "is full (No space left on device)" in said.err
    assert "bdl train resume=" in said.err

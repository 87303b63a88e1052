"""The command in this process, in a folder of its own; fixtures for the conftest files of several folders."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from bdl_train.cli import main
from bdl_train.distributed.ray_local import RayLocal
from bdl_train.runs import RunDir, find_runs

TINY = ("cluster=inline", "cluster.cpus_per_stack=1", "num_members=2", "trainer.max_epochs=4")
"""Settings of a training of about half a second; words given after them win."""
ON_RAY = ("cluster=ray_local", "cluster.num_cpus=2", "cluster.cpus_per_stack=1")


@dataclasses.dataclass(frozen=True)
class Said:
    """What a call of the command came to."""

    status: int
    out: str
    err: str

    @property
    def run(self) -> RunDir:
        """The run directory that it printed last."""
        lines = [line for line in self.out.splitlines() if line.startswith("run: ")]
        return RunDir(Path(lines[-1].removeprefix("run: ")))


@pytest.fixture
def bdl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., Said]:
    """`bdl <words>` in this process, with `tmp_path` as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> Said:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return call


@pytest.fixture
def train(bdl) -> Callable[..., Said]:
    """`bdl train` with tiny settings; fails the test on another exit status than the one expected."""

    def call(*words: str, status: int = 0) -> Said:
        said = bdl("train", *TINY, *words)
        assert said.status == status, said.out + said.err
        return said

    return call


def train_once(folder: Path, *words: str) -> RunDir:
    """A run for tests that only read it."""
    status = main(["train", *TINY, f"output_dir={folder}", *words])
    assert status == 0
    return find_runs(folder)[-1]


@pytest.fixture
def on_ray(ray_session, bdl, monkeypatch):
    """`bdl train` on the Ray of the test session, which the command does not end."""
    monkeypatch.setattr(RayLocal, "close", lambda self: None)

    def call(*words: str, status: int = 0):
        said = bdl("train", "num_members=4", "trainer.max_epochs=4", *ON_RAY, *words)
        assert said.status == status, said.out + said.err
        return said

    return call

"""wandb as a user with a key has it, talking to a server of this test; and run directories with events."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from fake_wandb import Server, wandb_server

from bdl_train.build import build
from bdl_train.events import EventWriter
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker
from bdl_train.tracking._wandb_service import end_service

KEY = "0123456789abcdef" * 3


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no netrc file, and none of what wandb remembers from other tests."""
    end_service()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    yield
    end_service()


@pytest.fixture
def server(no_key: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that works, until the test says otherwise, and a key for it."""
    with wandb_server() as one:
        monkeypatch.setenv("WANDB_BASE_URL", one.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield one
        end_service()


@pytest.fixture
def tracker() -> Callable[..., Tracker]:
    def make(**changed: Any) -> Tracker:
        node = {
            "_target_": "bdl_train.tracking.wandb.Wandb",
            "mode": "auto",
            "project": "tests",
            "entity": None,
            "member_runs": False,
            "init_timeout_s": 10.0,
            "finish_timeout_s": 10.0,
        }
        return build({**node, **changed}, Tracker, key="tracking")

    return make


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two stacks of two members."""
    one = RunDir(tmp_path / "energy" / "20260101-120000-a1b2c3")
    one.path.mkdir(parents=True)
    stacks = [{"id": "000", "members": [0, 1]}, {"id": "001", "members": [2, 3]}]
    write_json(one.plan, {"stacks": stacks})
    return one


def write(run: RunDir, stack: str, *events: tuple[str, int | None, int, Any]) -> None:
    """Append (key, member, step, value) to a stack's file."""
    writer = EventWriter(run.stack(stack) / "events.jsonl")
    for key, member, step, value in events:
        writer.write(key, [(member, value)], step=step)
    writer.close()


class FakeRun:
    """A wandb run that keeps what it is told."""

    url, dir = "http://wandb", "/wandb/run/files"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.finished: int | None = None

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeRun, list[dict[str, Any]]]:
    """A run in place of every one that wandb would start, and the words it was started with."""
    run, calls = FakeRun(), []

    def init(**kwargs: Any) -> FakeRun:
        calls.append(kwargs)
        return run

    monkeypatch.setattr(wandb, "init", init)
    return run, calls

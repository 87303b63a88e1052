"""Finished runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from command_line import train_once

from bdl_train.runs import RunDir
from bdl_train.tracking.dashboard.server import Dashboard


@pytest.fixture(scope="session")
def runs_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dashboard_runs")


@pytest.fixture(scope="session")
def class_run(runs_root) -> RunDir:
    return train_once(runs_root, "inference.num_draws=3")


@pytest.fixture(scope="session")
def number_run(runs_root, class_run) -> RunDir:
    train_once(runs_root, "data=sklearn", "data.name=diabetes", "likelihood=gaussian")
    return next(RunDir(path.parent) for path in runs_root.glob("diabetes/*/manifest.json"))


@pytest.fixture
def serve():
    """Serve a folder for the time of a test."""

    @contextmanager
    def serving(root: Path, *, token: str | None = None) -> Iterator[Dashboard]:
        server = Dashboard(root, "127.0.0.1", 0, token)
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()

    return serving

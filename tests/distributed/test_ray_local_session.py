"""Starting and ending Ray, with a stand-in for Ray."""

import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from bdl_train.distributed import Resources, ray_local
from bdl_train.errors import RunFailedError, UsageError


class FakeRay(SimpleNamespace):
    """Remembers how it was started, and takes SIGTERM for itself as Ray does."""

    def __init__(self):
        super().__init__(started=[], ended=0, running=False, failure=None)

    def is_initialized(self):
        return self.running

    def init(self, **settings):
        if self.failure is not None:
            raise self.failure
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.started.append(settings)
        self.running = True

    def cluster_resources(self):
        settings = self.started[-1]
        return {"CPU": float(settings["num_cpus"]), "GPU": float(settings["num_gpus"])}

    def shutdown(self):
        self.ended += 1
        self.running = False


@pytest.fixture
def ray(monkeypatch) -> Iterator[FakeRay]:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(ray_local, "_session", None)
    yield fake
    ray_local.stop()


def test_one_ray_serves_until_other_resources_are_asked_for(ray):
    ray_local.start(Resources(2, 0))
    ray_local.start(Resources(2, 0))
    assert (len(ray.started), ray.ended) == (1, 0)
    ray_local.start(Resources(4, 1))
    assert (len(ray.started), ray.ended) == (2, 1)
    assert (ray.started[1]["num_cpus"], ray.started[1]["num_gpus"]) == (4, 1)
    ray_local.stop()
    ray_local.stop()
    assert ray.ended == 2


def test_sigterm_stays_with_the_driver(ray):
    def handler(signum, frame): ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        ray_local.start(Resources(2, 0))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_its_folder_goes_with_it(ray):
    ray_local.start(Resources(2, 0))
    folder = os.path.dirname(ray.started[0]["_temp_dir"])
    assert os.path.isdir(folder)
    ray_local.stop()
    assert not os.path.exists(folder)


def test_a_ray_of_others_is_used_and_not_ended(ray):
    ray.init(num_cpus=3, num_gpus=0)
    ray_local.start(Resources(3, 0))
    with pytest.raises(UsageError, match=r"4 CPUs .* has 3 "):
        ray_local.start(Resources(4, 0))
    ray_local.stop()
    assert (len(ray.started), ray.ended) == (1, 0)


def test_a_ray_that_does_not_start_is_a_failed_run_with_a_way_on(ray, monkeypatch):
    folders = []
    true_mkdtemp = ray_local.tempfile.mkdtemp
    monkeypatch.setattr(
        ray_local.tempfile, "mkdtemp", lambda **given: folders.append(true_mkdtemp(**given)) or folders[-1]
    )
    ray.failure = OSError("no free port")
    with pytest.raises(RunFailedError, match=r"OSError: no free port.*cluster=inline"):
        ray_local.start(Resources(2, 0))
    assert not os.path.exists(folders[0])


def test_an_address_left_in_the_environment_is_ignored_aloud(ray, monkeypatch, caplog):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray_local.start(Resources(2, 0))
    assert "RAY_ADDRESS=10.0.0.1:6379 is ignored" in caplog.text
    assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_AUTH_MODE"] == "token"

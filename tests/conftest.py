"""Fixtures and rules for all tests: one thread, no network, nothing of the user's environment."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before torch, matplotlib, wandb or Ray are imported, and inherited by worker processes.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg", WANDB_MODE="offline")
for name in ("BDL_ALLOW", "BDL_LOG", "RAY_ADDRESS"):
    os.environ.pop(name, None)

# On a busy machine time says nothing; the same examples in every run keep a red test red.
settings.register_profile(
    "bdl", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bdl")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks that follow from the fixtures a test asks for; all tests with Ray share one worker of xdist."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "data_root" in fixtures:
            item.add_marker("shared_data")
        if "ray_session" in fixtures:
            item.add_marker("ray")
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("shared_data") and not os.environ.get("BDL_DATA_ROOT"):
        pytest.skip("needs the shared data sets: BDL_DATA_ROOT is not set")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    # A stack trained in this process may have set another number.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> str:
    """The folder of shared data sets."""
    return os.environ["BDL_DATA_ROOT"]


@pytest.fixture(scope="session")
def _ray_ends() -> Iterator[None]:
    yield
    from bdl_train.distributed.ray_local import stop

    stop()


@pytest.fixture
def ray_session(_ray_ends: None) -> Any:
    """A private Ray of 2 CPUs, the module: started by the first test that asks, and again if a test ended it."""
    from bdl_train.distributed import Resources
    from bdl_train.distributed.ray_local import start

    return start(Resources(cpus=2, gpus=0))

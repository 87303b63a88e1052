"""Fixtures for all tests."""

import os

import pytest


@pytest.fixture(scope="session")
def data_root() -> str:
    """The folder of shared data sets; tests that use it are marked `shared_data`."""
    root = os.environ.get("BDL_DATA_ROOT")
    if not root:
        pytest.skip("BDL_DATA_ROOT is not set")
    return root

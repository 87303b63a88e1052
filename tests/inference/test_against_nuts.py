"""Predictives of a small network against those of NUTS, sampled by numpyro: an implementation of its own."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def load(path: str) -> Any:
    """A script as a module; what lies beside it can be imported, as when it is run."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "scripts" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / Path(path).parent)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> Any:
    return load("bench/bench_fidelity.py")


def test_the_reference_is_of_these_rows_and_has_converged(bench: Any):
    x, y = load("reference/nuts_small_network.py").make_rows()
    with np.load(bench.REFERENCE) as stored:
        np.testing.assert_array_equal(stored["x"], x)
        np.testing.assert_array_equal(stored["y"], y)
        assert stored["rhat"] < 1.005
        assert stored["ess"] > 10_000
        mass = stored["density"].sum(1) * (stored["grid"][1] - stored["grid"][0])
    np.testing.assert_allclose(mass, 1, atol=0.02)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "changed", "most"),
    [
        ("hmc", {"num_warmup": 200, "num_draws": 40, "thin": 2, "num_leapfrog": 30}, 0.06),
        ("mclmc", {"num_warmup": 2000, "num_draws": 60, "thin": 25}, 0.08),
    ],
)
def test_full_batch_chains_have_the_predictive_of_nuts(
    bench: Any, name: str, changed: dict[str, Any], most: float
):
    found = bench.distances(name, 12, **changed)
    assert found["total_variation"] < most
    assert found["std_ratio"] == pytest.approx(1, abs=0.2)


@pytest.mark.ci
def test_modes_alone_are_farther_from_nuts_than_chains_are(bench: Any):
    """What the distance can tell: an ensemble of modes is too sure between the data and beyond them."""
    found = bench.distances("deep_ensemble", 12)
    assert found["total_variation"] > 0.08
    assert found["std_ratio"] < 0.7

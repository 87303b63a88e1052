"""How near each method comes to the true posterior of a small network, which numpyro's NUTS has sampled.

    python scripts/bench/bench_fidelity.py [--methods ...]     # keeps a row a method in docs/results/fidelity.csv

The reference is `tests/inference/reference/nuts_small_network.npz` (see `scripts/reference/nuts_small_network.py`): one
hidden layer of 10 tanh units, 100 rows with a gap. For each method: total variation and Wasserstein-1 distance between
its predictive density and the reference's, mean over 25 inputs from outside to outside of the data, and the ratio of
the two standard deviations of the network's output in the gap and outside.
"""

import argparse
import csv
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _stacks import config_of
from torch import Tensor

from bdl_train.data import Data, Part
from bdl_train.inference import Method
from bdl_train.specs import InputSpec, TargetKind, TargetSpec
from bdl_train.training.prepared import Prepared, StackTask
from bdl_train.training.ranks import ALONE

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "inference" / "reference" / "nuts_small_network.npz"
ROWS = ROOT / "docs" / "results" / "fidelity.csv"
FIELDS = ("method", "members", "draws", "total_variation", "wasserstein", "std_ratio", "seconds")
MEMBERS = 20
CASES: dict[str, dict[str, Any]] = {
    "deep_ensemble": {"patience": None},
    "anchored": {"patience": None},
    "snapshot": {},
    "swag": {},
    "laplace": {"patience": None, "structure": "kfac"},
    "mean_field_vi": {"num_draws": 100},
    "ivon": {"num_draws": 100},
    "mc_dropout": {"patience": None},
    "svgd": {},
    "repulsive_ensemble": {},
    "sgld": {"burn_in_epochs": 200, "num_draws": 100},
    "sghmc": {"burn_in_epochs": 200, "num_draws": 100},
    "cyclical_sgmcmc": {"num_draws": 60},
    "mclmc": {"patience": None, "num_draws": 200, "energy_variance_end": 0.001, "thin": 25},
    "hmc": {"patience": None, "num_draws": 200},
}
"""What differs from the shipped settings: no validation part, so no early stopping; more draws."""


def small_network(name: str, **changed: Any) -> dict[str, Any]:
    """A resolved config of it."""
    dropout = 0.05 if name == "mc_dropout" else 0.0
    return config_of(
        batch_size=25,
        seed=1,
        model=("mlp", {"hidden": [10], "activation": "tanh", "dropout": dropout}),
        likelihood=("gaussian", {"noise_std": 0.3, "log_noise_prior_std": 1.0}),
        inference=(name, CASES[name] | changed),
        trainer=("default", {"max_epochs": 1000, "compile": False, "precision": "64-true"}),
    )


def data_of(reference: dict[str, np.ndarray]) -> Data:
    x, y = reference["x"][:, None].astype(np.float32), reference["y"].astype(np.float32)
    part, empty = Part(x, y, np.arange(len(y))), Part(x[:0], y[:0], np.arange(0))
    spec, target = InputSpec((1,), (1,)), TargetSpec(TargetKind.CONTINUOUS)
    return Data(name="small", train=part, val=empty, test=empty, inputs=spec, target=target)


def draws_of(config: dict[str, Any], data: Data, num_members: int, at: np.ndarray) -> tuple[Tensor, Tensor]:
    """Output and noise of every draw of every member at inputs `at` `[A]`: `[M · K, A]` each."""
    stack = Prepared.of(StackTask("000", tuple(range(num_members)), 1, 0), config, data, ALONE)
    stack.fit([])
    method, potential, layout = stack.recipe.method, stack.problem.potential, stack.state.stack.layout
    assert isinstance(method, Method)
    assert not bool(stack.state.failed.any())
    x = torch.from_numpy(at)[:, None]
    outputs, noises = [], []
    for seed, posterior in enumerate(method.posterior(stack.state)):
        for flat, buffers in posterior.draw(posterior.num_atoms or method.num_draws, seed):
            params = layout.unflatten(flat[None])
            of_one = {name: buffer[None] for name, buffer in buffers.items()}

            def run(params: dict[str, Tensor], of_one: dict[str, Tensor] = of_one) -> Tensor:
                return potential.network(params, of_one, x, train=False, shared=True)[0]

            out = run(params)
            if posterior.centre is not None:  # a linearised draw
                centre = layout.unflatten(posterior.centre[None])
                out = torch.func.jvp(
                    run, (centre,), ({name: params[name] - centre[name] for name in params},)
                )
                out = out[0] + out[1]
            components = potential.likelihood.distribution(out, params)
            outputs.append(components.mean[0])
            noises.append(components.stddev[0])
    return torch.stack(outputs).detach(), torch.stack(noises).detach()


def distances(name: str, num_members: int = MEMBERS, **changed: Any) -> dict[str, float]:
    """Train a method and compare its predictive with the reference."""
    with np.load(REFERENCE) as stored:
        reference = {key: stored[key] for key in stored.files}
    start = time.perf_counter()
    config = small_network(name, **changed)
    f, noise = draws_of(config, data_of(reference), num_members, reference["at"])
    grid, wanted = torch.from_numpy(reference["grid"]), torch.from_numpy(reference["density"]).double()
    found = torch.zeros_like(wanted)
    for some, its in zip(f.split(256), noise.split(256), strict=True):
        found += torch.distributions.Normal(some[..., None], its[..., None]).log_prob(grid).exp().sum(0)
    found /= len(f)
    step = float(grid[1] - grid[0])
    gap = (found - wanted).cumsum(1) * step
    std = f.std(0, correction=0)
    return {
        "members": num_members,
        "draws": len(f) // num_members,
        "total_variation": float(0.5 * (found - wanted).abs().sum(1).mean()) * step,
        "wasserstein": float(gap.abs().sum(1).mean()) * step,
        "std_ratio": float((std / torch.from_numpy(reference["std"])).mean()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(CASES), choices=list(CASES))
    methods = parser.parse_args().methods
    logging.getLogger("bdl_train").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    known: dict[str, dict[str, Any]] = {}
    if ROWS.is_file():
        with ROWS.open(newline="") as file:
            known = {row["method"]: row for row in csv.DictReader(file)}
    for name in methods:
        known[name] = {"method": name, **distances(name)}
        print(known[name], file=sys.stderr, flush=True)
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        with ROWS.open("w", newline="") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(known.values(), key=lambda row: float(row["total_variation"])))


if __name__ == "__main__":
    main()

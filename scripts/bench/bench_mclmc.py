"""Speed of full-batch MCLMC, as a ratio within one run: member-gradients a second, one core, float32.

1,022 rows of 5 inputs, 10 members of 4 x 16 ReLU units, heteroscedastic Gaussian, as `bdl train` runs it (Lightning,
events, validation, kept draws; the difference of a long and a short chain, so that compiling and the start are left
out), against
  bare   the compiled gradient of the same log joint alone, written by hand for the whole stack, one call after another

    python scripts/bench/bench_mclmc.py [--quick]
"""

import argparse
import json
import statistics
import time
from itertools import pairwise

import numpy as np
import torch
from _stacks import config_of, seconds_of
from torch import Tensor
from torch.nn import functional

from bdl_train.data import Data, Part
from bdl_train.specs import InputSpec, TargetKind, TargetSpec

ROWS, INPUTS, MEMBERS, WIDTHS = 1022, 5, 10, (16, 16, 16, 16)
TARGET = 0.9


def make_data() -> Data:
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS + 100, INPUTS)).astype(np.float32)
    y = (np.sin(x[:, 0]) + 0.3 * random.standard_normal(len(x))).astype(np.float32)
    parts = [Part(x[one], y[one], np.arange(len(x))[one]) for one in (slice(ROWS), slice(ROWS, None))]
    empty = Part(x[:0], y[:0], np.arange(0))
    spec, target = InputSpec((INPUTS,), (1,) * INPUTS), TargetSpec(TargetKind.CONTINUOUS)
    return Data(name="bench", train=parts[0], val=parts[1], test=empty, inputs=spec, target=target)


def chain_seconds(data: Data, num_steps: int) -> float:
    """A whole stack with so many steps of sampling."""
    config = config_of(
        batch_size=256,
        model=("mlp", {"hidden": list(WIDTHS)}),
        likelihood=("heteroscedastic_gaussian", {}),
        inference=("mclmc", {"patience": None, "num_warmup": 200, "num_draws": num_steps // 10, "thin": 10}),
        trainer=(
            "default",
            {"max_epochs": 20, "compile": True},
        ),  # the short chain too: its time is taken off
    )
    return seconds_of(data, config, MEMBERS)[0]


class Bare:
    """Weights of all members and the gradient of the sum of their log joints, features first: `[M, units, rows]`."""

    def __init__(self, data: Data) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = (INPUTS, *WIDTHS, 2)
        self.weights = []
        for i, o in pairwise(sizes):
            self.weights.append(torch.randn(MEMBERS, o, i, generator=generator) / i**0.5)
            self.weights.append(torch.zeros(MEMBERS, o, 1))
        self.x, self.y = torch.from_numpy(data.train.x).T.contiguous(), torch.from_numpy(data.train.y)
        self.gradient = torch.compile(torch.func.grad(self.log_joint), fullgraph=True, dynamic=False)

    def log_joint(self, weights: list[Tensor]) -> Tensor:
        first = weights[0].reshape(-1, INPUTS) @ self.x
        h = first.view(MEMBERS, WIDTHS[0], ROWS) + weights[1]
        for w, b in zip(weights[2::2], weights[3::2], strict=True):
            h = torch.baddbmm(b, w, torch.relu(h))
        mean, std = h[:, 0], functional.softplus(h[:, 1]) + 1e-3
        log_lik = -0.5 * ((self.y - mean) / std).square() - std.log()
        log_prior = sum((-0.5 * w.square()).sum() for w in weights)
        return log_lik.sum() + log_prior

    def rate(self, num_calls: int) -> float:
        """Member-gradients a second."""
        for _ in range(3):
            self.gradient(self.weights)
        start = time.perf_counter()
        for _ in range(num_calls):
            self.gradient(self.weights)
        return MEMBERS * num_calls / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    data, bare = make_data(), Bare(make_data())
    short, long, repeats = (200, 600, 1) if quick else (200, 2200, 5)
    chain_seconds(data, short)  # compiles, or fills the compiler's cache
    ratios, rates = [], []
    for _ in range(repeats):
        base = bare.rate(2 * (long - short) // 2)
        seconds = chain_seconds(data, long) - chain_seconds(data, short)
        rates.append(2 * MEMBERS * (long - short) / seconds)  # two gradients a step
        ratios.append(rates[-1] / ((base + bare.rate(2 * (long - short) // 2)) / 2))
    row = {
        "member_gradients_per_s": round(statistics.median(rates)),
        "ratio_to_bare": round(statistics.median(ratios), 3),
        "target": TARGET,
        "torch": torch.__version__,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()

"""Speed of stacks of LeNets on a GPU, as ratios within one run: batch 128, Adam, 28 x 28 inputs.

Member-steps a second of `bdl train` (Lightning, health checks and events included; the difference of a long and a short
run, so that the start is left out), by members of a stack, against
  plain  a bare PyTorch loop of one LeNet on the same GPU, its rows there from the start: members one after another

    python scripts/bench/bench_gpu.py [--quick]
"""

import argparse
import logging
import statistics
import time
import warnings

import numpy as np
import torch
from _stacks import config_of, seconds_of
from torch import nn

from bdl_train.data import Data, Part
from bdl_train.models.lenet import LeNet
from bdl_train.specs import InputSpec, TargetKind, TargetSpec

ROWS, BATCH, CLASSES = 6400, 128, 10
STEPS_PER_EPOCH = ROWS // BATCH
INPUTS = InputSpec((1, 28, 28))
MEMBERS = (1, 5, 10, 20, 50)


def make_data() -> Data:
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, 1, 28, 28)).astype(np.float32)
    part = Part(x, random.integers(CLASSES, size=ROWS), np.arange(ROWS))
    empty = Part(x[:0], part.y[:0], np.arange(0))
    target = TargetSpec(TargetKind.CLASS, classes=tuple(str(k) for k in range(CLASSES)))
    return Data(name="bench", train=part, val=empty, test=empty, inputs=INPUTS, target=target)


def shipped(data: Data, num_members: int, executor: str, epochs: int) -> float:
    """Member-steps a second."""

    def seconds(num_epochs: int) -> float:
        config = config_of(
            batch_size=BATCH,
            model=("lenet", {}),
            likelihood=("categorical", {}),
            inference=("deep_ensemble", {"patience": None}),
            optimizer=("adam", {"lr": 1e-3}),
            trainer=(
                "default",
                {"max_epochs": num_epochs, "executor": executor, "accelerator": "gpu", "compile": False},
            ),
        )
        return seconds_of(data, config, num_members, gpus=1)[0]

    return num_members * epochs * STEPS_PER_EPOCH / (seconds(1 + epochs) - seconds(1))


def plain(data: Data, epochs: int) -> float:
    """Steps a second of one network."""
    network = LeNet(activation="relu", dropout=0.0).network(INPUTS, CLASSES).cuda()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    x, y = torch.from_numpy(data.train.x).cuda(), torch.from_numpy(data.train.y).cuda()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(ROWS, device="cuda")
        for step in range(STEPS_PER_EPOCH):
            index = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
    torch.cuda.synchronize()
    return epochs * STEPS_PER_EPOCH / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs and repeats")
    quick = parser.parse_args().quick
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = make_data()
    epochs, repeats = (2, 1) if quick else (6, 3)
    plain(data, 2)
    shipped(data, 2, "vmap", 1)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, median of {repeats} interleaved repeats\n"
    )
    print("| members | executor | member-steps/s | of the plain loop |")
    print("| --- | --- | --- | --- |")
    for num_members in MEMBERS:
        for executor in ("vmap", "loop"):
            rows = [
                (shipped(data, num_members, executor, epochs), plain(data, epochs)) for _ in range(repeats)
            ]
            speed = statistics.median(row[0] for row in rows)
            ratio = statistics.median(row[0] / row[1] for row in rows)
            print(f"| {num_members} | {executor} | {speed:,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

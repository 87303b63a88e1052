"""Speed of stacks of LeNets on a GPU, as ratios within one run: batch 128, Adam, 28 x 28 inputs.

Member-steps a second of `bdl train` (Lightning, health checks and events included; the difference of a long and a short
run, so that the start is left out), by members of a stack, against
  plain  a bare PyTorch loop of one LeNet on the same GPU, its rows there from the start: members one after another

    python scripts/bench/bench_gpu.py [--quick]
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bdl_train.data import Data, Part
from bdl_train.models.lenet import LeNet
from bdl_train.runs import RunDir
from bdl_train.specs import InputSpec, TargetKind, TargetSpec
from bdl_train.training.prepared import StackTask
from bdl_train.training.train_stack import train_stack

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


def seconds_of(data: Data, num_members: int, executor: str, epochs: int) -> float:
    config = {
        "data": {"batch_size": BATCH},
        "model": {"_target_": "bdl_train.models.lenet.LeNet", "activation": "relu", "dropout": 0.0},
        "likelihood": {"_target_": "bdl_train.likelihoods.categorical.Categorical"},
        "prior": {"_target_": "bdl_train.priors.gaussian.Gaussian", "scale": 1.0, "fan_in": False},
        "inference": {"_target_": "bdl_train.inference.deep_ensemble.DeepEnsemble", "patience": None},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "scheduler": {"_target_": "bdl_train.schedulers.constant.Constant"},
        "trainer": {
            "_target_": "bdl_train.training.settings.TrainerSettings",
            "max_epochs": epochs,
            "member_fraction": 1.0,
            "precision": "32-true",
            "accelerator": "gpu",
            "executor": executor,
            "compile": False,
            "clip_norm": None,
            "on_divergence": "mark",
            "steps_per_call": 16,
            "checkpoint_every_s": 60.0,
            "batch_norm_batches": 64,
        },
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        task = StackTask("000", tuple(range(num_members)), cpus=1, gpus=1)
        start = time.perf_counter()
        result = train_stack(task, config, data, RunDir(Path(folder)))
        seconds = time.perf_counter() - start
    assert all(member["status"] == "done" for member in result["members"])
    assert result["device"] == "cuda"
    return seconds


def shipped(data: Data, num_members: int, executor: str, epochs: int) -> float:
    """Member-steps a second."""
    seconds = seconds_of(data, num_members, executor, 1 + epochs) - seconds_of(data, num_members, executor, 1)
    return num_members * epochs * STEPS_PER_EPOCH / seconds


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
    plain(data, 2), shipped(data, 2, "vmap", 1)
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

"""Training speed of a stack, as ratios within one run.

Network 13 → 50 → 2, 1000 rows, batch 32, Adam, one core, as `bdl train` runs it (Lightning included), against:
  plain  a plain Lightning loop, one member after another: what an ensemble costs without stacks
  bare   a bare stack step: batched matrix products, autograd, Adam; no prior, no health checks, no Lightning

    python scripts/bench/bench_stack.py [--quick]
"""

import argparse
import logging
import statistics
import time
import warnings

import numpy as np
import pytorch_lightning as pl
import torch
from _stacks import config_of, seconds_of
from torch import nn

from bdl_train.data import Data, Part
from bdl_train.specs import InputSpec, TargetKind, TargetSpec

NUM_ROWS, NUM_INPUTS, HIDDEN, CLASSES, BATCH = 1000, 13, 50, 2, 32
STEPS_PER_EPOCH = NUM_ROWS // BATCH
TARGETS = {"plain": 30.0, "bare": 0.6}


def make_data() -> Data:
    random = np.random.default_rng(0)
    x = random.standard_normal((NUM_ROWS, NUM_INPUTS)).astype(np.float32)
    y = (x[:, 0] + 0.5 * random.standard_normal(NUM_ROWS) > 0).astype(np.int64)
    part = Part(x, y, np.arange(NUM_ROWS))
    empty = Part(x[:0], y[:0], np.arange(0))
    return Data(
        name="bench",
        train=part,
        val=empty,
        test=empty,
        inputs=InputSpec((NUM_INPUTS,), (1,) * NUM_INPUTS),
        target=TargetSpec(TargetKind.CLASS, classes=("0", "1")),
    )


def shipped(data: Data, num_members: int, epochs: int) -> float:
    """Member-steps a second of the shipped path: fit alone, the start-up of imports and files left out."""
    config = config_of(
        batch_size=BATCH,
        model=("mlp", {"hidden": [HIDDEN]}),
        likelihood=("categorical", {}),
        inference=("deep_ensemble", {"patience": None}),
        optimizer=("adam", {"lr": 1e-3}),
        trainer=("default", {"max_epochs": epochs, "compile": False}),
    )
    seconds, steps = seconds_of(data, config, num_members)
    return num_members * steps / seconds


class PlainMember(pl.LightningModule):
    """One member as anyone would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(NUM_INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def plain(data: Data, epochs: int) -> float:
    """Member-steps a second of a plain Lightning fit of one member; members would follow one another."""
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(data.train.x), torch.from_numpy(data.train.y))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(PlainMember(), loader)
    return epochs * STEPS_PER_EPOCH / (time.perf_counter() - start)


def bare(data: Data, num_members: int, epochs: int) -> float:
    """Member-steps a second of the same arithmetic with nothing around it."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(*shape, generator=generator)).requires_grad_()

    w1, b1 = weight(num_members, NUM_INPUTS, HIDDEN), weight(num_members, 1, HIDDEN)
    w2, b2 = weight(num_members, HIDDEN, CLASSES), weight(num_members, 1, CLASSES)
    optimizer = torch.optim.Adam([w1, b1, w2, b2], 1e-3)
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.stack([torch.randperm(NUM_ROWS, generator=generator) for _ in range(num_members)])
        for step in range(STEPS_PER_EPOCH):
            index = order[:, step * BATCH : (step + 1) * BATCH]
            hidden = torch.relu(torch.baddbmm(b1, x[index], w1))
            logits = torch.baddbmm(b2, hidden, w2)
            loss = nn.functional.cross_entropy(
                logits.reshape(-1, CLASSES), y[index].reshape(-1), reduction="none"
            ).reshape(num_members, BATCH)
            optimizer.zero_grad()
            loss.mean(1).sum().backward()
            optimizer.step()
    return num_members * epochs * STEPS_PER_EPOCH / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs and repeats")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = make_data()
    epochs, repeats = (10, 2) if quick else (40, 5)
    plain(data, 2)
    shipped(data, 2, 2)
    bare(data, 2, 2)
    print(f"torch {torch.__version__}, one thread, median of {repeats} interleaved repeats\n")
    print("| members | plain Lightning | shipped | bare step | shipped / plain | shipped / bare |")
    print("| --- | --- | --- | --- | --- | --- |")
    verdicts = []
    for num_members in (20, 100):
        # Interleaved, so that a slow spell of a shared machine hits all three.
        rows = [
            (
                plain(data, max(2, epochs // 10)),
                shipped(data, num_members, epochs),
                bare(data, num_members, epochs),
            )
            for _ in range(repeats)
        ]
        speeds = [statistics.median(column) for column in zip(*rows, strict=True)]
        to_plain = statistics.median(row[1] / row[0] for row in rows)
        to_bare = statistics.median(row[1] / row[2] for row in rows)
        cells = " | ".join(f"{speed:,.0f}" for speed in speeds)
        print(f"| {num_members} | {cells} | {to_plain:.1f} | {to_bare:.2f} |")
        if num_members == 100:
            verdicts = [("plain", to_plain), ("bare", to_bare)]
    print("\nspeeds in member-steps a second")
    for name, ratio in verdicts:
        met = "met" if ratio >= TARGETS[name] else "MISSED"
        print(f"target at 100 members: shipped / {name} ≥ {TARGETS[name]:g}: {ratio:.2f}, {met}")


if __name__ == "__main__":
    main()

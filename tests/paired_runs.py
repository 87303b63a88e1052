"""Scored runs of two kinds of models on the same rows, for paired comparisons."""

import numpy as np

from bdl_train.evaluation.pairing import ScoredExperiment, ScoredRun

TOTAL = 400


def scored_run(
    name: str,
    split: int = 0,
    seed: int = 0,
    gain: float = 0.0,
    data: str = "energy",
    count: int = 80,
    noise: int = 0,
) -> ScoredRun:
    """Rows that the split picks of one table; `gain` is how much less surprise there is than in a plain run."""
    rows = np.sort(np.random.default_rng(split).choice(TOTAL, count, replace=False))
    hard, y = np.random.default_rng(99).exponential(1.0, TOTAL)[rows], np.arange(TOTAL) / 2
    random = np.random.default_rng([noise, split, seed])
    nll = hard + random.normal(0, 0.1, count) - gain
    columns = {"row": rows, "y": y[rows], "nll": nll, "crps": nll / 2, "error": random.normal(0, 1, count)}
    return ScoredRun(name, (split, seed), f"{data}-{split}-{seed}", TOTAL - count, columns, "kWh")


def scored_experiment(name: str, splits: int = 1, seeds: int = 1, **settings) -> ScoredExperiment:
    runs = [
        scored_run(f"{name}-{split}-{seed}", split, seed, noise=sum(name.encode()), **settings)
        for split in range(splits)
        for seed in range(seeds)
    ]
    return ScoredExperiment(name, runs)

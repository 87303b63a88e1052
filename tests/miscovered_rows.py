"""Scored rows of a predictive that is wrong, for what has to hold whatever the model."""

import numpy as np

from bdl_train.evaluation.rows import RowScores


def numbers(num_rows: int, seed: int, shift: float = 0.0) -> RowScores:
    """A predictive that is wrong: half as wide as the targets, with skewed noise and edges that miss."""
    random = np.random.default_rng(seed)
    mean, std = random.normal(size=num_rows), 0.5 + random.random(num_rows)
    y = mean + 2 * std * (random.exponential(size=num_rows) - 1) + shift
    edges = {f"lower_{p}": mean - z * std for p, z in ((50, 0.7), (95, 1.9))}
    edges |= {f"upper_{p}": mean + z * std for p, z in ((50, 0.7), (95, 1.9))}
    return RowScores({"y": y, "mean": mean, "total_std": std, "nll": np.zeros(num_rows), **edges})


def classes(num_rows: int, seed: int, shift: float = 0.0) -> RowScores:
    """Probabilities that are far too sharp; `shift` moves the labels' own logits away from them."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, 4))
    y = (logits + shift * random.normal(size=logits.shape) + random.gumbel(size=logits.shape)).argmax(1)
    sharp = np.exp(3 * logits)
    probs = sharp / sharp.sum(1, keepdims=True)
    return RowScores({"y": y, "nll": np.zeros(num_rows)}, probs)


def edges_of(rows: RowScores) -> tuple[np.ndarray, np.ndarray]:
    return rows.columns["lower_95"], rows.columns["upper_95"]


def probs_of(rows: RowScores) -> np.ndarray:
    assert rows.probs is not None
    return rows.probs


def own_scores(rows: RowScores, scores: np.ndarray) -> np.ndarray:
    return scores[np.arange(len(rows)), rows.columns["y"]]

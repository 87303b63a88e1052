"""The inversion probe on models whose best inputs are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.evaluation import inversion
from bdl_train.evaluation.inversion import inversion_probe, reconstruct


def linear(weights: Tensor):
    """log softmax(W x), for inputs of any shape."""
    return lambda x: torch.log_softmax(x.flatten(1).double() @ weights.T, dim=1)


def rows(num_rows: int, seed: int, dims: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_rows) % 2
    return torch.randn(num_rows, dims, generator=generator) + 2.0 * y[:, None], y


def probe(log_prob, start: Tensor, targets: Tensor, *, steps: int = 1, seed: int = 0, **other):
    (train_x, train_y), (other_x, other_y) = rows(80, 2 * seed), rows(60, 2 * seed + 1)
    parts = {"train_x": train_x, "train_y": train_y, "other_x": other_x, "other_y": other_y}
    return inversion_probe(
        log_prob, start, targets, steps=steps, lr=0.05, l2=0.0, tv=0.0, seed=seed, **{**parts, **other}
    )


def test_a_linear_softmax_is_inverted_to_the_direction_of_its_weights():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    x, reached = reconstruct(linear(weights), start, targets, steps=500, lr=0.5, l2=0.02, tv=0.0)
    # Where the gradient is 0: 2 · l2 · x = w_k − Σ p_j w_j.
    log_p = linear(weights)(x)
    expected = (weights[targets] - log_p.exp() @ weights) / (2 * 0.02)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reached, log_p[torch.arange(6), targets])
    torch.testing.assert_close(
        x[:3], x[3:], rtol=1e-3, atol=1e-3
    )  # the problem is concave: starts do not matter
    two, _ = reconstruct(
        linear(weights[:2]), start[:2], torch.tensor([0, 1]), steps=500, lr=0.5, l2=0.02, tv=0.0
    )
    direction = weights[0] - weights[1]
    cosine = torch.cosine_similarity(two, torch.stack([direction, -direction]))
    assert cosine.min() > 0.9999


def test_total_variation_smooths_images_only():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 25, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 1, 5, 5, generator=generator, dtype=torch.float64)
    target = torch.tensor([1])
    spread, gain = [], []
    for tv in (0.0, 0.1):
        x, reached = reconstruct(linear(weights), start, target, steps=300, lr=0.1, l2=0.01, tv=tv)
        spread.append(float(x.diff(dim=-1).abs().sum() + x.diff(dim=-2).abs().sum()))
        gain.append(float(reached) - 0.01 * float(x.square().sum()) - 0.1 * spread[-1])
    assert spread[1] < 0.1 * spread[0]
    assert gain[1] > gain[0]  # what is ascended is higher where it was ascended
    with pytest.raises(UsageError, match=r"Total variation is of images .*\[1, 25\]: set its weight to 0"):
        reconstruct(linear(weights), start.flatten(1), target, steps=1, lr=0.1, l2=0.0, tv=0.1)


def test_a_model_that_remembers_its_rows_is_caught():
    """log p(class) is a kernel density over the training rows: ascents end on training rows."""
    train_x, train_y = rows(80, 0)

    def log_prob(x: Tensor) -> Tensor:
        near = -torch.cdist(x.double(), train_x.double()).square() / (2 * 0.5**2)
        return torch.stack([near[:, train_y == k].logsumexp(1) for k in range(2)], dim=1)

    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(12) % 2
    start = torch.randn(12, 4, generator=generator) + 2.0 * targets[:, None]
    found = probe(log_prob, start, targets, steps=200, names=("no", "yes"))
    table = found.table.set_index("target")
    assert list(table.index) == ["no", "yes", "all"]
    assert table.loc["all", "high"] < 1
    assert table.loc["all", "p_value"] <= 0.01
    assert table.loc["all", "starts"] == 12
    assert list(table["n"]) == [30, 30, 60]
    assert set(table["slice"]) == {"all"}
    first, nothing = np.arange(80) < 40, np.zeros(80, bool)
    sliced = probe(
        log_prob, start, targets, steps=200, names=("no", "yes"),
        slices=[("first", first, first[:60]), ("nobody", nothing, nothing[:60])],
    )  # fmt: skip
    own = sliced.table.set_index("slice").loc["first"]
    assert (own["target"], own["n"]) == ("all", 40)
    alone = probe(
        log_prob, start, targets, steps=200, train_x=train_x[:40], train_y=train_y[:40],
        other_x=rows(60, 1)[0][:40], other_y=rows(60, 1)[1][:40],
    )  # fmt: skip
    assert own["nearest_train"] == pytest.approx(alone.table.set_index("target").loc["all", "nearest_train"])
    assert sliced.warnings == ("slice nobody: no class has 5 training and 5 held-out rows",)
    x, _ = reconstruct(log_prob, start, targets, steps=200, lr=0.05, l2=0.0, tv=0.0)
    other_x, other_y = rows(60, 1)
    own = targets == 1
    nearest = [min(float((one - row).norm()) for row in other_x[other_y == 1]) for one in x[own]]
    assert table.loc["yes", "nearest_other"] == pytest.approx(np.mean(nearest), rel=1e-5)
    values = found.reconstructions
    assert list(values.columns) == ["target", "start", "position", "value"]
    first = values.query("target == 'yes' and start == 0").sort_values("position")["value"]
    np.testing.assert_allclose(first, x[1].numpy(), rtol=1e-6)


def test_without_a_leak_the_test_keeps_its_level_however_alike_reconstructions_are(monkeypatch):
    """All starts of a class are one point: a test that took them for independent would reject nearly always."""
    monkeypatch.setattr(inversion, "SPLITS", 99)
    targets = torch.arange(10) % 2
    start = torch.ones(10, 4) * targets[:, None] * 2.0
    zero = linear(torch.zeros(2, 4, dtype=torch.float64))
    every = [probe(zero, start, targets, seed=seed).table.iloc[-1] for seed in range(100)]
    rejected = sum(one["p_value"] <= 0.05 for one in every)
    assert rejected <= 5 + 4 * np.sqrt(100 * 0.05 * 0.95)
    assert rejected >= 1
    p_values = np.array([one["p_value"] for one in every])
    assert p_values.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * 100))
    covered = sum(one["low"] <= 1 <= one["high"] for one in every)
    assert covered >= 95 - 4 * np.sqrt(100 * 0.05 * 0.95)


def test_the_probe_repeats_itself_and_leaves_the_global_generator_alone():
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = torch.get_rng_state()
    one, other = (probe(linear(weights), torch.zeros(4, 4), torch.arange(4) % 2, seed=3) for _ in range(2))
    assert one.table.equals(other.table)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_some_reconstructions_are_kept_some_of_each_class():
    found = probe(
        linear(torch.zeros(2, 4, dtype=torch.float64)), torch.zeros(40, 4), (torch.arange(40) >= 30).long()
    )
    kept = found.reconstructions.groupby("target")["start"].nunique()
    assert dict(kept) == {"0": 8, "1": 8}


def test_classes_without_rows_are_left_out_aloud():
    zero = linear(torch.zeros(3, 4, dtype=torch.float64))
    found = probe(zero, torch.zeros(4, 4), torch.tensor([0, 0, 1, 2]))
    assert list(found.table["target"]) == ["0", "1", "all"]
    assert found.warnings == ("class 2: 0 training and 0 held-out rows, it takes 5 of each",)
    with pytest.raises(UsageError, match="No class can be probed: class 2: 0 training"):
        probe(zero, torch.zeros(1, 4), torch.tensor([2]))


def test_what_does_not_fit_or_diverges_is_refused():
    zero = linear(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"of one shape, got \[3\], \[4\] and \[4\]"):
        probe(zero, torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(UsageError, match="not finite: lower its lr"):
        probe(lambda x: torch.full((len(x), 2), torch.nan) * x.sum(), torch.zeros(1, 4), torch.tensor([0]))

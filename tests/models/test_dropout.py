"""The counter-hash dropout: its rate, its independence, and the same bits wherever a member stands."""

import pytest
import torch
from torch import Tensor, nn

from bdl_train.models._dropout import Dropout, make_dropout
from bdl_train.stack import StackedNetwork, build_stack

torch.set_num_threads(1)


def masks(seed: int, rate: float = 0.5, steps: int = 2, layers: int = 2, size: int = 10_000) -> Tensor:
    """Which of `size` units each layer keeps in each step: `[steps, layers, size]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drops = [Dropout(rate) for _ in range(layers)]
    return torch.stack([torch.stack([drop(torch.ones(size)) != 0 for drop in drops]) for _ in range(steps)])


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_keep_rate_and_mean(rate):
    torch.manual_seed(0)
    drop = Dropout(rate)
    n = 200_000
    y = drop(torch.full((n,), 3.0))
    kept = y != 0
    standard_error = (rate * (1 - rate) / n) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=5 * standard_error)
    assert y.double().mean().item() == pytest.approx(3.0, abs=5 * 3 * standard_error / (1 - rate))
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 3.0 / (1 - rate)))


def test_masks_of_members_steps_and_layers_are_unrelated():
    size = 10_000
    kept = (
        torch.stack([masks(seed) for seed in range(4)]).flatten(0, 2).double()
    )  # 4 members x 2 steps x 2 layers
    correlation = torch.corrcoef(kept)
    off = correlation - torch.diag(correlation.diag())
    # 120 pairs of masks of 10,000 fair coins: standard error 0.01 each.
    assert off.abs().max().item() < 5 / size**0.5


def test_neighbouring_units_rows_and_seeds_are_unrelated():
    drop = Dropout(0.5)
    rows = []
    for seed in range(200):  # consecutive seeds, as a posterior draw may choose them
        drop.seed.fill_(seed)
        drop.step.zero_()
        rows.append(drop(torch.ones(256)) != 0)
    kept = torch.stack(rows).double()
    z = (kept - 0.5) * 2
    n = kept.numel()
    for lagged in ((z[:, 1:] * z[:, :-1]), (z[1:] * z[:-1]), (z[:, 64:] * z[:, :-64])):
        assert abs(lagged.sum().item()) < 5 * n**0.5
    counts = kept.sum(0)  # Binomial(200, 1/2) for each unit
    assert (counts - 100).square().mean().item() == pytest.approx(50, rel=0.5)


def reference_mix(h: int) -> int:
    """MurmurHash3's fmix32 in Python integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_the_bits_are_the_published_finaliser_of_seed_step_and_element():
    torch.manual_seed(3)
    drop = Dropout(0.4)
    seed = int(drop.seed)
    for step in range(3):
        kept = (drop(torch.ones(50)) != 0).tolist()
        key = reference_mix(reference_mix(seed % 2**32 ^ reference_mix(step + 0x9E3779B9)) ^ seed >> 32)
        assert kept == [reference_mix(reference_mix(i) ^ key) >= 0.4 * 2**32 for i in range(50)]
    assert int(drop.step) == 3


def test_both_halves_of_the_seed_matter():
    drop = Dropout(0.5)
    kept = set()
    for seed in (1, 2, 1 + 2**32, 1 + 2**33):
        drop.seed.fill_(seed)
        drop.step.zero_()
        kept.add(tuple((drop(torch.ones(64)) != 0).tolist()))
    assert len(kept) == 4


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_identity_at_rate_zero_and_in_eval_mode(rate, training):
    drop = Dropout(rate).train(training)
    x = torch.tensor([1.0, -0.0, torch.inf, -torch.inf, torch.nan]).expand(4, 5)
    changed = rate > 0 and training
    assert torch.equal(drop(x).view(torch.int32), x.contiguous().view(torch.int32)) != changed
    assert int(drop.step) == int(changed)


def test_no_layer_at_all_at_rate_zero():
    assert isinstance(make_dropout(0.0), nn.Identity)
    assert isinstance(make_dropout(0.1), Dropout)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match=f"got {rate}"):
        Dropout(rate)


def test_the_global_generator_is_used_at_construction_only():
    drop = Dropout(0.5)
    before = torch.get_rng_state()
    drop(torch.ones(100))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_a_member_draws_the_same_bits_alone_and_in_a_stack(executor):
    def make() -> nn.Module:
        return nn.Sequential(Dropout(0.5), nn.Linear(8, 8), Dropout(0.3))

    template, stack = build_stack(make, range(7))
    network = StackedNetwork(template, executor)
    x = torch.ones(7, 16, 8)
    buffers = stack.buffers
    kept = []
    for _ in range(3):
        outputs, buffers = network(stack.params, buffers, x, train=True)
        kept.append(outputs != 0)
    for m in (0, 3, 6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(m)
            module = make()
        for step in range(3):
            assert torch.equal(module(x[m]) != 0, kept[step][m])
    assert buffers["0.step"].tolist() == [3] * 7
    assert not torch.equal(kept[0][0], kept[0][1])
    assert not torch.equal(kept[0][0], kept[1][0])


def test_gradients_flow_through_kept_units_only():
    drop = Dropout(0.25)
    x = torch.randn(100, requires_grad=True)
    y = drop(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (y != 0) / 0.75)

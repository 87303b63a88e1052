"""Batch-norm statistics of posterior draws against an ordinary module that passes over the same batches."""

import pytest
import torch
from tiny_problems import SmallConvNet, example, work
from torch import Tensor, nn

from bdl_train.posteriors.atoms import Atoms
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.specs import InputSpec
from bdl_train.stack import Executor, Layout, StackedNetwork
from bdl_train.training.finalise import finalise, has_batch_norm

N, DRAWS = 26, 3
SPEC = InputSpec((2, 6, 6))
PIXELS = InputSpec((2, 6, 6), pixel_mean=(0.4, 0.6), pixel_std=(0.2, 0.3))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def posterior() -> tuple[LowRankGaussian, Layout]:
    stack = work(example("conv-batch-norm"), [0]).problem.stack
    generator = torch.Generator().manual_seed(1)
    deviations = 0.3 * torch.randn(4, stack.flat.shape[1], generator=generator, dtype=torch.float64)
    buffers = {name: buffer[0] + 3 for name, buffer in stack.buffers.items()}
    return (
        LowRankGaussian(stack.flat[0].clone(), torch.full_like(stack.flat[0], 0.05), deviations, buffers),
        stack.layout,
    )


def images(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (N, 2, 6, 6), generator=generator, dtype=torch.uint8)
    return torch.randn(N, 2, 6, 6, generator=generator, dtype=dtype)


def module_with(flat: Tensor, layout: Layout) -> SmallConvNet:
    network = SmallConvNet(3).double()
    nn.utils.vector_to_parameters(flat, network.parameters())
    assert tuple(dict(network.named_parameters())) == layout.names
    return network


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize(("spec", "dtype"), [(SPEC, torch.float32), (PIXELS, torch.uint8)])
def test_each_draw_has_the_statistics_of_an_ordinary_module_with_its_weights(
    spec: InputSpec, dtype: torch.dtype, executor: Executor
):
    member, layout = posterior()
    network = StackedNetwork(SmallConvNet(3).double(), executor)
    x = images(dtype)
    atoms = finalise(member, network, layout, spec, x, num_draws=DRAWS, seed=7, batch_size=8, max_batches=64)
    assert isinstance(atoms, Atoms)
    assert atoms.num_atoms == DRAWS
    drawn = [flat for flat, _ in member.draw(DRAWS, 7)]
    for k, (flat, buffers) in enumerate(atoms.draw(DRAWS, seed=0)):
        assert torch.equal(flat, drawn[k])
        module = module_with(flat, layout).train()
        for norm in (module.features[1], module.features[4]):
            assert isinstance(norm, nn.BatchNorm2d)
            norm.reset_running_stats()
            norm.momentum = None  # torch's own cumulative average over batches
        inputs = x.double() / 255 if dtype == torch.uint8 else x.double()
        if dtype == torch.uint8:
            mean, std = (
                torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (spec.pixel_mean, spec.pixel_std)
            )
            inputs = (inputs - mean) / std
        with torch.no_grad():
            for b in range(3):  # 26 rows in 3 strided batches
                module(inputs[b::3])
        statistics = {name: t for name, t in module.named_buffers() if "running" in name}
        assert len(statistics) == 4
        for name, expected in statistics.items():
            torch.testing.assert_close(buffers[name], expected, rtol=1e-6, atol=1e-8)
            assert not torch.allclose(buffers[name], member.buffers[name], rtol=0.1)
    assert not torch.allclose(
        atoms.buffers["features.1.running_mean"][0], atoms.buffers["features.1.running_mean"][1]
    )


def test_a_finalised_posterior_refuses_more_draws_than_it_stored():
    member, layout = posterior()
    network = StackedNetwork(SmallConvNet(3).double(), "loop")
    atoms = finalise(
        member,
        network,
        layout,
        SPEC,
        images(torch.float64),
        num_draws=2,
        seed=7,
        batch_size=256,
        max_batches=64,
    )
    with pytest.raises(ValueError, match="holds 2 atoms a member, 3 draws were asked for"):
        list(atoms.draw(3, seed=0))


def test_the_network_and_the_posterior_are_left_as_they_were():
    member, layout = posterior()
    template = SmallConvNet(3).double()
    before = {name: buffer.clone() for name, buffer in member.buffers.items()}
    finalise(
        member,
        StackedNetwork(template, "loop"),
        layout,
        SPEC,
        images(torch.float64),
        num_draws=1,
        seed=7,
        batch_size=256,
        max_batches=64,
    )
    assert [m.momentum for m in template.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.1]
    assert all(torch.equal(member.buffers[name], before[name]) for name in before)


def test_large_sets_are_sampled_evenly():
    """With more batches than the most allowed, the batches taken still spread over the rows."""
    member, layout = posterior()
    network = StackedNetwork(SmallConvNet(3).double(), "loop")
    x = images(torch.float64)
    some = finalise(member, network, layout, SPEC, x, num_draws=1, seed=7, batch_size=4, max_batches=2)
    module = module_with(some.flat[0], layout).train()
    first = module.features[0]
    with torch.no_grad():
        features = [first(x[b::6]) for b in range(2)]
    means = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    torch.testing.assert_close(some.buffers["features.1.running_mean"][0], means, rtol=1e-6, atol=1e-9)


def test_the_global_generator_is_untouched_even_with_torchs_dropout():
    member, layout = posterior()
    template = SmallConvNet(3).double()
    template.features.append(nn.Dropout(0.5))
    x = images(torch.float64)
    before = torch.get_rng_state()
    one, other = (
        finalise(
            member,
            StackedNetwork(template, "vmap"),
            layout,
            SPEC,
            x,
            num_draws=2,
            seed=7,
            batch_size=256,
            max_batches=64,
        )
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one.buffers[name], other.buffers[name]) for name in one.buffers)


def test_has_batch_norm():
    assert has_batch_norm(SmallConvNet(3))
    assert not has_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert not has_batch_norm(nn.BatchNorm1d(3, track_running_stats=False))

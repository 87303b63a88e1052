"""Dropout masks as posterior draws: each is one function, with the moments of Bernoulli masks in closed form."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from small_posteriors import MLP, PIXELS, meta_of, random_stack, write_artefact
from torch import Tensor, nn

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.likelihoods import Likelihood
from bdl_train.models import architecture_from
from bdl_train.models._dropout import Dropout, dropout_names
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.artefact import Artefact, read_artefact
from bdl_train.posteriors.atoms import Atoms
from bdl_train.posteriors.dropout_masks import DropoutMasks
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.predictive import _forward, predict
from bdl_train.predictive.predict import Predictor
from bdl_train.specs import InputSpec, TargetSpec
from bdl_train.stack import Executor, Stack, StackedNetwork, build_stack

RATE, ROWS, INPUTS = 0.3, 5, 6
DEEP = {**MLP, "hidden": [16, 12], "dropout": 0.4}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def members_of(template: nn.Module, stack: Stack) -> list[MemberPosterior]:
    return DropoutMasks.of_stack(stack, list(dropout_names(template)))


def outputs_of(
    template: nn.Module,
    stack: Stack,
    member: MemberPosterior,
    x: Tensor,
    count: int,
    executor: Executor = "vmap",
) -> Tensor:
    """What `count` draws say of rows `[B, ...]`, `[S, B, O]`."""
    chunk = next(EnsemblePosterior([0], [member], count, seed=3).draw(chunk_size=count))
    params = stack.layout.unflatten(chunk.flat)
    with torch.no_grad():
        return StackedNetwork(template, executor)(params, chunk.buffers, x, train=False, shared=True)[0]


def linear() -> tuple[nn.Module, Stack, Tensor]:
    """A linear model with dropout on its inputs, in float64, and rows for it."""
    template, stack = build_stack(
        lambda: nn.Sequential(Dropout(RATE), nn.Linear(INPUTS, 1)), [4], dtype=torch.float64
    )
    x = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return template, stack, x


# --- closed forms -------------------------------------------------------------------------------------------------


def test_draws_of_a_linear_model_have_the_moments_of_bernoulli_masks():
    """Σ_i w_i x_i b_i / (1 − p) has mean x·w and, over rows, covariance p / (1 − p) Σ_i w_i² x_i x'_i.

    Wager et al. (2013), arXiv:1307.1493, Section 2. The covariance of two rows is what a mask for each row would lose.
    """
    template, stack, x = linear()
    count = 20_000
    draws = outputs_of(template, stack, members_of(template, stack)[0], x, count)[..., 0]
    w, b = stack.params["1.weight"][0, 0], stack.params["1.bias"][0]
    expected = RATE / (1 - RATE) * torch.einsum("i,bi,ci->bc", w.square(), x, x)
    variance = expected.diag()
    # Five standard errors; those of a covariance for normal values, which these sums of bounded terms do not exceed.
    assert ((draws.mean(0) - (x @ w + b)).abs() < 5 * (variance / count).sqrt()).all()
    error = ((torch.outer(variance, variance) + expected.square()) / count).sqrt()
    assert ((draws.T.cov() - expected).abs() < 5 * error).all()
    correlation = expected / torch.outer(variance, variance).sqrt()
    assert (correlation - torch.eye(ROWS)).abs().max() > 0.5  # there is something to lose


def test_every_draw_zeroes_columns_of_the_weights():
    """With the 2^6 masks written out: the outputs of a draw on all rows are those of one masked weight matrix."""
    template, stack, x = linear()
    draws = outputs_of(template, stack, members_of(template, stack)[0], x, 200)[..., 0]
    w, b = stack.params["1.weight"][0, 0], stack.params["1.bias"][0]
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=INPUTS)), dtype=torch.float64)
    possible = (masks * w / (1 - RATE)) @ x.T + b
    distance, mask = (draws[:, None] - possible).abs().amax(-1).min(1)
    assert distance.max() < 1e-12
    # Rates of zeros: 1200 Bernoulli variables.
    assert masks[mask].mean().item() == pytest.approx(1 - RATE, abs=5 * (RATE * (1 - RATE) / 1200) ** 0.5)
    assert len(mask.unique()) > 40


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_masks_of_layers_are_unrelated(executor: Executor):
    size, count = 20, 1000
    identity = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(size))
    network = nn.Sequential(Dropout(0.5), identity, Dropout(0.5))
    template, stack = build_stack(lambda: network, [0])
    draws = outputs_of(template, stack, members_of(template, stack)[0], torch.ones(3, size), count, executor)
    assert torch.equal(draws[:, 0], draws[:, 2])
    # A unit gets through both layers with probability 1/4, and is then 4; with one mask for both it would be 1/2.
    kept = draws[:, 0] != 0
    assert kept.double().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / (size * count)) ** 0.5)
    assert set(draws.unique().tolist()) == {0.0, 4.0}


# --- draws ------------------------------------------------------------------------------------------------------


def artefact_of(num_members: int = 3, num_draws: int = 9) -> Artefact:
    """Members of a deep network with dropout, never trained."""
    meta = meta_of("gaussian", architecture=DEEP, num_draws=num_draws)
    stack = random_stack(meta, num_members)
    likelihood = build(meta["likelihood"], Likelihood, key="likelihood")
    architecture, inputs = architecture_from(DEEP), InputSpec.from_json(meta["inputs"])
    target = TargetSpec.from_json(meta["target"])
    members = members_of(architecture.network(inputs, likelihood.num_outputs(target)), stack)
    posterior = EnsemblePosterior(list(range(num_members)), members, num_draws, meta["draw_seed"])
    return Artefact(meta, posterior, architecture, likelihood, inputs, target, None, stack.layout)


def predicted(artefact: Artefact, x: Tensor, executor: Executor = "loop") -> dict[str, Tensor]:
    tiles = list(Predictor(artefact, executor=executor)(x, torch.zeros(len(x)), per_component=True))
    return {
        "mean": torch.cat([tile.stats.mean for tile in tiles]),  # pyright: ignore[reportAttributeAccessIssue]
        "epistemic": torch.cat([tile.stats.epistemic for tile in tiles]),
        "per_component": torch.cat(
            [tile.per_component for tile in tiles if tile.per_component is not None], 1
        ),
    }


def rows(count: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_a_draw_is_one_function_whatever_the_tiles_and_the_batch(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
):
    artefact, x = artefact_of(2, 4), rows(14)
    whole = predicted(artefact, x, executor)
    one_by_one = predicted(artefact, x[9:10], executor)
    assert (whole["epistemic"] > 1e-3).all()
    for module in (predict, _forward):
        for name in ("CACHE_BYTES", "LOOP_BYTES", "STATS_BYTES"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, {"cpu": 1})
    monkeypatch.setattr(predict, "DRAWS_BYTES", 1)
    monkeypatch.setattr(predict, "ROOM_BYTES", 1)
    assert Predictor(artefact).chunk_size == 1
    in_tiles = predicted(artefact, x, executor)
    for name, value in whole.items():
        # Only the sums of matrix products may be ordered otherwise.
        torch.testing.assert_close(in_tiles[name], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one_by_one[name], value[..., 9:10], rtol=1e-5, atol=1e-5)


def test_executors_agree():
    artefact, x = artefact_of(), rows(8)
    one, other = predicted(artefact, x, "vmap"), predicted(artefact, x, "loop")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


def test_draws_differ_in_nothing_but_the_masks_and_come_again():
    artefact = artefact_of(num_members=2)
    one, other = artefact.posterior.members
    assert isinstance(one, DropoutMasks)
    many = list(one.draw(6, 1))
    assert one.num_atoms is None
    assert one.at_trained_weights
    for flat, buffers in many:
        assert torch.equal(flat, one.flat)
        assert buffers["2.step"] == buffers["5.step"] == -1
    seeds = [int(buffers[name]) for _, buffers in many for name in ("2.seed", "5.seed")]
    assert len(set(seeds)) == 12
    for (_, buffers), (_, again) in zip(many, one.draw(4, 1), strict=False):
        assert buffers == again
    assert next(one.draw(1, 2))[1] != many[0][1]
    assert not torch.equal(*(chunk.buffers["2.seed"] for chunk in artefact.posterior.draw(1, chunk_size=1)))
    assert not torch.equal(one.flat, other.num_params * one.flat)


def test_moments_are_those_of_a_point():
    member = artefact_of().posterior.members[0]
    mean, var = member.moments()
    assert torch.equal(mean, next(member.draw(1, 0))[0])
    assert var.tolist() == [0.0] * member.num_params


def test_atoms_of_the_same_weights_are_the_network_without_masks():
    """What other methods predict from a network with dropout is what it was before draws of masks existed."""
    artefact, x = artefact_of(1), rows(8)
    member = artefact.posterior.members[0]
    assert isinstance(member, DropoutMasks)
    buffers = {f"{name}.seed": layer[:1] for name, layer in member.layers.items()}
    buffers |= {f"{name}.step": layer[1:] for name, layer in member.layers.items()}
    atom = Atoms(member.flat[None], buffers)
    plain = dataclasses.replace(artefact, architecture=architecture_from({**DEEP, "dropout": 0.0}))
    # Without dropout layers the later linear layers have other places, the flat vector is the same.
    params = dict(plain.network().named_parameters())
    layout = dataclasses.replace(artefact.layout, names=(*params, *artefact.layout.names[len(params) :]))
    posterior = EnsemblePosterior([0], [atom], 1, 11)
    bare = EnsemblePosterior([0], [Atoms(member.flat[None], {})], 1, 11)
    masked = predicted(dataclasses.replace(artefact, posterior=posterior), x)
    expected = predicted(dataclasses.replace(plain, posterior=bare, layout=layout), x)
    for name in masked:
        assert torch.equal(masked[name], expected[name]), name


# --- storage ------------------------------------------------------------------------------------------------------


def test_a_reloaded_posterior_predicts_the_same_bits(tmp_path: Path):
    artefact, x = artefact_of(), rows(20)
    write_artefact(tmp_path, artefact)
    again = read_artefact(tmp_path)
    assert {type(member) for member in again.posterior.members} == {DropoutMasks}
    before, after = predicted(artefact, x), predicted(again, x)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    # The weights are there once, whatever the number of draws.
    assert (tmp_path / "member-00000.safetensors").stat().st_size < 2 * 4 * artefact.layout.num_params


def test_draws_do_not_follow_the_order_of_the_stored_tensors():
    names = [str(i) for i in range(12)]
    layers = {name: torch.tensor([i, 0]) for i, name in enumerate(names)}
    one = DropoutMasks(torch.zeros(3), {}, layers)
    other = DropoutMasks.from_tensors(dict(reversed(one.tensors().items())))
    assert next(one.draw(1, 5))[1] == next(other.draw(1, 5))[1]
    assert other.layers == one.layers


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "need a tensor 'weights'"),
        ({"weights": torch.zeros(1, 4)}, r"of shape \[P\]"),
        ({"weights": torch.zeros(4), "dropout:a": torch.zeros(2)}, "'a' needs a seed .* of torch.float32"),
        ({"weights": torch.zeros(4), "dropout:a": torch.tensor(3)}, r"'a' needs a seed .* got \[\]"),
    ],
)
def test_tensors_that_are_no_masks_are_refused(tensors: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        DropoutMasks.from_tensors(tensors)


def test_masks_of_another_network_are_refused(tmp_path: Path):
    artefact = artefact_of(1)
    member = artefact.posterior.members[0]
    assert isinstance(member, DropoutMasks)
    renamed = dataclasses.replace(member, layers={"9": member.layers["2"], "5": member.layers["5"]})
    posterior = dataclasses.replace(artefact.posterior, members=[renamed])
    write_artefact(tmp_path, dataclasses.replace(artefact, posterior=posterior))
    with pytest.raises(UsageError, match=r"buffers .*'9.seed'.* its network has"):
        read_artefact(tmp_path)


def test_images_are_masked_by_position_and_channel():
    network = nn.Sequential(Dropout(0.5), nn.Flatten())
    template, stack = build_stack(lambda: nn.Sequential(network, nn.Linear(64, 1)), [0])
    member = members_of(template, stack)[0]
    assert isinstance(member, DropoutMasks)
    assert list(member.layers) == ["0.0"]
    chunk = next(EnsemblePosterior([0], [member], 1, seed=3).draw(chunk_size=1))
    for name, buffer in network.named_buffers():
        buffer.copy_(chunk.buffers[f"0.{name}"][0])
    kept = network.eval()(torch.ones(4, *PIXELS.shape))
    assert torch.equal(kept[0], kept[3])
    assert set(kept.unique().tolist()) == {0.0, 2.0}

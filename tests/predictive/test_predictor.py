"""The pass over data: the same predictive whatever the executor, the tiles, the chunks and the batch."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from small_posteriors import PIXELS, RESNET, small_artefact, target_for
from torch import Tensor, nn
from torch.func import functional_call

from bdl_train.errors import UsageError
from bdl_train.likelihoods import PREFIX
from bdl_train.models import Architecture
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.atoms import Atoms
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.predictive import _forward, predict
from bdl_train.predictive.predict import Predictor, TilePrediction
from bdl_train.predictive.stats import ClassStats, NumberStats
from bdl_train.specs import InputSpec
from bdl_train.stack import Layout

LIKELIHOODS = ("categorical", "bernoulli", "gaussian", "heteroscedastic_gaussian", "student_t", "poisson")
METHODS = ("ensemble", "atoms", "swag")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def targets(artefact: Artefact, count: int) -> Tensor:
    if artefact.target.num_classes:
        return torch.arange(count) % artefact.target.num_classes
    whole = "oisson" in type(artefact.likelihood).__name__
    return torch.arange(count) % 4 if whole else torch.linspace(-1, 1, count)


def resnet_artefact(method: str = "atoms", **settings: Any) -> Artefact:
    return small_artefact("categorical", method, architecture=RESNET, inputs=PIXELS, **settings)


def gathered(tiles: Iterator[TilePrediction]) -> dict[str, Tensor]:
    """Every quantity of every row, joined over the tiles."""
    found: dict[str, list[Tensor]] = {}
    for tile in tiles:
        one = {name: getattr(tile.stats, name) for name in ("total", "aleatoric", "epistemic", "nll")}
        one["mean"] = tile.stats.mean_probs if isinstance(tile.stats, ClassStats) else tile.stats.mean
        if tile.mixture is not None:
            one["median"] = tile.mixture.quantile(torch.tensor([0.5]))[0]
        if tile.per_component is not None:
            one["per_component"] = tile.per_component.T
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def limit(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    for name, value in sizes.items():
        for module in (predict, _forward):
            if hasattr(module, name):
                by_device = isinstance(getattr(module, name), dict)
                monkeypatch.setattr(module, name, {"cpu": value, "cuda": value} if by_device else value)


# --- against a plain loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_classes_are_those_of_a_plain_loop_over_draws(method: str):
    artefact = small_artefact("categorical", method, num_draws=4)
    x, y = rows(9), torch.arange(9) % 3
    network, all_probs, weights = artefact.network(), [], []
    for draws in artefact.posterior.draw(chunk_size=1):
        outputs = functional_call(network, artefact.layout.unflatten(draws.flat[0]), (x,))
        all_probs.append(scipy.special.softmax(outputs.detach().double().numpy(), axis=-1))
        weights.append(draws.log_weights.exp().item())
    probs_CBK, w = np.stack(all_probs), np.array(weights)
    mean = np.einsum("c,cbk->bk", w, probs_CBK)
    found = gathered(Predictor(artefact)(x, y, per_component=True))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["nll"], -np.log(mean[np.arange(9), y]), rtol=1e-5)
    np.testing.assert_allclose(
        found["aleatoric"], w @ scipy.special.entr(probs_CBK).sum(-1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        found["per_component"], np.log(probs_CBK[:, np.arange(9), y]).T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("likelihood", ["gaussian", "student_t"])
def test_every_draw_is_used_with_its_own_learned_noise(likelihood: str):
    artefact = small_artefact(likelihood, "swag", num_draws=5)
    name = next(name for name in artefact.layout.names if name.startswith(PREFIX))
    column = artefact.layout.columns([name])
    scales, weights = [], []
    for draws in artefact.posterior.draw(chunk_size=2):
        scales += draws.flat[:, column].exp().flatten().tolist()
        weights += draws.log_weights.exp().tolist()
    assert np.ptp(scales) > 0.1
    variance = np.square(scales) * (2.0 if likelihood == "student_t" else 1.0)  # df / (df - 2) of df 4
    found = gathered(Predictor(artefact)(rows(4)))
    np.testing.assert_allclose(found["aleatoric"], np.full(4, np.dot(weights, variance)), rtol=1e-6)


def test_weights_are_equal_over_members_whatever_their_atoms():
    artefact = small_artefact("gaussian", "atoms")
    posterior = artefact.posterior
    first = posterior.only(0).members[0]
    fewer = type(first).from_tensors({name: t[:1] for name, t in first.tensors().items()})
    uneven = dataclasses.replace(posterior, members=[fewer, *posterior.members[1:]])
    x = rows(5)
    means = []
    for index in range(3):
        alone = dataclasses.replace(artefact, posterior=uneven.only(index))
        means.append(gathered(Predictor(alone)(x))["mean"])
    together = gathered(Predictor(dataclasses.replace(artefact, posterior=uneven))(x))["mean"]
    torch.testing.assert_close(together, torch.stack(means).mean(0), rtol=1e-6, atol=1e-7)


# --- invariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("method", METHODS)
def test_vmap_and_loop_agree(likelihood: str, method: str):
    artefact = small_artefact(likelihood, method, num_draws=3)
    x, y = rows(7), targets(artefact, 7)
    found = [
        gathered(Predictor(artefact, executor=executor)(x, y, per_component=True))
        for executor in ("vmap", "loop", "auto", "measured")
    ]
    for other in found[1:]:
        assert_close(found[0], other)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "poisson"])
@pytest.mark.parametrize("method", METHODS)
def test_tiles_chunks_and_batches_change_nothing(
    likelihood: str, method: str, monkeypatch: pytest.MonkeyPatch
):
    artefact = small_artefact(likelihood, method, num_members=3, num_draws=4)
    x, y = rows(300), targets(artefact, 300)
    whole = gathered(Predictor(artefact)(x, y, per_component=True))
    limit(
        monkeypatch,
        CACHE_BYTES=1 << 12,
        LOOP_BYTES=1 << 12,
        STATS_BYTES=1 << 12,
        DRAWS_BYTES=490,
        MIN_ROWS=3,
        ROOM_BYTES=1 << 16,
    )
    small = Predictor(artefact)
    assert small.chunk_size < small.num_components
    assert small.block_rows < 150
    assert_close(gathered(small(x, y, per_component=True)), whole)
    parts = [gathered(small(x[i : i + 70], y[i : i + 70], per_component=True)) for i in range(0, 300, 70)]
    assert_close({name: torch.cat([part[name] for part in parts]) for name in whole}, whole)


def test_a_row_has_the_same_bits_in_every_batch_of_the_same_size():
    artefact = small_artefact("categorical", "swag", num_draws=6)
    predictor = Predictor(artefact)
    x = rows(16)
    one = gathered(predictor(x))
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    again = gathered(predictor(torch.cat([x[:8], rows(8, seed=5)])))
    assert_equal({name: value[:8] for name, value in again.items()}, {n: v[:8] for n, v in one.items()})
    assert_close(gathered(predictor(x[shuffled])), {name: value[shuffled] for name, value in one.items()})


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_two_identical_predictions_are_equal_bit_for_bit(
    method: str, keep: bool, monkeypatch: pytest.MonkeyPatch
):
    if not keep:
        limit(monkeypatch, DRAWS_BYTES=1000)
    for artefact, x in (
        (small_artefact("gaussian", method, num_draws=3), rows(20)),
        (resnet_artefact(method, num_draws=2), images(5)),
    ):
        predictor = Predictor(artefact)
        first = gathered(predictor(x))
        assert_equal(gathered(predictor(x)), first)
        assert_equal(gathered(Predictor(artefact)(x)), first)


def test_draws_are_made_once_for_all_tiles(monkeypatch: pytest.MonkeyPatch):
    artefact = small_artefact("categorical", "swag", num_draws=5)
    calls = 0
    cls = type(artefact.posterior.members[0])
    draw = cls.draw

    def counted(self: Any, num_samples: int, seed: int) -> Any:
        nonlocal calls
        calls += 1
        return draw(self, num_samples, seed)

    limit(monkeypatch, CACHE_BYTES=1 << 14, STATS_BYTES=1 << 14)
    predictor = Predictor(artefact)
    monkeypatch.setattr(cls, "draw", counted)
    assert len(list(predictor(rows(500)))) > 3
    list(predictor(rows(40)))
    assert calls == artefact.posterior.num_members


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_batch_norm_statistics_belong_to_their_draw(executor: Any):
    artefact = resnet_artefact()
    x = images(6)
    network, logits = artefact.network(), []
    for draws in artefact.posterior.draw(chunk_size=4):
        for c in range(len(draws)):
            state = {
                **artefact.layout.unflatten(draws.flat[c]),
                **{k: b[c].clone() for k, b in draws.buffers.items()},
            }
            logits.append(functional_call(network, state, (PIXELS.prepare(x, torch.float32),)).detach())
    probs = torch.stack(logits).double().softmax(-1).mean(0)
    found = gathered(Predictor(artefact, executor=executor)(x))
    torch.testing.assert_close(found["mean"], probs, rtol=1e-4, atol=1e-5)


class Counting(nn.Linear):
    """A network that counts its calls, in eval mode too."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


class CountingArchitecture(Architecture):
    takes = "any"

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        return Counting(inputs.shape[0], num_outputs)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_a_network_that_writes_to_its_buffers_changes_no_posterior(executor: Any):
    flat = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    posterior = EnsemblePosterior([0], [Atoms(flat, {"calls": torch.tensor([5.0, 7.0])})], 2, 0)
    artefact = dataclasses.replace(
        small_artefact(),
        architecture=CountingArchitecture(),
        posterior=posterior,
        layout=Layout(("weight", "bias"), ((3, 3), (3,))),
    )
    predictor = Predictor(artefact, executor=executor)
    first = gathered(predictor(rows(4)))
    assert_equal(gathered(predictor(rows(4))), first)
    assert posterior.members[0].tensors()["buffer:calls"].tolist() == [5.0, 7.0]


def test_double_precision_weights_give_double_precision_predictions():
    single = small_artefact("gaussian", "ensemble")
    double = small_artefact("gaussian", "ensemble", dtype="float64")
    one, other = gathered(Predictor(single)(rows(5))), gathered(Predictor(double)(rows(5)))
    assert_close(one, other)
    assert not torch.equal(one["mean"], other["mean"])


def test_half_precision_changes_the_network_only():
    artefact = small_artefact("categorical", "ensemble")
    one = gathered(Predictor(artefact)(rows(50)))
    half = gathered(Predictor(artefact, precision="bf16-mixed")(rows(50)))
    assert half["mean"].dtype == torch.float64
    assert_close(one, half, tolerance=0.03)
    assert not torch.equal(one["mean"], half["mean"])


# --- memory ---------------------------------------------------------------------------------------------------


def test_components_of_classes_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch):
    limit(monkeypatch, CACHE_BYTES=1 << 16, DRAWS_BYTES=4000)
    artefact = small_artefact("categorical", "swag", num_draws=40)
    predictor = Predictor(artefact)
    largest = 0
    forward = predictor._forward

    def watched(chunk: Any, x: Tensor) -> Tensor:
        nonlocal largest
        outputs = forward(chunk, x)
        largest = max(largest, outputs.shape[0])
        return outputs

    monkeypatch.setattr(predictor, "_forward", watched)
    for tile in predictor(rows(100)):
        assert tile.mixture is None
        assert tile.per_component is None
        assert len(tile.members) == 120
    assert largest == predictor.chunk_size < 30


# --- arguments ------------------------------------------------------------------------------------------------


def test_draws_may_be_fewer_and_of_a_distribution_more():
    artefact = small_artefact("categorical", "swag", num_draws=4)
    assert Predictor(artefact).num_components == 12
    assert Predictor(artefact, num_draws=9).num_components == 27
    assert len(next(iter(Predictor(artefact, num_draws=9)(rows(2)))).members) == 27


@pytest.mark.parametrize(
    ("num_draws", "message"), [(4, "num_draws=4 .* holds 3 atoms"), (0, "1 or more, got 0")]
)
def test_a_wrong_number_of_draws_is_refused(num_draws: int, message: str):
    with pytest.raises(UsageError, match=message):
        Predictor(small_artefact("categorical", "atoms"), num_draws=num_draws)


def test_inputs_of_another_shape_are_refused():
    predictor = Predictor(small_artefact())
    with pytest.raises(ValueError, match=r"\[N, \*\[3\]\], got \[5, 4\]"):
        list(predictor(torch.zeros(5, 4)))


def test_no_rows_give_no_tiles():
    assert list(Predictor(small_artefact())(torch.zeros(0, 3))) == []


def test_targets_of_each_likelihood_are_scored():
    for likelihood in LIKELIHOODS:
        artefact = small_artefact(likelihood)
        (tile,) = Predictor(artefact)(rows(6), targets(artefact, 6), per_component=True)
        expected = ClassStats if target_for(likelihood).num_classes else NumberStats
        assert isinstance(tile.stats, expected)
        assert tile.per_component is not None
        log_weights = torch.full((3, 1), -np.log(3))
        by_hand = -torch.logsumexp(tile.per_component.double() + log_weights, 0)
        torch.testing.assert_close(tile.stats.nll, by_hand, rtol=1e-6, atol=1e-6)

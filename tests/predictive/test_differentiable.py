"""Gradients of the mixture: against finite differences, closed forms, and the predictor's numbers."""

import dataclasses
import math

import pytest
import torch
from small_posteriors import MLP, PIXELS, RESNET, small_artefact
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive import differentiable
from bdl_train.predictive.differentiable import MixtureModule
from bdl_train.predictive.predict import Predictor
from bdl_train.predictive.stats import ClassStats, NumberStats

CLASSES, NUMBERS = (
    ("categorical", "bernoulli"),
    ("gaussian", "heteroscedastic_gaussian", "student_t", "poisson"),
)
LINEAR = {**MLP, "hidden": []}


def rows(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module_of(artefact: Artefact, num_draws: int | None = None) -> MixtureModule:
    return MixtureModule(artefact, device="cpu", num_draws=num_draws)


def class_stats(artefact: Artefact, x: Tensor) -> ClassStats:
    (tile,) = Predictor(artefact)(x)
    assert isinstance(tile.stats, ClassStats)
    return tile.stats


def number_stats(artefact: Artefact, x: Tensor) -> NumberStats:
    (tile,) = Predictor(artefact)(x)
    assert isinstance(tile.stats, NumberStats)
    return tile.stats


@pytest.mark.parametrize("method", ["ensemble", "atoms", "swag"])
@pytest.mark.parametrize("likelihood", CLASSES)
def test_class_probabilities_and_information_are_the_predictors(likelihood: str, method: str):
    artefact = small_artefact(likelihood, method, num_draws=7)
    x = 2 * rows(20, 3).float()
    stats, module = class_stats(artefact, x), module_of(artefact)
    torch.testing.assert_close(module.log_probs(x).exp(), stats.mean_probs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(module.mutual_information(x), stats.epistemic, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(x), module.log_probs(x))


@pytest.mark.parametrize("method", ["ensemble", "swag"])
@pytest.mark.parametrize("likelihood", NUMBERS)
def test_mean_and_variance_are_the_predictors_in_the_targets_units(likelihood: str, method: str):
    artefact = small_artefact(likelihood, method, num_draws=7)
    x = rows(20, 3).float()
    stats, module, target = number_stats(artefact, x), module_of(artefact), artefact.target
    torch.testing.assert_close(module.mean(x), stats.mean * target.scale + target.loc, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.variance(x), stats.total * target.scale**2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        module.epistemic(x), stats.epistemic.sqrt() * target.scale, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(module(x), module.mean(x))


def test_pixels_and_stored_images_give_the_same():
    artefact = small_artefact("categorical", "ensemble", architecture=RESNET, inputs=PIXELS)
    stored = torch.randint(
        0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    module = module_of(artefact)
    pixels = (stored.double() / 255).requires_grad_(True)
    log_probs = module.log_probs(module.from_pixels(pixels))
    torch.testing.assert_close(
        log_probs.exp(), class_stats(artefact, stored).mean_probs, rtol=1e-5, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(log_probs[:, 0].sum(), pixels)
    assert gradient.abs().mean() > 1e-4


QUANTITIES = {
    "log_probs": ("categorical", lambda module, x: module.log_probs(x)[:, 1]),
    "log_probs of bernoulli": ("bernoulli", lambda module, x: module.log_probs(x)[:, 1]),
    "mutual_information": ("categorical", lambda module, x: module.mutual_information(x)),
    "mean": ("gaussian", lambda module, x: module.mean(x)),
    "variance": ("heteroscedastic_gaussian", lambda module, x: module.variance(x)),
    "epistemic": ("student_t", lambda module, x: module.epistemic(x)),
    "mean of poisson": ("poisson", lambda module, x: module.mean(x)),
}


@pytest.mark.parametrize("draws_at_a_time", [4, 100])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_gradients_are_finite_differences(
    quantity: str, draws_at_a_time: int, monkeypatch: pytest.MonkeyPatch
):
    likelihood, value = QUANTITIES[quantity]
    monkeypatch.setattr(differentiable, "DRAWS_AT_A_TIME", draws_at_a_time)
    module = module_of(small_artefact(likelihood, "swag", num_draws=3, dtype="float64"))
    assert (len(module._chunks) > 1) == (draws_at_a_time == 4)
    x = rows(5, 3).requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(module, x).sum(), x)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(3, dtype=torch.float64)
        differences = [(value(module, x + h) - value(module, x - h)) / 2e-5 for h in steps]
    torch.testing.assert_close(gradient, torch.stack(differences, dim=1), rtol=1e-6, atol=1e-8)


def test_one_linear_gaussian_member_has_its_weights_as_gradient():
    artefact = small_artefact("gaussian", "ensemble", num_members=1, architecture=LINEAR, dtype="float64")
    module = module_of(artefact)
    x = rows(4, 3).requires_grad_(True)
    (gradient,) = torch.autograd.grad(module.mean(x).sum(), x)
    (draws,) = artefact.posterior.draw(chunk_size=10)
    weight = artefact.layout.unflatten(draws.flat[0])["0.weight"]
    assert weight.shape == (1, 3)
    torch.testing.assert_close(gradient, (weight * artefact.target.scale).expand(4, 3))
    (of_epistemic,) = torch.autograd.grad(module.epistemic(x).sum(), x)  # sqrt of 0 has no slope
    assert torch.equal(of_epistemic, torch.zeros_like(x))


def test_probabilities_are_averaged_not_logits():
    artefact = small_artefact("categorical", "ensemble", dtype="float64")
    x = 3 * rows(10, 3)
    alone = [
        module_of(dataclasses.replace(artefact, posterior=artefact.posterior.only(m))).log_probs(x)
        for m in range(3)
    ]
    expected = torch.stack(alone).exp().mean(0).log()
    torch.testing.assert_close(module_of(artefact).log_probs(x), expected)
    assert (torch.log_softmax(torch.stack(alone).mean(0), -1) - expected).abs().max() > 0.01


def test_a_far_input_keeps_a_finite_gradient():
    module = module_of(small_artefact("categorical", "ensemble", architecture=LINEAR))
    x = (1e4 * rows(5, 3)).requires_grad_(True)
    log_probs = module.log_probs(x)
    assert log_probs.min() < -math.log(1e300)
    for value in (log_probs.sum(), module.mutual_information(x).sum()):
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        assert bool(gradient.isfinite().all())


def test_a_network_in_a_loop_runs_draw_by_draw(monkeypatch: pytest.MonkeyPatch):
    artefact = small_artefact("gaussian", "swag", num_draws=2, dtype="float64")
    batched = module_of(artefact)
    monkeypatch.setattr(differentiable, "choose_executor", lambda *_: ("loop", "asked for"))
    looped = module_of(artefact)
    assert len(looped._chunks) == looped.num_components == 6
    x = rows(5, 3).requires_grad_(True)
    one, other = (torch.autograd.grad(module.variance(x).sum(), x)[0] for module in (batched, looped))
    torch.testing.assert_close(one, other)


def test_weights_stay_as_they_are_and_get_no_gradient():
    module = module_of(small_artefact("categorical", "swag", num_draws=2))
    before = module._chunks[0].draws.flat.clone()
    x = rows(5, 3).requires_grad_(True)
    module.log_probs(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float64
    assert torch.equal(module._chunks[0].draws.flat, before)
    assert module._chunks[0].draws.flat.grad is None
    assert list(module.parameters()) == []
    state = torch.random.get_rng_state()
    module.log_probs(x)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_wrong_use_is_refused():
    of_classes, of_numbers = module_of(small_artefact()), module_of(small_artefact("gaussian"))
    with pytest.raises(TypeError, match="'price' is a number"):
        of_numbers.log_probs(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="'species' is a class"):
        of_classes.mean(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must be \[B, \*\[3\]\], got \[2, 4\]"):
        of_classes(torch.zeros(2, 4))
    with pytest.raises(UsageError, match="num_draws"):
        module_of(small_artefact(), num_draws=0)

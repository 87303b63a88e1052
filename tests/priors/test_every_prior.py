"""Promises that every prior keeps, whatever its YAML."""

import dataclasses
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Generator, Tensor

import bdl_train.priors
from bdl_train.build import build, resolve
from bdl_train.errors import UsageError
from bdl_train.priors import BoundPrior, Prior
from bdl_train.stack import Layout

CONFIGS = {path.stem: path for path in (Path(__file__).parents[2] / "conf" / "prior").glob("*.yaml")}
MEMBERS = [4, 1, 2]

Shipped = Callable[..., Prior]


def settings_of(name: str) -> dict[str, Any]:
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS[name]))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


@pytest.fixture
def runs(layout: Layout, write_run: Callable[..., Path]) -> list[str]:
    """Two earlier runs with different posteriors."""
    generator = Generator().manual_seed(5)
    written = []
    for _ in range(2):
        mean, log_var = torch.randn(2, 2, layout.num_params, generator=generator)
        written.append(str(write_run(layout, mean, log_var.exp())))
    return written


@pytest.fixture
def shipped(runs: list[str]) -> Shipped:
    """Builds a prior from its shipped YAML, with some settings changed."""

    def make(name: str, **changed: Any) -> Prior:
        given = {"run": runs[0]} if name == "from_posterior" else {}
        return build({**settings_of(name), **given, **changed}, Prior, key="prior")

    return make


def bound_in_float64(prior: Prior, layout: Layout) -> BoundPrior:
    return prior.bind(layout, MEMBERS).to("cpu", torch.float64)


def effects(prior: Prior, layout: Layout) -> list[Tensor]:
    bound = bound_in_float64(prior, layout)
    # Near zero and far from it: a narrow component is not felt far away.
    flat = torch.linspace(-1, 1, layout.num_params, dtype=torch.float64) * torch.tensor([[[3.0]], [[1e-3]]])
    return [bound.log_prob(flat.double()), bound.sample(2, Generator().manual_seed(0))]


def test_every_prior_has_a_config_and_every_config_a_prior():
    modules = {module.name for module in pkgutil.iter_modules(bdl_train.priors.__path__)}
    assert set(CONFIGS) == {name for name in modules if not name.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_lists_every_setting_of_its_class(name: str):
    settings = settings_of(name)
    target = settings.pop("_target_")
    assert target.startswith(f"bdl_train.priors.{name}.")
    fields = dataclasses.fields(resolve(target, Prior, key="prior"))  # pyright: ignore[reportArgumentType]
    assert set(settings) == {field.name for field in fields}
    assert all(field.default is dataclasses.MISSING for field in fields)


LAPLACE = {"_target_": "bdl_train.priors.laplace.Laplace", "scale": 1.0, "fan_in": False}
# Settings that are no numbers, and a floor that is large enough to be felt.
OTHER = {
    ("layerwise", "patterns"): {"*.bias": LAPLACE},
    ("layerwise", "default"): LAPLACE,
    ("from_posterior", "moments"): "per_member",
    ("from_posterior", "min_std"): 10.0,
}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in CONFIGS for field in settings_of(name) if field != "_target_"],
)
def test_every_setting_changes_the_result(
    name: str, field: str, shipped: Shipped, runs: list[str], layout: Layout
):
    value = settings_of(name)[field]
    if field == "run":
        changed = runs[1]
    elif (name, field) in OTHER:
        changed = OTHER[name, field]
    else:
        changed = (not value) if isinstance(value, bool) else 0.8 * value
    before, after = effects(shipped(name), layout), effects(shipped(name, **{field: changed}), layout)
    for one, other in zip(before, after, strict=True):
        assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_log_prob_is_one_number_for_each_leading_index(name: str, shipped: Shipped, layout: Layout):
    bound = bound_in_float64(shipped(name), layout)
    flat = torch.randn(5, len(MEMBERS), layout.num_params, dtype=torch.float64)
    together = bound.log_prob(flat)
    assert together.shape == (5, len(MEMBERS))
    torch.testing.assert_close(together[2], bound.log_prob(flat[2]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_right(name: str, shipped: Shipped, layout: Layout):
    bound = bound_in_float64(shipped(name), layout)
    flat = torch.randn(layout.num_params, dtype=torch.float64, generator=Generator().manual_seed(3))
    assert torch.autograd.gradcheck(bound.log_prob, flat.requires_grad_(True))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prior_that_was_never_asked_before_can_be_traced(name: str, shipped: Shipped, layout: Layout):
    """As in a compiled step that goes on from a checkpoint."""
    flat = torch.randn(layout.num_params, dtype=torch.float64, generator=Generator().manual_seed(3))
    log_prob = bound_in_float64(shipped(name), layout).log_prob
    traced = torch.compile(lambda x: log_prob(x), fullgraph=True, backend="eager")
    torch.compiler.reset()
    assert torch.equal(traced(flat), bound_in_float64(shipped(name), layout).log_prob(flat))


@pytest.mark.parametrize("extreme", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("name", CONFIGS)
def test_density_and_gradient_are_finite_at_extreme_weights(
    name: str, extreme: float, shipped: Shipped, layout: Layout
):
    bound = shipped(name).bind(layout, MEMBERS).to("cpu", torch.float32)
    flat = torch.full((layout.num_params,), extreme, requires_grad=True)
    log_prob = bound.log_prob(flat)
    (grad,) = torch.autograd.grad(log_prob.sum(), flat)
    assert log_prob.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_same_generator_seed_same_draws_and_the_global_generator_is_untouched(
    name: str, shipped: Shipped, layout: Layout
):
    bound = bound_in_float64(shipped(name), layout)
    before = torch.get_rng_state()
    first = bound.sample(4, Generator().manual_seed(7))
    again = bound.sample(4, Generator().manual_seed(7))
    other = bound.sample(4, Generator().manual_seed(8))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (4, *bound.lead, layout.num_params)
    assert torch.equal(first, again)
    assert (first != other).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_two_numbers_of_a_draw_are_equal(name: str, shipped: Shipped, layout: Layout):
    draws = bound_in_float64(shipped(name), layout).sample(100, Generator().manual_seed(7))
    assert draws.unique().numel() == draws.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_to_moves_every_tensor(name: str, dtype: torch.dtype, shipped: Shipped, layout: Layout):
    bound = shipped(name).bind(layout, MEMBERS).to("cpu", dtype)
    assert bound.sample(2, Generator().manual_seed(0)).dtype is dtype
    assert bound.log_prob(torch.zeros(layout.num_params, dtype=dtype)).dtype is dtype
    on_meta = bound.to("meta", dtype)
    assert on_meta.log_prob(torch.zeros(layout.num_params, dtype=dtype, device="meta")).device.type == "meta"


@pytest.mark.parametrize("name", CONFIGS)
def test_only_from_posterior_starts_members(name: str, shipped: Shipped):
    assert shipped(name).starts_members == (name == "from_posterior")


WRONG = [
    ("gaussian", "scale", -1.0),
    ("gaussian", "scale", 0.0),
    ("gaussian", "scale", float("inf")),
    ("gaussian", "scale", float("nan")),
    ("gaussian", "fan_in", "perhaps"),
    ("laplace", "scale", -0.5),
    ("student_t", "scale", 0.0),
    ("student_t", "df", 0.5),
    ("scale_mixture", "weight", 1.0),
    ("scale_mixture", "weight", 0.0),
    ("scale_mixture", "wide_std", -1.0),
    ("scale_mixture", "narrow_std", 0.0),
    ("layerwise", "patterns", "*.bias"),
    ("layerwise", "default", None),
    ("from_posterior", "run", None),
    ("from_posterior", "moments", "median"),
    ("from_posterior", "tempering", 0.0),
    ("from_posterior", "tempering", 1.5),
    ("from_posterior", "min_std", -1e-3),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_a_wrong_setting_is_refused_with_its_key_and_value(
    name: str, field: str, value: object, shipped: Shipped
):
    with pytest.raises(UsageError) as caught:
        shipped(name, **{field: value})
    assert f"prior.{field}" in str(caught.value)
    assert repr(value) in str(caught.value)

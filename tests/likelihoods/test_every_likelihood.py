"""Promises that every likelihood keeps, whatever its YAML."""

import dataclasses
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import bdl_train.likelihoods
from bdl_train.build import build, resolve
from bdl_train.errors import UsageError
from bdl_train.likelihoods import PREFIX, Likelihood
from bdl_train.specs import TargetKind, TargetSpec

CONFIGS = {path.stem: path for path in (Path(__file__).parents[2] / "conf" / "likelihood").glob("*.yaml")}
TARGETS = {
    TargetKind.CONTINUOUS: TargetSpec(TargetKind.CONTINUOUS, "price"),
    TargetKind.CLASS: TargetSpec(TargetKind.CLASS, "diagnosis", ("benign", "malign")),
    TargetKind.COUNT: TargetSpec(TargetKind.COUNT, "visits"),
}
NUM_MEMBERS, BATCH = 3, 7


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def settings_of(name: str) -> dict[str, Any]:
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS[name]))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def shipped(name: str, **changed: Any) -> Likelihood:
    return build({**settings_of(name), **changed}, Likelihood, key="likelihood")


def target_of(likelihood: Likelihood) -> TargetSpec:
    (kind,) = likelihood.kinds
    return TARGETS[kind]


def example(
    likelihood: Likelihood, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Random outputs `[M, B, O]`, targets `[M, B]` and the likelihood's parameters at their start, `[M]`."""
    generator = torch.Generator().manual_seed(1)
    target = target_of(likelihood)
    shape = (NUM_MEMBERS, BATCH)
    outputs = torch.randn(*shape, likelihood.num_outputs(target), generator=generator, dtype=torch.float64)
    if target.kind is TargetKind.CONTINUOUS:
        y = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:
        y = torch.randint(0, 2 if target.kind is TargetKind.CLASS else 9, shape, generator=generator)
    params = {
        PREFIX + name: torch.full((NUM_MEMBERS,), start, dtype=dtype)
        for name, (start, _, _) in likelihood.params().items()
    }
    return outputs.to(dtype), y, params


def test_every_likelihood_has_a_config_and_every_config_a_likelihood():
    modules = {module.name for module in pkgutil.iter_modules(bdl_train.likelihoods.__path__)}
    assert set(CONFIGS) == {name for name in modules if not name.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_lists_every_setting_of_its_class(name: str):
    settings = settings_of(name)
    target = settings.pop("_target_")
    assert target.startswith(f"bdl_train.likelihoods.{name}.")
    fields = dataclasses.fields(resolve(target, Likelihood, key="likelihood"))  # pyright: ignore[reportArgumentType]
    assert set(settings) == {field.name for field in fields}
    assert all(field.default is dataclasses.MISSING for field in fields)


def effects(likelihood: Likelihood) -> list[Tensor]:
    """Everything that a setting may change: the density, the predictive component, the parameters' priors."""
    outputs, y, params = example(likelihood)
    numbers = [number for triple in likelihood.params().values() for number in triple]
    return [
        likelihood.log_prob(outputs, y, params),
        likelihood.distribution(outputs, params).mean,
        likelihood.distribution(outputs, params).variance,
        torch.tensor(numbers),
    ]


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in CONFIGS for field in settings_of(name) if field != "_target_"],
)
def test_every_setting_changes_the_result(name: str, field: str):
    value = settings_of(name)[field]
    changed = (not value) if isinstance(value, bool) else 1.25 * value
    before, after = effects(shipped(name)), effects(shipped(name, **{field: changed}))
    assert any(
        one.shape != other.shape or not torch.equal(one, other)
        for one, other in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_log_prob_and_distribution_describe_the_same_density(name: str):
    likelihood = shipped(name)
    outputs, y, params = example(likelihood)
    component = likelihood.distribution(outputs, params)
    assert component.batch_shape == (NUM_MEMBERS, BATCH)
    # torch takes labels of Bernoulli and counts as floating point; those of Categorical are cast back inside.
    torch.testing.assert_close(
        likelihood.log_prob(outputs, y, params), component.log_prob(y.double()), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_outputs_are_computed_in_float32(name: str, dtype: torch.dtype):
    likelihood = shipped(name)
    outputs, y, params = example(likelihood, dtype)
    y = y.to(dtype) if y.is_floating_point() else y
    log_prob = likelihood.log_prob(outputs, y, params)
    assert log_prob.dtype is torch.float32
    exact = likelihood.log_prob(
        outputs.double(),
        y.double() if y.is_floating_point() else y,
        {name: value.double() for name, value in params.items()},
    )
    torch.testing.assert_close(log_prob.double(), exact, rtol=2e-6, atol=2e-6)
    component = likelihood.distribution(outputs, params)
    torch.testing.assert_close(component.log_prob(y.float()), exact, rtol=2e-6, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_full_precision_outputs_keep_their_dtype(name: str, dtype: torch.dtype):
    likelihood = shipped(name)
    outputs, y, params = example(likelihood, dtype)
    y = y.to(dtype) if y.is_floating_point() else y
    assert likelihood.log_prob(outputs, y, params).dtype is dtype


# A Poisson rate of exp(10000) is no number.
EXTREMES = [(n, x) for n in CONFIGS for x in (-1e4, -50.0, 50.0, 1e4) if (n, x) != ("poisson", 1e4)]


@pytest.mark.parametrize(("name", "extreme"), EXTREMES)
def test_density_and_gradient_are_finite_at_extreme_outputs(name: str, extreme: float):
    likelihood = shipped(name)
    outputs, y, params = example(likelihood, torch.float32)
    y = y.float() if y.is_floating_point() else y
    # Each output in turn is extreme, the others are not.
    for o in range(outputs.shape[-1]):
        leaf = outputs.clone()
        leaf[..., o] = extreme
        leaves = [leaf.requires_grad_(True), *(param.requires_grad_(True) for param in params.values())]
        log_prob = likelihood.log_prob(leaf, y, params)
        assert log_prob.isfinite().all()
        for grad in torch.autograd.grad(log_prob.sum(), leaves):
            assert grad.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_right(name: str):
    likelihood = shipped(name)
    outputs, y, params = example(likelihood)
    names = list(params)

    def total(outputs: Tensor, *values: Tensor) -> Tensor:
        return likelihood.log_prob(outputs, y, dict(zip(names, values, strict=True))).sum()

    leaves = [leaf.requires_grad_(True) for leaf in (outputs, *params.values())]
    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_member_alone_has_the_density_it_has_in_a_stack(name: str):
    likelihood = shipped(name)
    outputs, y, params = example(likelihood)
    params = {key: value + torch.linspace(-1, 1, NUM_MEMBERS) for key, value in params.items()}
    together = likelihood.log_prob(outputs, y, params)
    for m in range(NUM_MEMBERS):
        alone = likelihood.log_prob(outputs[m], y[m], {key: value[m] for key, value in params.items()})
        torch.testing.assert_close(alone, together[m], rtol=1e-14, atol=1e-14)


FITTING = {
    TargetKind.CONTINUOUS: {"gaussian", "heteroscedastic_gaussian", "student_t"},
    TargetKind.CLASS: {"categorical", "bernoulli"},
    TargetKind.COUNT: {"poisson"},
}


@pytest.mark.parametrize("kind", list(TargetKind))
@pytest.mark.parametrize("name", CONFIGS)
def test_check_accepts_a_fitting_target_and_names_the_fitting_likelihoods_otherwise(
    name: str, kind: TargetKind
):
    likelihood, target = shipped(name), TARGETS[kind]
    if name in FITTING[kind]:
        likelihood.check(target)
        return
    with pytest.raises(UsageError, match=f"likelihood={name} does not fit") as caught:
        likelihood.check(target)
    message = str(caught.value)
    assert f"'{target.name}'" in message
    assert f"kind '{kind.value}'" in message
    assert all(fitting in message for fitting in FITTING[kind])


WRONG = [
    ("gaussian", "noise_std", -0.3),
    ("gaussian", "noise_std", 0.0),
    ("gaussian", "noise_std", float("inf")),
    ("gaussian", "noise_std", float("nan")),
    ("gaussian", "log_noise_prior_std", 0.0),
    ("gaussian", "learn_noise", "perhaps"),
    ("heteroscedastic_gaussian", "min_std", -1e-3),
    ("heteroscedastic_gaussian", "min_std", float("inf")),
    ("student_t", "df", 1.5),
    ("student_t", "df", 2.0),
    ("student_t", "scale", -1.0),
    ("student_t", "log_scale_prior_std", -1.0),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_a_wrong_setting_is_refused_with_its_key_and_value(name: str, field: str, value: object):
    with pytest.raises(UsageError) as caught:
        shipped(name, **{field: value})
    assert f"likelihood.{field}" in str(caught.value)
    assert repr(value) in str(caught.value)

"""Promises that every schedule keeps, whatever its YAML."""

import dataclasses
import math
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import bdl_train.schedulers
from bdl_train.build import build, resolve
from bdl_train.errors import UsageError
from bdl_train.schedulers import Schedule

CONFIGS = {path.stem: path for path in (Path(__file__).parents[2] / "conf" / "scheduler").glob("*.yaml")}


def settings_of(name: str) -> dict[str, Any]:
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS[name]))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def shipped(name: str, **changed: Any) -> Schedule:
    return build({**settings_of(name), **changed}, Schedule, key="scheduler")


def test_every_schedule_has_a_config_and_every_config_a_schedule():
    modules = {module.name for module in pkgutil.iter_modules(bdl_train.schedulers.__path__)}
    assert set(CONFIGS) == {name for name in modules if not name.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_lists_every_setting_of_its_class(name: str):
    settings = settings_of(name)
    target = settings.pop("_target_")
    assert target.startswith(f"bdl_train.schedulers.{name}.")
    fields = dataclasses.fields(resolve(target, Schedule, key="scheduler"))  # pyright: ignore[reportArgumentType]
    assert set(settings) == {field.name for field in fields}
    assert all(field.default is dataclasses.MISSING for field in fields)


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in CONFIGS for field in settings_of(name) if field != "_target_"],
)
def test_every_setting_changes_the_result(name: str, field: str):
    value = settings_of(name)[field]
    changed = [0.8 * one for one in value] if isinstance(value, list) else 0.5 * value + 0.1
    before, after = shipped(name), shipped(name, **{field: changed})
    assert [before.factor(step, 100) for step in range(100)] != [
        after.factor(step, 100) for step in range(100)
    ]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_factors_lie_between_0_and_1_and_the_first_step_moves(name: str, num_steps: int):
    factors = [shipped(name).factor(step, num_steps) for step in range(num_steps)]
    assert all(math.isfinite(factor) and 0 <= factor <= 1 for factor in factors)
    assert factors[0] > 0


WRONG = [
    ("cosine", "warmup_fraction", 1.0),
    ("cosine", "warmup_fraction", -0.1),
    ("cosine", "final_factor", 1.5),
    ("cosine", "final_factor", float("nan")),
    ("step", "gamma", 0.0),
    ("step", "gamma", 1.0),
    ("step", "gamma", -0.1),
    ("step", "gamma", float("nan")),
    ("step", "milestones", []),
    ("step", "milestones", 0.5),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_a_wrong_setting_is_refused_with_its_key_and_value(name: str, field: str, value: object):
    with pytest.raises(UsageError) as caught:
        shipped(name, **{field: value})
    assert f"scheduler.{field}" in str(caught.value)
    assert repr(value).strip("[]") in str(caught.value)

"""The `trainer` group: its YAML, its ranges, and what its words mean."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny_problems import node_of

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.training.settings import TrainerSettings


def shipped(**changed: Any) -> TrainerSettings:
    return build({**node_of("trainer", "default"), **changed}, TrainerSettings, key="trainer")


def test_the_yaml_lists_every_setting_of_the_trainer():
    settings = node_of("trainer", "default")
    assert settings.pop("_target_") == f"{TrainerSettings.__module__}.TrainerSettings"
    fields = dataclasses.fields(TrainerSettings)
    assert set(settings) == {field.name for field in fields}
    assert all(field.default is dataclasses.MISSING for field in fields)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("64-true", torch.float64), ("bf16-mixed", torch.float32)],
)
def test_weights_are_kept_in_float32_or_better(precision: str, dtype: torch.dtype):
    assert shipped(precision=precision).dtype == dtype


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 0),
        ("member_fraction", 0.0),
        ("member_fraction", 1.01),
        ("precision", "16-mixed"),
        ("accelerator", "tpu"),
        ("executor", "map"),
        ("compile", "yes"),
        ("clip_norm", 0.0),
        ("steps_per_call", 0),
        ("checkpoint_every_s", -1),
        ("batch_norm_batches", 0),
    ],
)
def test_values_out_of_range_are_refused_by_the_key(name: str, value: Any):
    with pytest.raises(UsageError, match=rf"trainer\.{name}.*{value}"):
        shipped(**{name: value})

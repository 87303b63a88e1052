"""Every architecture has its YAML, every YAML its architecture, and each runs in a stack."""

import dataclasses
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import bdl_train.models
from bdl_train.build import resolve
from bdl_train.models import Architecture, architecture_from
from bdl_train.specs import InputSpec
from bdl_train.stack import StackedNetwork, build_stack, choose_executor

torch.set_num_threads(1)

FOLDER = Path(__file__).parents[2] / "conf" / "model"
# `module` is the choice whose class the user names.
CONFIGS = {path.stem: path for path in FOLDER.glob("*.yaml") if path.stem != "module"}

TABLE, IMAGE = InputSpec((4,), (1, 3)), InputSpec((1, 28, 28))
SMALLER: dict[str, dict[str, Any]] = {
    "resnet20": {"width": 4},
    "wide_resnet": {"depth": 10, "widen_factor": 1},
    "ft_transformer": {"width": 16, "ffn_width": 16},
}


def node(name: str) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(CONFIGS[name]))
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}


def test_every_architecture_has_a_config_and_every_config_an_architecture():
    modules = {module.name for module in pkgutil.iter_modules(bdl_train.models.__path__)}
    assert set(CONFIGS) == {name for name in modules if not name.startswith("_")}
    assert len(CONFIGS) >= 5


def test_the_config_of_any_module_leaves_its_target_to_the_user():
    cfg = OmegaConf.load(FOLDER / "module.yaml")
    assert list(cfg) == ["_target_"]
    assert OmegaConf.is_missing(cfg, "_target_")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_lists_every_setting_of_its_class_and_is_valid(name):
    cfg = node(name)
    assert cfg["_target_"].startswith(f"bdl_train.models.{name}.")
    cls = resolve(cfg["_target_"], Architecture, key="model")
    assert set(cfg) - {"_target_"} == {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING
    assert type(architecture_from(cfg)) is cls


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_runs_forward_and_backward_in_a_stack(name):
    architecture = architecture_from({**node(name), **SMALLER.get(name, {})})
    spec = IMAGE if architecture.takes == "image" else TABLE
    architecture.check(spec)
    template, stack = build_stack(lambda: architecture.network(spec, 3), [1, 2])
    x = torch.randn(4, *spec.shape)
    assert choose_executor(template, stack, x, "vmap")[0] == "vmap"
    for executor in ("vmap", "loop"):
        flat = stack.flat.clone().requires_grad_(True)
        network = StackedNetwork(template, executor)
        outputs, _ = network(stack.layout.unflatten(flat), stack.buffers, x, train=True, shared=True)
        assert outputs.shape == (2, 4, 3)
        (grad,) = torch.autograd.grad(outputs.square().sum(), flat)
        assert grad.isfinite().all()
        for key, value in stack.layout.unflatten(grad).items():
            assert value.any(), f"{key} of {name} changes no output"

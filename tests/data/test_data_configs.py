"""Every data source has its YAML, every YAML its source, and shared settings mean the same everywhere."""

import dataclasses
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import bdl_train.data
from bdl_train.build import resolve
from bdl_train.data import DataSource
from bdl_train.data._datamodule import DEFAULTS, Reading

FOLDER = Path(__file__).parents[2] / "conf" / "data"
# `datamodule` is the choice whose class the user names.
CONFIGS = {path.stem: path for path in FOLDER.glob("*.yaml") if path.stem != "datamodule"}


def test_every_source_has_a_config_and_every_config_a_source():
    modules = {module.name for module in pkgutil.iter_modules(bdl_train.data.__path__)}
    assert set(CONFIGS) == {name for name in modules if not name.startswith("_")}
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("name", CONFIGS)
def test_config_lists_every_setting_of_its_class(name: str):
    cfg = OmegaConf.load(CONFIGS[name])
    assert cfg._target_.startswith(f"bdl_train.data.{name}.")
    source: Any = resolve(cfg._target_, DataSource, key="data")
    fields = dataclasses.fields(source)
    assert set(cfg) - {"_target_"} == {field.name for field in fields}
    assert all(field.default is dataclasses.MISSING for field in fields)
    assert {"name", "batch_size"} <= set(cfg)


def test_config_of_any_data_module_agrees_with_the_reader():
    cfg: Any = OmegaConf.load(FOLDER / "datamodule.yaml")
    assert OmegaConf.is_missing(cfg, "_target_")
    assert set(cfg) - {"_target_"} == {field.name for field in dataclasses.fields(Reading)} - {"name"}
    assert {key: cfg[key] for key in DEFAULTS} == DEFAULTS

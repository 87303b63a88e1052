"""What the verbs that read a run share."""

from collections.abc import Mapping
from typing import Any

import torch
import yaml

from bdl_train.data import Data
from bdl_train.data._datamodule import source_from
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.training.problem import split_seed


def read_config(run: RunDir) -> dict[str, Any]:
    """The resolved config of a run. It is untrusted: targets are checked again when they are built."""
    try:
        stored = yaml.safe_load(run.config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{run.config} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise UsageError(f"{run.config} is damaged: expected a mapping, got {type(stored).__name__}.")
    return stored


def load_data(config: Mapping[str, Any]) -> Data:
    """The data set of a config."""
    node = dict(config["data"])
    root = node.pop("root")
    return source_from(node).load(root, split_seed(config))


def device_of(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu or gpu) names."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise UsageError(f"accelerator must be auto, cpu or gpu, got '{accelerator}'.")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UsageError("accelerator=gpu, but torch sees no GPU: use accelerator=cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")

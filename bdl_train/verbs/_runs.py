"""What the verbs that read a run share."""

from collections.abc import Mapping
from typing import Any

import torch
import yaml

from bdl_train.config import MASK, leaves
from bdl_train.data import Data, DataSource
from bdl_train.data._datamodule import source_from
from bdl_train.errors import UsageError
from bdl_train.files import sha256
from bdl_train.posteriors.artefact import Artefact, read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, read_json
from bdl_train.schema import Schema
from bdl_train.training.problem import split_seed


def read_config(run: RunDir) -> dict[str, Any]:
    """The resolved config of a run. It is untrusted: targets are checked again when they are built.

    Raises:
        UsageError: unreadable, incomplete, or changed since the run was finished.
    """
    try:
        stored = yaml.safe_load(run.config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{run.config} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise UsageError(f"{run.config} is damaged: expected a mapping, got {type(stored).__name__}.")
    schema = Schema.of("train")
    # A run from before `num_members=auto` has no budget, and no use for one.
    needed = schema.required() - {"resume", "allow", "budget"}
    absent = sorted(needed - set(stored))
    bad = sorted(
        key for key in needed & set(schema.groups) & set(stored) if not isinstance(stored[key], dict)
    )
    if absent or bad:
        what = (
            f"it lacks {', '.join(absent)}"
            if absent
            else f"{bad[0]} must be a mapping, got {stored[bad[0]]!r}"
        )
        raise UsageError(f"{run.config} is damaged: {what}.")
    if run.manifest.is_file():
        expected = read_manifest(run)["hashes"].get(run.config.name)
        if sha256(run.config) != expected:
            raise UsageError(
                f"{run.config} does not match the hash in {run.manifest.name}: it was changed after the run finished."
            )
    return stored


def read_manifest(run: RunDir) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        UsageError: missing or damaged.
    """
    manifest = read_json(run.manifest)
    try:
        _ = manifest["data"]["fingerprint"], manifest["hashes"].items(), manifest["status"]
        _ = [(member["id"], member["status"]) for member in manifest["members"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run.manifest} is damaged: {type(error).__name__} {error}.") from error
    return manifest


def open_artefact(run: RunDir) -> Artefact:
    """The posterior of a run, if it is the one that the manifest recorded.

    Raises:
        UsageError: missing, damaged, or changed after the run finished.
    """
    header = run.posterior / "posterior.json"
    if run.manifest.is_file() and header.is_file():
        expected = read_manifest(run)["hashes"].get("posterior/posterior.json")
        if sha256(header) != expected:
            raise UsageError(
                f"{header} does not match the hash in {run.manifest.name}: it was changed after the run finished."
            )
    return read_artefact(run.posterior)


def load_data(config: Mapping[str, Any]) -> Data:
    """The data set of a config."""
    source, root = source_of(config)
    return source.load(root, split_seed(config))


def source_of(config: Mapping[str, Any]) -> tuple[DataSource, str]:
    """Where the data of a config come from, and the folder of data sets."""
    node = dict(config["data"])
    root = node.pop("root", None)
    if not isinstance(root, str):
        raise UsageError(f"data.root must be the folder of the data sets, got {root!r}.")
    masked = [key for key, value in leaves(node, "data") if value == MASK]
    if masked:
        raise UsageError(
            f"{masked[0]} was masked when the run was stored: secrets are kept nowhere. Let "
            f"{node.get('_target_')} read it from the environment."
        )
    return source_from(node), root


def predictor_of(artefact: Artefact, accelerator: str, num_draws: int | None) -> Predictor:
    """A predictor on the device that `accelerator` (auto, cpu or gpu) names.

    Raises:
        UsageError: no such device, or more draws than the posterior holds.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UsageError("accelerator=gpu, but torch sees no GPU: use accelerator=cpu.")
    held = [one.num_atoms for one in artefact.posterior.members if one.num_atoms is not None]
    if num_draws is not None and held and num_draws > min(held):
        raise UsageError(
            f"num_draws={num_draws}, but this posterior holds {min(held)} weights a member and nothing to draw more "
            f"from: num_draws is at most {min(held)}."
        )
    use_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return Predictor(artefact, device="cuda" if use_gpu else "cpu", num_draws=num_draws)

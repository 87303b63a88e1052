"""The posterior on disk: `posterior.json` and safetensors files, checked by hash; nothing is unpickled."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from bdl_train.build import build, resolve
from bdl_train.data._table import TableTransform
from bdl_train.errors import UsageError
from bdl_train.files import sha256, write_bytes, write_json
from bdl_train.likelihoods import PREFIX, Likelihood
from bdl_train.models import Architecture, architecture_from
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.runs import read_json
from bdl_train.specs import InputSpec, TargetSpec
from bdl_train.stack import Layout

SCHEMA_VERSION = 1
ROWS_FILE, MEMBER_ROWS = "rows.safetensors", "member_rows"
"""Source rows: `train` and `val` `[N]`; `member_rows` `[M, N]` if each member has its own, as `members` lists them."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Artefact:
    """A posterior with everything needed to predict from raw inputs.

    Attributes:
        meta: `posterior.json` as read.
        posterior: The mixture over members.
        likelihood, inputs, target, transform: As in training.
        layout: Of the flat parameter vectors.
    """

    meta: dict[str, Any]
    posterior: EnsemblePosterior
    architecture: Architecture
    likelihood: Likelihood
    inputs: InputSpec
    target: TargetSpec
    transform: TableTransform | None
    layout: Layout

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.meta["dtype"]]

    def network(self) -> nn.Module:
        """A network of the architecture, in eval mode; its own weights mean nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = self.architecture.network(self.inputs, self.likelihood.num_outputs(self.target))
        return network.to(self.dtype).eval()

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            UsageError: weights or buffers of another architecture or likelihood.
        """
        network = self.network()
        stored = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        weights = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
        noise = {f"{PREFIX}{name}": () for name in self.likelihood.params()}
        if stored != {**weights, **noise}:
            raise UsageError(
                "posterior.json describes another architecture or likelihood than the stored weights: it is damaged."
            )
        expected = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in network.named_buffers()}
        for index, member in zip(self.posterior.ids, self.posterior.members, strict=True):
            flat, buffers = next(member.draw(1, 0))
            found = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}
            if flat.shape != (self.layout.num_params,) or flat.dtype != self.dtype or found != expected:
                raise UsageError(
                    f"Member {index} holds {list(flat.shape)} parameters of {flat.dtype} and the buffers "
                    f"{sorted(found)}, its network has {self.layout.num_params} of {self.dtype} and "
                    f"{sorted(expected)}: the posterior is damaged."
                )


def write_member(folder: Path, member: int, posterior: MemberPosterior) -> dict[str, Any]:
    """Write one member's tensors; returns its entry for `posterior.json`. Writing again gives the same file."""
    file = f"member-{member:05d}.safetensors"
    write_bytes(
        folder / file, save({name: t.detach().cpu().contiguous() for name, t in posterior.tensors().items()})
    )
    cls = type(posterior)
    return {"file": file, "sha256": sha256(folder / file), "_target_": f"{cls.__module__}.{cls.__qualname__}"}


def write_tensors(folder: Path, file: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write a side file; returns its entry for `files` in `posterior.json`."""
    write_bytes(folder / file, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return {"sha256": sha256(folder / file)}


def write_moments(folder: Path, posterior: EnsemblePosterior) -> dict[str, str]:
    """Write mean and variance over each member's draws, `[M, P]`: what `prior=from_posterior` reads."""
    moments = [member.moments() for member in posterior.members]
    mean, var = torch.stack([mean for mean, _ in moments]), torch.stack([var for _, var in moments])
    return write_tensors(folder, "moments.safetensors", {"mean": mean, "var": var})


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write `posterior.json`; after this call the artefact is whole."""
    write_json(folder / "posterior.json", {"schema_version": SCHEMA_VERSION, **meta})


def read_artefact(folder: Path) -> Artefact:
    """Load and check an artefact.

    Raises:
        UsageError: missing, damaged or tampered with, of an unknown schema version, or naming classes outside the
            allow-list.
    """
    meta = read_json(folder / "posterior.json")
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{folder / 'posterior.json'} has schema version {version!r}, this bdl_train reads {SCHEMA_VERSION}."
        )
    with _damaged(folder):
        layout = Layout(
            tuple(meta["layout"]["names"]), tuple(tuple(shape) for shape in meta["layout"]["shapes"])
        )
        artefact = Artefact(
            meta=meta,
            posterior=read_members(folder, meta),
            architecture=architecture_from(meta["architecture"]),
            likelihood=build(meta["likelihood"], Likelihood, key="likelihood"),
            inputs=InputSpec.from_json(meta["inputs"]),
            target=_read_target(meta["target"]),
            transform=None if meta["transform"] is None else TableTransform.from_json(meta["transform"]),
            layout=layout,
        )
        artefact.likelihood.check(artefact.target)
        artefact.check()
    return artefact


def _read_target(stored: dict[str, Any]) -> TargetSpec:
    target = TargetSpec.from_json(stored)
    if not (math.isfinite(target.loc) and math.isfinite(target.scale) and target.scale > 0):
        raise ValueError(f"its target has loc {target.loc} and scale {target.scale}.")
    return target


def read_members(folder: Path, meta: Mapping[str, Any]) -> EnsemblePosterior:
    """The finished members that `meta` lists, each checked by hash and shape.

    Raises:
        UsageError: none, one listed twice, or one that is missing or damaged.
    """
    num_params = sum(math.prod(shape) for shape in meta["layout"]["shapes"])
    entries = [entry for entry in meta["members"] if entry["status"] == "done"]
    ids = [int(entry["id"]) for entry in entries]
    if not entries:
        raise UsageError(f"{folder} holds no finished member.")
    if len(set(ids)) < len(ids) or int(meta["num_draws"]) < 1:
        raise UsageError(
            f"{folder / 'posterior.json'} is damaged: members {ids}, num_draws {meta['num_draws']}."
        )
    members = [_read_member(folder, entry, num_params) for entry in entries]
    return EnsemblePosterior(ids, members, int(meta["num_draws"]), int(meta["draw_seed"]))


def read_checked(folder: Path, file: str, expected_sha256: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file inside `folder`, if its hash is the recorded one."""
    path = folder / file
    if path.parent != folder or not path.is_file():
        raise UsageError(f"{path} is missing: the posterior is damaged.")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected_sha256:
        raise UsageError(
            f"{path} does not match its recorded SHA-256: it was changed or is damaged. It is not loaded."
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise UsageError(f"{path} is no safetensors file: {error}.") from error


def training_rows(folder: Path, meta: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """The rows that each finished member was trained on, by member id: positions in the source, `[N]` int64 each.

    Args:
        folder: Of the artefact.
        meta: Its `posterior.json`. A member's `train_rows` is `train`, the whole train part, or `member_rows`, its own
            row of that tensor (`trainer.member_fraction` below 1).

    Raises:
        UsageError: not recorded, damaged, or changed since they were written.
    """
    entry = meta.get("files", {}).get(ROWS_FILE)
    if entry is None:
        raise UsageError(
            f"{folder} has not recorded which rows its members were trained on: it has no {ROWS_FILE}."
        )
    with _damaged(folder):
        stored = {name: ids.numpy() for name, ids in read_checked(folder, ROWS_FILE, entry["sha256"]).items()}
        own, found = stored.get(MEMBER_ROWS), {}
        if own is not None and len(own) != len(meta["members"]):
            raise ValueError(f"{MEMBER_ROWS} has {len(own)} rows for {len(meta['members'])} members")
        for place, member in enumerate(meta["members"]):
            if member["status"] == "done":
                ids = stored[member["train_rows"]]
                found[int(member["id"])] = ids[place] if member["train_rows"] == MEMBER_ROWS else ids
    return found


def _read_member(folder: Path, entry: Mapping[str, Any], num_params: int) -> MemberPosterior:
    cls = resolve(entry["_target_"], MemberPosterior, key=f"members[{entry['id']}]")
    member = cls.from_tensors(read_checked(folder, entry["file"], entry["sha256"]))
    if member.num_params != num_params:
        raise UsageError(
            f"{folder / entry['file']} holds {member.num_params} parameters, the architecture has {num_params}."
        )
    return member


@contextmanager
def _damaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except (
        Exception
    ) as error:  # the file may come from anywhere, and so may the errors that its values provoke
        raise UsageError(
            f"{folder / 'posterior.json'} is damaged: {type(error).__name__} {error}."
        ) from error

"""Any LightningDataModule as a data source: its loaders are read once into arrays."""

import inspect
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field

from bdl_train.build import build, resolve, settings_of
from bdl_train.data import Data, DataSource, Part, cut_validation, encode_target, fit_target
from bdl_train.data._pixels import pixel_statistics
from bdl_train.errors import UsageError
from bdl_train.specs import InputSpec, TargetKind

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

log = logging.getLogger(__name__)

DEFAULTS = {"val_fraction": 0.1, "max_in_memory_gib": 8}
"""For a node written by hand; `conf/data/datamodule.yaml` says the same."""

_PROGRESS_S = 10


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a data module is read.

    Attributes:
        name: Of the data set; null = the module's class.
        batch_size: Examples per member and step; the loaders' own batches only matter while reading.
        val_fraction: Share of the training rows for validation, for a module without a validation loader.
        max_in_memory_gib: GiB that the arrays may take.
    """

    name: str | None
    batch_size: Annotated[int, Field(ge=1)]
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    max_in_memory_gib: Annotated[float, Field(gt=0)]


def source_from(node: Mapping[str, Any]) -> DataSource:
    """The data source that a resolved `data` node describes: a shipped one, or any LightningDataModule.

    Args:
        node: A plain mapping with `_target_` and settings; its key `root` is for `load` and is ignored here.

    Raises:
        UsageError: no `_target_`, one outside the allow-list or of another kind, or a bad setting.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UsageError(f"data must be a mapping with a '_target_', got {node!r}.")
    node = {key: value for key, value in node.items() if key != "root"}
    if str(node["_target_"]).startswith("bdl_train."):  # without importing Lightning, which takes seconds
        return build(node, DataSource, key="data")
    from pytorch_lightning import LightningDataModule

    cls = resolve(node["_target_"], (DataSource, LightningDataModule), key="data")
    return build(node, DataSource, key="data") if issubclass(cls, DataSource) else DataModuleSource(node)


class DataModuleSource(DataSource):
    """Reads a LightningDataModule: `prepare_data`, `setup("fit")`, `setup("test")`, then each loader once.

    Batches are pairs (x, y). Integer y are classes, floating y are continuous and are standardised with
    train-part statistics; x is the module's own business and stays as it is, uint8 images `[C, H, W]`
    excepted, which get pixel statistics of the train part. Random transforms of the module's data set are
    frozen at their first draw.

    Args:
        node: The module's `_target_` and its arguments, and the keys of `Reading`. Those are passed on to the
            module too if it has an argument of that name.
    """

    def __init__(self, node: Mapping[str, Any]) -> None:
        from pytorch_lightning import LightningDataModule

        cls = resolve(node["_target_"], LightningDataModule, key="data")
        keys = list(Reading.__dataclass_fields__)
        given = {"name": None, **DEFAULTS, **{key: node[key] for key in keys if key in node}}
        self.reading = settings_of(Reading, given, key="data")
        self.batch_size = self.reading.batch_size
        own = inspect.signature(cls.__init__).parameters
        self.name = self.reading.name or cls.__name__
        self._node = {key: value for key, value in node.items() if key not in keys or key in own}

    def load(self, root: str, seed: int) -> Data:
        from pytorch_lightning import LightningDataModule

        # Loaders shuffle and augment with the global generator: rows come in the same order for the same
        # seed.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = build(self._node, LightningDataModule, key="data")
            module.prepare_data()
            module.setup("fit")
            arrays = {"train": self._read(_loader(module, "train"), "train", {})}
            if (val_loader := _loader(module, "val")) is not None:
                arrays["val"] = self._read(val_loader, "val", arrays)
            module.setup("test")
            arrays["test"] = self._read(_loader(module, "test"), "test", arrays)
        return self._data(arrays, seed)

    def _read(
        self, loader: Any, part: str, before: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """All batches of one loader; `before` holds the parts in memory already."""
        if loader is None:
            raise UsageError(f"data._target_: {self.name} has no {part}_dataloader, which is needed.")
        if isinstance(loader, Mapping | list | tuple) or not isinstance(loader, Iterable):
            raise UsageError(
                f"data._target_: {self.name}.{part}_dataloader() must return one loader, "
                f"got {type(loader).__name__}."
            )
        in_memory = sum(array.nbytes for pair in before.values() for array in pair)
        xs, ys, num_rows, told = [], [], 0, time.monotonic()
        for batch in loader:
            x, y = _pair(batch, f"{self.name}.{part}_dataloader()")
            if xs and (x.shape[1:] != xs[0].shape[1:] or x.dtype != xs[0].dtype or y.dtype != ys[0].dtype):
                raise UsageError(
                    f"data._target_: {self.name}.{part}_dataloader() gives batches of {x.dtype} "
                    f"{list(x.shape[1:])} after {xs[0].dtype} {list(xs[0].shape[1:])}: all must be alike."
                )
            xs.append(x)
            ys.append(y)
            num_rows += len(y)
            in_memory += x.nbytes + y.nbytes
            if in_memory > self.reading.max_in_memory_gib * 2**30:
                raise UsageError(
                    f"{self.name} holds more than data.max_in_memory_gib={self.reading.max_in_memory_gib:g} "
                    f"GiB ({num_rows} rows of the {part} part read so far): raise it or let the module give "
                    "fewer rows."
                )
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                log.info("Reading %s: %d rows of the %s part so far", self.name, num_rows, part)
        if num_rows == 0:
            raise UsageError(f"data._target_: {self.name}.{part}_dataloader() gave no rows.")
        num_declared = _num_declared(loader)
        if num_declared is not None and num_declared != num_rows:
            log.warning(
                "%s.%s_dataloader() gave %d of its data set's %d rows (drop_last or a sampler?)",
                self.name, part, num_rows, num_declared,
            )  # fmt: skip
        log.info("Read %s: %d rows of the %s part", self.name, num_rows, part)
        return np.concatenate(xs), np.concatenate(ys)

    def _data(self, arrays: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> Data:
        x, y = arrays["train"]
        for part, (other_x, other_y) in arrays.items():
            if other_x.shape[1:] != x.shape[1:] or other_x.dtype != x.dtype or other_y.dtype != y.dtype:
                raise UsageError(
                    f"data._target_: {self.name} gives x {x.dtype} {list(x.shape[1:])} and y {y.dtype} for "
                    f"training, but x {other_x.dtype} {list(other_x.shape[1:])} and y {other_y.dtype} for "
                    f"the {part} part."
                )
        labels = np.concatenate([pair[1] for pair in arrays.values()])
        kind = TargetKind.CLASS if np.issubdtype(y.dtype, np.integer) else TargetKind.CONTINUOUS
        classes = (
            tuple(str(label) for label in range(int(labels.max()) + 1)) if kind is TargetKind.CLASS else ()
        )
        # Positions in the order of reading: train first, then val, then test.
        start = np.cumsum([0, *(len(pair[1]) for pair in arrays.values())])
        rows = {part: np.arange(len(arrays[part][1])) + start[i] for i, part in enumerate(arrays)}
        chosen = {part: np.arange(len(arrays[part][1])) for part in arrays}
        if "val" not in arrays:
            chosen["train"], chosen["val"] = cut_validation(rows["train"], self.reading.val_fraction, seed)
            arrays, rows = {**arrays, "val": arrays["train"]}, {**rows, "val": rows["train"]}
        target = fit_target(labels, chosen["train"], kind, "target", classes)
        parts = {
            part: Part(
                arrays[part][0][chosen[part]],
                encode_target(arrays[part][1][chosen[part]], target),
                rows[part][chosen[part]].astype(np.int64),
            )
            for part in ("train", "val", "test")
        }
        return Data(
            name=self.name,
            inputs=_inputs(parts["train"].x),
            target=target,
            train=parts["train"],
            val=parts["val"],
            test=parts["test"],
        )


def _inputs(x: np.ndarray) -> InputSpec:
    shape = x.shape[1:]
    if x.dtype == np.uint8:
        mean, std = pixel_statistics(x)
        return InputSpec(shape, pixel_mean=mean, pixel_std=std)
    if len(shape) == 1:
        return InputSpec(shape, (1,) * shape[0], tuple(f"x{i}" for i in range(shape[0])))
    return InputSpec(shape)


def _pair(batch: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch as x `[B, *shape]`, uint8 images or float32, and y `[B]`, int64 or float64."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise UsageError(f"data._target_: {where} must give pairs (x, y), got {type(batch).__name__}{size}.")
    try:
        x, y = (torch.as_tensor(one).detach().cpu() for one in batch)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"data._target_: {where} must give tensors x and y: {error}.") from error
    y = y.squeeze(-1) if y.ndim == 2 and y.shape[-1] == 1 else y
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise UsageError(
            f"data._target_: {where} must give x [batch, ...] and y [batch], got {list(x.shape)} and "
            f"{list(y.shape)}."
        )
    if not (x.dtype == torch.uint8 and x.ndim == 4):
        x = x.to(torch.float32)
        if not x.isfinite().all():
            raise UsageError(f"data._target_: {where} gives NaN or infinite inputs.")
    return x.numpy(), y.to(torch.float64 if y.is_floating_point() else torch.int64).numpy()


def _loader(module: "LightningDataModule", part: str) -> Any:
    """What the module returns for a part; None without a method of its own (Lightning's only raises)."""
    from pytorch_lightning import LightningDataModule

    name = f"{part}_dataloader"
    if getattr(type(module), name) is getattr(LightningDataModule, name):
        return None
    loader = getattr(module, name)()
    return None if isinstance(loader, list | tuple) and len(loader) == 0 else loader


def _num_declared(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):  # no such attribute, or a stream without a length
        return None

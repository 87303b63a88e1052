"""Image classification from npz files, with pixels or with the bytes of JPEG files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from bdl_train.data import Data, DataSource, Part, cut_validation, encode_target, fit_target
from bdl_train.data._files import find_file, load_npz
from bdl_train.data._pixels import channels_first, decode_jpegs, pixel_statistics
from bdl_train.errors import UsageError, unknown_choice
from bdl_train.specs import InputSpec, TargetKind


@dataclass(frozen=True, kw_only=True)
class Images(DataSource):
    """Images of one size, from `<root>/images` or from a file of one's own; they stay uint8 `[N, C, H, W]`.

    `<name>.npz` holds `x_train`, `y_train`, `x_test`, `y_test` and perhaps `classes`; or `x` and `y` only,
    which is then a test part for other runs' out-of-distribution data: its train part is empty
    (`Data.require_train`) and its pixel statistics are missing, because the run that is evaluated has its
    own. A pair `<name>_train*.npz`, `<name>_test*.npz` holds one part each. In place of `x` a file of one
    part may have `jpeg_bytes` and `offsets`: image i is `jpeg_bytes[offsets[i]:offsets[i + 1]]`.

    Attributes:
        name: File name without `.npz`, or the common beginning of the pair.
        path: A file elsewhere; null = by `name`.
        max_train: Random choice of at most so many training images, before the validation part is cut; null =
            all.
        augment: `flip_crop` shifts and mirrors training images at random (`_augment.py`).
        val_fraction: Share of the training images for validation.
        batch_size: Examples per member and step.
    """

    name: str
    path: str | None
    max_train: Annotated[int, Field(ge=1)] | None
    augment: Literal["none", "flip_crop"]
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    batch_size: Annotated[int, Field(ge=1)]

    def load(self, root: str, seed: int) -> Data:
        parts, classes = _read(self._files(root))
        train, test = parts["train"], parts["test"]
        labels = np.concatenate([train.y, test.y])
        target = fit_target(labels, np.arange(0), TargetKind.CLASS, "class", classes)
        rows = np.arange(len(train.y))
        if self.max_train is not None and self.max_train < len(rows):
            rows = np.sort(np.random.default_rng(seed).permutation(len(rows))[: self.max_train])
        train_rows, val_rows = cut_validation(rows, self.val_fraction, seed) if len(rows) else (rows, rows)
        test_x = test.images(np.arange(len(test.y)))
        shape = test_x.shape[1:]
        fitted = {}
        for part, chosen in (("train", train_rows), ("val", val_rows)):
            x = train.images(chosen) if len(chosen) else np.empty((0, *shape), np.uint8)
            if x.shape[1:] != shape:
                raise UsageError(
                    f"Training images are {list(x.shape[1:])}, test images {list(shape)}: not one set."
                )
            fitted[part] = Part(x, encode_target(train.y[chosen], target), chosen.astype(np.int64))
        mean, std = pixel_statistics(fitted["train"].x) if len(train_rows) else ((), ())
        return Data(
            name=self.name if self.path is None else Path(self.path).stem,
            inputs=InputSpec(shape, pixel_mean=mean, pixel_std=std),
            target=target,
            train=fitted["train"],
            val=fitted["val"],
            test=Part(test_x, encode_target(test.y, target), np.arange(len(test.y)) + len(train.y)),
            augment=self.augment,
            notes={"augmentation": self.augment},
        )

    def _files(self, root: str) -> dict[str, Path]:
        """Files by the part they hold; `both` for one file of both parts."""
        if self.path is not None:
            return {"both": find_file(self.path, root, key="data.path")}
        folder = Path(root) / "images"
        single = folder / f"{self.name}.npz"
        if single.is_file():
            return {"both": single}
        found = {part: sorted(folder.glob(f"{self.name}_{part}*.npz")) for part in ("train", "test")}
        if all(len(paths) == 1 for paths in found.values()):
            return {part: paths[0] for part, paths in found.items()}
        names = {path.stem for path in folder.glob("*.npz")}
        pairs = {stem.rpartition("_train")[0] for stem in names if "_train" in stem}
        choices = pairs | {stem for stem in names if not any(stem.startswith(f"{pair}_") for pair in pairs)}
        if choices:
            raise UsageError(unknown_choice("data.name", self.name, choices))
        raise UsageError(
            f"{single} does not exist. Point data.root (or the environment variable BDL_DATA_ROOT) at the "
            "folder that holds images/<name>.npz, or set data.path."
        )


def read_images(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The test images of a file, or all if it has one part: `[N, C, H, W]` uint8, labels `[N]`, names of the classes.

    Raises:
        UsageError: unreadable, or without images and labels.
    """
    stored, classes = _read({"both": path})
    test = stored["test"]
    return test.images(np.arange(len(test.y))), test.y, classes


@dataclass(frozen=True)
class _Stored:
    """The images of one part as the file has them, and their labels `[N]`."""

    arrays: Mapping[str, np.ndarray]
    y: np.ndarray
    where: str

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Some rows as `[N, C, H, W]` uint8; only they are decoded."""
        if "x" in self.arrays:
            pixels = self.arrays["x"]
            # A slice of all rows is no copy of the whole set.
            return channels_first(pixels if len(rows) == len(pixels) else pixels[rows], self.where)
        return channels_first(
            decode_jpegs(self.arrays["jpeg_bytes"], self.arrays["offsets"], rows), self.where
        )


def _read(files: dict[str, Path]) -> tuple[dict[str, _Stored], tuple[str, ...]]:
    """The stored train and test part, and the names of the classes."""
    stored, classes = {}, ()
    for part, path in files.items():
        arrays = load_npz(path)
        if part == "both" and "x_train" in arrays:
            stored["train"], stored["test"] = (_part(arrays, f"_{one}", path) for one in ("train", "test"))
        elif part == "both":
            stored["test"] = _part(arrays, "_test" if "x_test" in arrays else "", path)
        else:
            stored[part] = _part(arrays, "", path)
        classes = classes or tuple(str(name) for name in arrays.get("classes", ()))
    empty = _Stored({"x": np.empty((0, 1, 1), np.uint8)}, np.empty(0, np.int64), "")
    stored.setdefault("train", empty)
    largest = max((int(part.y.max()) for part in stored.values() if len(part.y)), default=0)
    return stored, classes or tuple(str(label) for label in range(largest + 1))


def _part(arrays: Mapping[str, np.ndarray], suffix: str, path: Path) -> _Stored:
    x, y = f"x{suffix}", f"y{suffix}"
    kinds = [[x], ["jpeg_bytes", "offsets"]] if suffix == "" else [[x]]
    kind = next((keys for keys in kinds if all(key in arrays for key in keys)), None)
    if kind is None or y not in arrays:
        expected = " or ".join(" + ".join([*keys, y]) for keys in kinds)
        raise UsageError(f"{path} must hold {expected}, it has: {', '.join(arrays) or 'nothing'}.")
    labels = arrays[y].reshape(-1)
    num_images = len(arrays[x]) if kind == [x] else len(arrays["offsets"]) - 1
    if len(labels) != num_images or num_images == 0:
        raise UsageError(f"{path} has {num_images} images in {kind[0]} and {len(labels)} labels in {y}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{path}: {y} must hold whole numbers 0, 1, ..., got {labels.dtype}.")
    if kind != [x] and (np.diff(arrays["offsets"].astype(np.int64)) <= 0).any():
        raise UsageError(f"{path}: offsets must increase from image to image.")
    key = x if kind == [x] else "jpeg_bytes"
    return _Stored(
        {"x": arrays[x]} if kind == [x] else {name: arrays[name] for name in kind},
        labels.astype(np.int64),
        f"{path} {key}",
    )

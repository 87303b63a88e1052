"""Image sets: layouts, decoding, pixel statistics, splits, and files that are wrong."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bdl_train.data import Data
from bdl_train.data._datamodule import source_from
from bdl_train.data._pixels import channels_first, decode_jpegs, pixel_statistics
from bdl_train.errors import UsageError

torch.set_num_threads(1)

SETTINGS: dict[str, Any] = {
    "_target_": "bdl_train.data.images.Images", "name": "toy", "path": None, "max_train": None,
    "augment": "none", "val_fraction": 0.2, "batch_size": 8,
}  # fmt: skip


def load(root: str | Path, *, seed: int = 0, **changed: Any) -> Data:
    return source_from({**SETTINGS, **changed}).load(str(root), seed)


def toy_arrays(shape: tuple[int, ...] = (6, 5)) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 200, (50, *shape), dtype=np.uint8),
        "y_train": np.arange(50, dtype=np.uint8) % 3,
        "x_test": random.integers(0, 256, (12, *shape), dtype=np.uint8),
        "y_test": np.arange(12, dtype=np.uint8) % 3,
    }


def store(root: Path, name: str, **arrays: Any) -> Path:
    (root / "images").mkdir(exist_ok=True)
    path = root / "images" / f"{name}.npz"
    np.savez(path, allow_pickle=True, **arrays)
    return path


def jpegs(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.uint32)
    return {"jpeg_bytes": np.frombuffer(b"".join(encoded), np.uint8), "offsets": offsets}


def test_pixels_stay_uint8_and_statistics_come_from_the_training_part(tmp_path: Path):
    arrays = toy_arrays()
    store(tmp_path, "toy", **arrays, classes=np.array(["cat", "dog", "owl"]))
    data = load(tmp_path)
    assert data.inputs.shape == (1, 6, 5)
    assert data.inputs.is_image
    assert data.target.classes == ("cat", "dog", "owl")
    assert [len(part) for part in (data.train, data.val, data.test)] == [40, 10, 12]
    for part, x, y in ((data.train, "x_train", "y_train"), (data.val, "x_train", "y_train")):
        assert part.x.dtype == np.uint8
        np.testing.assert_array_equal(part.x[:, 0], arrays[x][part.rows])
        np.testing.assert_array_equal(part.y, arrays[y][part.rows])
    np.testing.assert_array_equal(data.test.x[:, 0], arrays["x_test"])
    np.testing.assert_array_equal(data.test.rows, np.arange(50, 62))
    assert len(np.intersect1d(data.train.rows, data.val.rows)) == 0
    pixels = data.inputs.prepare(torch.from_numpy(data.train.x), torch.float64)
    assert pixels.mean().item() == pytest.approx(0, abs=1e-12)
    assert pixels.std(correction=0).item() == pytest.approx(1, abs=1e-12)


def test_test_images_change_nothing_in_the_training_part(tmp_path: Path):
    store(tmp_path, "one", **toy_arrays())
    store(tmp_path, "other", **{**toy_arrays(), "x_test": np.full((12, 6, 5), 255, np.uint8)})
    one, other = load(tmp_path, name="one"), load(tmp_path, name="other")
    assert one.inputs == other.inputs
    np.testing.assert_array_equal(one.train.x, other.train.x)


def test_statistics_of_colour_images_are_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), dtype=np.uint8)
    images[:, 2] = 9
    mean, std = pixel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1.0


def test_every_layout_becomes_channels_first():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 5), dtype=np.uint8)
    np.testing.assert_array_equal(channels_first(images, "x"), images)
    np.testing.assert_array_equal(channels_first(images.transpose(0, 2, 3, 1), "x"), images)
    np.testing.assert_array_equal(channels_first(images[:, 0], "x"), images[:, :1])
    with pytest.raises(UsageError, match=r"x must be \[N, H, W\].* got \[2, 5, 6, 5\]"):
        channels_first(np.zeros((2, 5, 6, 5), np.uint8), "x")
    with pytest.raises(UsageError, match=r"x must hold uint8 pixels 0\.\.255, got float64"):
        channels_first(np.zeros((2, 6, 5)), "x")


def test_max_train_chooses_at_random_before_the_validation_cut(tmp_path: Path):
    store(tmp_path, "toy", **toy_arrays())
    data = load(tmp_path, max_train=20)
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 4, 12]
    chosen = np.union1d(data.train.rows, data.val.rows)
    assert not np.array_equal(chosen, np.arange(20))
    other = load(tmp_path, max_train=20, seed=1)
    assert not np.array_equal(chosen, np.union1d(other.train.rows, other.val.rows))
    assert len(load(tmp_path, max_train=1000).train) == 40


def test_augmentation_is_recorded(tmp_path: Path):
    store(tmp_path, "toy", **toy_arrays())
    assert load(tmp_path).augment == "none"
    data = load(tmp_path, augment="flip_crop")
    assert data.augment == "flip_crop"
    assert data.notes == {"augmentation": "flip_crop"}
    with pytest.raises(UsageError, match=r"data\.augment: input should be 'none' or 'flip_crop', got 'crop'"):
        load(tmp_path, augment="crop")


def test_pair_of_jpeg_files_is_decoded_in_the_order_asked_for(tmp_path: Path):
    # Smooth grey images, which JPEG keeps to a few levels.
    ramp = np.add.outer(np.arange(16), 2 * np.arange(16))
    images = [np.repeat((ramp + 10 * i)[..., None], 3, axis=-1).astype(np.uint8) for i in range(20)]
    store(tmp_path, "photos_train20", **jpegs(images), y=np.arange(20) % 2, classes=np.array(["a", "b"]))
    store(tmp_path, "photos_test4", **jpegs(images[:4]), y=np.array([0, 1, 0, 1]))
    data = load(tmp_path, name="photos")
    assert data.inputs.shape == (3, 16, 16)
    assert data.target.classes == ("a", "b")
    for part in (data.train, data.val):
        expected = np.stack([images[row] for row in part.rows]).transpose(0, 3, 1, 2)
        assert np.abs(part.x.astype(int) - expected).max() <= 4
        np.testing.assert_array_equal(part.y, part.rows % 2)
    rows = np.array([3, 0, 1])
    stored = jpegs(images[:4])
    decoded = decode_jpegs(stored["jpeg_bytes"], stored["offsets"], rows)
    assert decoded.shape == (3, 16, 16, 3)
    np.testing.assert_allclose(decoded[..., 0].mean((1, 2)), [52.5, 22.5, 32.5], atol=1)


def test_bytes_that_are_no_image_are_named(tmp_path: Path):
    stored = jpegs([np.zeros((8, 8, 3), np.uint8)] * 3)
    broken = stored["jpeg_bytes"].copy()
    broken[stored["offsets"][1] :][:50] = 0
    with pytest.raises(UsageError, match="Image 1 cannot be decoded"):
        decode_jpegs(broken, stored["offsets"], np.arange(3))
    mixed = jpegs([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)])
    with pytest.raises(UsageError, match=r"image 0 is \[8, 8\], image 1 is \[8, 9\]"):
        decode_jpegs(mixed["jpeg_bytes"], mixed["offsets"], np.arange(2))


def test_file_with_a_test_part_only_loads_but_cannot_be_trained_on(tmp_path: Path):
    arrays = toy_arrays()
    store(tmp_path, "ood", x=arrays["x_test"], y=arrays["y_test"])
    data = load(tmp_path, name="ood")
    assert [len(part) for part in (data.train, data.val, data.test)] == [0, 0, 12]
    assert data.train.x.shape == (0, 1, 6, 5)
    assert data.inputs.pixel_mean == ()
    assert data.target.classes == ("0", "1", "2")
    with pytest.raises(UsageError, match=r"data\.name=ood has a test part only \(12 rows\)"):
        data.require_train()


def test_any_npz_by_path(tmp_path: Path):
    np.savez(tmp_path / "mine.npz", allow_pickle=False, **toy_arrays((3, 6, 5)))
    data = load("nowhere", path=str(tmp_path / "mine.npz"))
    assert data.name == "mine"
    assert data.inputs.shape == (3, 6, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_train": np.full(50, 3, np.uint8)}, r"labels 0\.\.3, expected 0\.\.2"),
        ({"y_train": np.zeros(49, np.uint8)}, "has 50 images in x_train and 49 labels in y_train"),
        ({"y_train": np.zeros(50)}, "y_train must hold whole numbers 0, 1, ..., got float64"),
        ({"x_train": np.zeros((50, 7, 5), np.uint8)}, r"images are \[1, 7, 5\], test images \[1, 6, 5\]"),
        ({"x_train": np.zeros((50, 6, 5))}, "x_train must hold uint8 pixels"),
        ({"x_test": None}, r"cannot be read as an npz file of plain arrays"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, changed: dict[str, Any], message: str):
    store(tmp_path, "toy", **{**toy_arrays(), "classes": np.array(["a", "b", "c"]), **changed})
    with pytest.raises(UsageError, match=message):
        load(tmp_path)


def test_missing_files_and_keys_are_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"toy\.npz does not exist\. Point data\.root"):
        load(tmp_path)
    arrays = toy_arrays()
    store(tmp_path, "toy", x_train=arrays["x_train"], y_train=arrays["y_train"])
    with pytest.raises(UsageError, match=r"must hold x_test \+ y_test, it has: x_train, y_train"):
        load(tmp_path)
    store(tmp_path, "photos_train", **jpegs([np.zeros((8, 8, 3), np.uint8)]), y=np.zeros(1, int))
    store(tmp_path, "photos_test", **jpegs([np.zeros((8, 8, 3), np.uint8)]), y=np.zeros(1, int))
    with pytest.raises(UsageError, match=r"'photo'\. Did you mean 'photos'\?.*: photos, toy\."):
        load(tmp_path, name="photo")
    (tmp_path / "images" / "toy.npz").write_bytes(b"no npz")
    with pytest.raises(UsageError, match=r"toy\.npz cannot be read as an npz file"):
        load(tmp_path)


@pytest.mark.shared_data
def test_fashion_mnist_and_the_mnist_test_part(data_root: str):
    data = load(data_root, name="fashion_mnist", max_train=2000)
    assert data.inputs.shape == (1, 28, 28)
    assert len(data.test) == 10_000
    assert data.target.classes[0] == "T-shirt/top"
    assert data.inputs.pixel_mean[0] == pytest.approx(0.286, abs=0.01)
    ood = load(data_root, name="mnist_test")
    assert (len(ood.train), len(ood.test)) == (0, 10_000)
    assert ood.inputs.shape == data.inputs.shape
    with pytest.raises(UsageError, match="test part only"):
        ood.require_train()


@pytest.mark.shared_data
def test_cifar_is_decoded(data_root: str):
    data = load(data_root, name="cifar10_jpeg", max_train=300, val_fraction=0.0)
    assert data.inputs.shape == (3, 32, 32)
    assert (len(data.train), len(data.test)) == (300, 2000)
    assert data.target.classes[:2] == ("airplane", "automobile")
    np.testing.assert_allclose(data.inputs.pixel_mean, (0.4926, 0.4825, 0.4477), atol=0.03)
    np.testing.assert_allclose(data.inputs.pixel_std, (0.2461, 0.2438, 0.2616), atol=0.03)
    with np.load(Path(data_root) / "images" / "cifar10_jpeg_train10k.npz", allow_pickle=False) as stored:
        row = int(data.train.rows[7])
        raw = stored["jpeg_bytes"][stored["offsets"][row] : stored["offsets"][row + 1]].tobytes()
        label = stored["y"][row]
    image = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    np.testing.assert_array_equal(data.train.x[7], image.transpose(2, 0, 1))
    assert data.train.y[7] == label

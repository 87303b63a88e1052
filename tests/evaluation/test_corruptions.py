"""Image corruptions: what each does to images for which it can be worked out, and what all of them promise."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from bdl_train.errors import UsageError
from bdl_train.evaluation import corruptions
from bdl_train.evaluation._image_filters import convolve, disc, gaussian, lines, plasma, zoom
from bdl_train.evaluation.corruptions import CORRUPTIONS, SEVERITIES

NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
WITHOUT_CHANCE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def scenes(count: int, channels: int, height: int, width: int) -> np.ndarray:
    """Smooth fields with a bright box: edges, flat parts, all grey levels."""
    random = np.random.default_rng(5)
    field = random.standard_normal((count, channels, height, width))
    field = ndimage.gaussian_filter(field, (0, 0.5, height / 12, width / 12))
    field = 0.45 + 0.16 * field / field.std()
    for image in field:
        top, left = random.integers(height // 2), random.integers(width // 2)
        image[:, top : top + height // 3, left : left + width // 3] += 0.35
    return (np.clip(field, 0, 1) * 255).round().astype(np.uint8)


def grey(level: int, count: int = 40, channels: int = 3) -> np.ndarray:
    return np.full((count, channels, 32, 32), level, np.uint8)


def changed(name: str, images: np.ndarray, severity: int, seed: int = 0) -> np.ndarray:
    return CORRUPTIONS[name](images, severity, np.random.default_rng(seed))


# --- what all of them promise ------------------------------------------------------------------------------------


def test_there_are_the_fifteen_kinds():
    assert len(CORRUPTIONS) == 15
    assert list(CORRUPTIONS)[:3] == list(NOISE)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(6, 1, 28, 28), (3, 3, 32, 32), (2, 3, 48, 80), (0, 1, 28, 28)])
def test_shape_and_type_stay_and_the_images_are_left_alone(name: str, shape: tuple[int, int, int, int]):
    images = scenes(*shape) if shape[0] else np.zeros(shape, np.uint8)
    before = images.copy()
    found = changed(name, images, 5)
    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(images, before)
    assert shape[0] == 0 or (found != images).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_equal_generators_give_equal_images(name: str):
    images = scenes(4, 3, 32, 32)
    np.random.seed(3)
    expected = np.random.random(3)
    np.random.seed(3)
    np.testing.assert_array_equal(changed(name, images, 3), changed(name, images, 3))
    np.testing.assert_array_equal(np.random.random(3), expected)  # the global generator was left alone
    assert (changed(name, images, 3, seed=1) != changed(name, images, 3)).any() == (
        name not in WITHOUT_CHANCE
    )


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(40, 1, 28, 28), (40, 3, 32, 32), (6, 3, 96, 96)])
def test_every_severity_changes_more_than_the_one_before(name: str, shape: tuple[int, int, int, int]):
    images = scenes(*shape)
    distances = [np.abs(changed(name, images, s).astype(float) - images).mean() for s in SEVERITIES]
    assert np.all(np.diff([0.0, *distances]) > 0), distances


@pytest.mark.parametrize("severity", [0, 6, 2.5])
def test_other_severities_are_refused(severity: int):
    with pytest.raises(UsageError, match=f"from 1 to 5, got {severity}"):
        changed("fog", grey(100), severity)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 3, 32, 32)), np.zeros((2, 2, 32, 32), np.uint8), np.zeros((3, 32, 32), np.uint8)]
)
def test_other_arrays_are_refused(images: np.ndarray):
    with pytest.raises(UsageError, match="uint8 images"):
        changed("fog", images, 1)


def test_images_may_be_worked_on_in_any_portions(monkeypatch: pytest.MonkeyPatch):
    images = scenes(7, 3, 32, 32)
    whole = changed("zoom_blur", images, 4)
    monkeypatch.setattr(corruptions, "_AT_A_TIME", 2 * 3 * 32 * 32)
    np.testing.assert_array_equal(changed("zoom_blur", images, 4), whole)


# --- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "std"), [(1, 0.04), (5, 0.10)])
def test_gaussian_noise_has_its_variance(severity: int, std: float):
    found = changed("gaussian_noise", grey(128), severity) / 255.0
    # Rounding to grey levels adds a twelfth of a level squared; clipping is 5 standard deviations away.
    expected = std**2 + 1 / 12 / 255**2
    assert found.var() == pytest.approx(expected, rel=5 * np.sqrt(2 / found.size))
    assert found.mean() == pytest.approx(128 / 255, abs=5 * std / np.sqrt(found.size))


@pytest.mark.parametrize("photons", [500, 50])
@pytest.mark.parametrize("level", [0.15, 0.5])
def test_shot_noise_has_the_variance_of_counted_photons(photons: int, level: float):
    images = np.full((40, 3, 32, 32), level, np.float32)
    found = corruptions._shot_noise(images, np.random.default_rng(0), photons)
    # Counts of mean m have a fourth moment of 3m² + m: the sample variance is off by sqrt((2 + 1 / m) / n).
    mean = photons * level
    tolerance = 5 * np.sqrt((2 + 1 / mean) / found.size)
    assert found.var(dtype=float) == pytest.approx(level / photons, rel=tolerance)
    assert found.mean(dtype=float) == pytest.approx(level, rel=5 / np.sqrt(mean * found.size))


@pytest.mark.parametrize(("severity", "photons"), [(1, 500), (5, 50)])
def test_the_photons_of_a_severity_reach_the_images(severity: int, photons: int):
    found = changed("shot_noise", grey(128), severity) / 255.0
    assert found.var() == pytest.approx(128 / 255 / photons, rel=0.05)


def test_impulse_noise_is_half_salt_half_pepper():
    found = changed("impulse_noise", grey(128), 5)
    assert set(np.unique(found)) == {0, 128, 255}
    for level in (0, 255):
        assert (found == level).mean() == pytest.approx(0.035, abs=5 * np.sqrt(0.035 / found.size))


# --- blur --------------------------------------------------------------------------------------------------------


def test_convolution_is_that_of_scipy():
    random = np.random.default_rng(0)
    x, kernels = random.random((3, 2, 11, 14)).astype(np.float32), random.random((3, 7, 7))
    expected = [
        [ndimage.convolve(channel, kernel, mode="mirror") for channel in image]
        for image, kernel in zip(x.astype(float), kernels, strict=True)
    ]
    np.testing.assert_allclose(convolve(x, kernels), expected, rtol=1e-4)


def test_the_disc_has_its_area_and_spread():
    for radius in (0.4, 1.6, 7.0):
        kernel = disc(radius)
        assert kernel.sum() == pytest.approx(np.pi * radius**2, rel=0.05)
    reach = np.arange(len(kernel)) - len(kernel) // 2
    # E[x²] of a disc is r²/4, and pixels add a twelfth.
    assert (kernel * reach**2).sum() / kernel.sum() == pytest.approx(7.0**2 / 4 + 1 / 12, rel=0.02)


def test_the_gaussian_is_normalised_and_fades_as_its_name_says():
    kernel = gaussian(2.0)
    assert kernel.sum() == pytest.approx(1)
    assert kernel[8] / kernel[6] == pytest.approx(np.exp(0.5))


def test_a_line_points_where_its_angle_says_and_is_normalised():
    angle = np.array([0.0, np.pi / 2, -np.pi / 6])
    kernels = lines(angle, 100, 2.0)
    np.testing.assert_allclose(kernels.sum((1, 2)), 1, rtol=1e-6)
    reach = np.arange(kernels.shape[1]) - kernels.shape[1] // 2
    down, across = kernels.sum(2) @ reach, kernels.sum(1) @ reach
    np.testing.assert_allclose(np.arctan2(down, across), angle, atol=1e-6)
    # The mean of a half Gaussian at whole numbers.
    steps = np.arange(9)
    weight = np.exp(-(steps**2) / 8)
    np.testing.assert_allclose(np.hypot(down, across), (steps * weight).sum() / weight.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blurs_keep_the_mean_of_what_lies_inside_and_flat_images(name: str, severity: int):
    images = grey(60, count=30, channels=1)
    images[:, :, 14:18, 14:18] = np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=np.uint8)
    found = changed(name, images, severity)
    # Rounding is off by up to half a level, in the mean by sqrt(1 / 12 / n); flat parts are exact.
    assert found.mean() == pytest.approx(images.mean(), abs=5 * np.sqrt(1 / 12 / images.size) + 1e-3)
    np.testing.assert_array_equal(changed(name, grey(77), severity), grey(77))


def test_a_glass_moves_pixels_and_invents_none():
    places = np.arange(32 * 32, dtype=np.float32).reshape(1, 1, 32, 32).repeat(20, 0)
    found = corruptions._glass_blur(places, np.random.default_rng(0), 1e-3, 1.0)
    np.testing.assert_array_equal(np.sort(found.round().reshape(20, -1)), places.reshape(20, -1))
    assert (found.round() != places).mean() > 0.8
    row, column = np.divmod(found.round(), 32)
    # One move each, and being moved by others: hardly further than three pixels.
    far = np.maximum(np.abs(row - np.arange(32)[:, None]), np.abs(column - np.arange(32)))
    assert (far <= 3).mean() > 0.97
    half = corruptions._glass_blur(places, np.random.default_rng(0), 1e-3, 0.25)
    # A pixel stays if it neither moves (1/4 of 8/9) nor is met: on average it takes part in twice that many moves.
    assert (half.round() != places).mean() == pytest.approx(1 - np.exp(-2 * 0.25 * 8 / 9), abs=0.06)


def test_zoom_is_around_the_centre():
    ramp = np.arange(31, dtype=np.float32)[None, None, :, None] * np.ones((1, 1, 1, 40), np.float32)
    found = zoom(ramp, 1.5)
    np.testing.assert_allclose(found[0, 0, :, 7], (np.arange(31) - 15) / 1.5 + 15, rtol=1e-5)
    ramp[0, 0, 15] = 200
    found = corruptions._zoom_blur(ramp, np.random.default_rng(0), 1.25)
    assert found[0, 0, 15, 20] == pytest.approx(200)
    np.testing.assert_array_equal(changed("zoom_blur", grey(77), 5), grey(77))


# --- weather -----------------------------------------------------------------------------------------------------


def test_clouds_fill_the_range_and_are_smoother_when_detail_decays():
    rough, smooth = (plasma((50, 32, 32), decay, np.random.default_rng(0)) for decay in (1.2, 3.0))
    for clouds in (rough, smooth):
        np.testing.assert_allclose(clouds.min((1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(clouds.max((1, 2)), 1, atol=1e-6)
    # They are a torus: its seam is as smooth as any other place.
    steps = [np.abs(np.diff(clouds, axis=1)).mean() for clouds in (rough, smooth)]
    seams = [np.abs(clouds[:, 0] - clouds[:, -1]).mean() for clouds in (rough, smooth)]
    assert steps[1] < 0.5 * steps[0]
    np.testing.assert_allclose(seams, steps, rtol=0.3)


def test_clouds_without_detail_are_the_means_of_their_neighbours():
    clouds = plasma((4, 32, 32), 100.0, np.random.default_rng(0))
    beside = np.mean([np.roll(clouds, shift, axis) for shift in (1, -1) for axis in (1, 2)], axis=0)
    across = np.mean([np.roll(clouds, (i, j), (1, 2)) for i in (1, -1) for j in (1, -1)], axis=0)
    np.testing.assert_allclose(clouds[:, ::2, 1::2], beside[:, ::2, 1::2], atol=1e-6)
    np.testing.assert_allclose(clouds[:, 1::2, ::2], beside[:, 1::2, ::2], atol=1e-6)
    np.testing.assert_allclose(clouds[:, 1::2, 1::2], across[:, 1::2, 1::2], atol=1e-6)


@pytest.mark.parametrize(("severity", "thickness"), [(1, 0.2), (5, 1.5)])
def test_fog_on_white_goes_from_its_dimmed_white_to_white(severity: int, thickness: float):
    found = changed("fog", grey(255), severity)
    np.testing.assert_array_equal(found.max((1, 2, 3)), 255)
    np.testing.assert_array_equal(found.min((1, 2, 3)), round(255 / (1 + thickness)))


@pytest.mark.parametrize(("severity", "keep"), [(1, 0.95), (5, 0.8)])
def test_snow_whitens_what_it_does_not_cover(severity: int, keep: float):
    found = changed("snow", grey(0), severity)
    # Black becomes half of what is lost, and flakes only add to that.
    assert found.min() == round(255 * (1 - keep) * 0.5)
    assert found.max() > 50
    np.testing.assert_array_equal(found, found[..., ::-1, ::-1])


def test_frost_covers_only_a_part_and_keeps_the_rest():
    found = changed("frost", grey(200, channels=1), 5)
    assert found.min() == pytest.approx(round(200 * 0.85), abs=3)
    assert found.max() == 255
    assert 0.02 < (found > 230).mean() < 0.9


@pytest.mark.parametrize(("severity", "more"), [(1, 0.05), (5, 0.3)])
def test_brightness_shifts_grey_and_keeps_hue_and_saturation(severity: int, more: float):
    shifted = round(100 + 255 * more)
    np.testing.assert_allclose(changed("brightness", grey(100, channels=1), severity), shifted, atol=1)
    np.testing.assert_allclose(changed("brightness", grey(0), severity), round(255 * more), atol=1)
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8)
    found = changed("brightness", images, severity)
    for before, after in zip(images[0].reshape(3, -1).T, found[0].reshape(3, -1).T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before / 255)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + more, 1))
        np.testing.assert_allclose(after / 255, expected, atol=0.51 / 255)


# --- digital -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "factor"), [(1, 0.75), (5, 0.15)])
def test_contrast_shrinks_the_spread_around_the_mean(severity: int, factor: float):
    images = scenes(10, 3, 32, 32)
    found = changed("contrast", images, severity)
    # Rounding moves every pixel by half a level at most.
    np.testing.assert_allclose(found.mean((2, 3)), images.mean((2, 3)), atol=0.5)
    np.testing.assert_allclose(found.std((2, 3)), factor * images.std((2, 3)), atol=0.5)


def test_elastic_pixels_move_as_far_as_they_should():
    slope = np.arange(32, dtype=np.float32) / 100
    ramp = np.broadcast_to(slope[:, None], (300, 1, 32, 32))
    moved = (corruptions._elastic_transform(ramp, np.random.default_rng(0), 1.3) - ramp) * 100
    inside = moved[:, 0, 12:20, 12:20]
    # A few independent displacements an image.
    assert inside.std() == pytest.approx(1.3, rel=0.1)
    assert np.abs(np.diff(inside, axis=2)).mean() < 0.5
    constant = np.full((2, 1, 32, 32), 0.3, np.float32)
    np.testing.assert_allclose(
        corruptions._elastic_transform(constant, np.random.default_rng(0), 1.6), 0.3, rtol=1e-6
    )


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 50)])
def test_pixelate_makes_constant_blocks_of_their_mean(severity: int, height: int, width: int):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, height, width), dtype=np.uint8)
    found = changed("pixelate", images, severity)
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    rows = [[i for i in range(height) if _block(i, height, share) == b] for b in range(int(share * height))]
    columns = [[i for i in range(width) if _block(i, width, share) == b] for b in range(int(share * width))]
    assert {len(block) for block in rows + columns} <= {1, 2}
    for down in rows:
        for across in columns:
            block = images[:, :, down[0] : down[-1] + 1, across[0] : across[-1] + 1].mean((2, 3))
            there = found[:, :, down[0] : down[-1] + 1, across[0] : across[-1] + 1]
            np.testing.assert_allclose(there - block[..., None, None], 0, atol=0.501)


def _block(place: int, size: int, share: float) -> int:
    blocks = int(share * size)
    return max(b for b in range(blocks) if b * size // blocks <= place)


@pytest.mark.parametrize(("severity", "quality"), [(1, 80), (5, 40)])
def test_jpeg_is_a_file_of_its_quality(severity: int, quality: int):
    images = scenes(3, 3, 32, 48)
    for before, after in zip(images, changed("jpeg_compression", images, severity), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(before.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as read:
            np.testing.assert_array_equal(after.transpose(1, 2, 0), np.asarray(read))
    np.testing.assert_allclose(changed("jpeg_compression", grey(90, 1, 1), severity), 90, atol=1)

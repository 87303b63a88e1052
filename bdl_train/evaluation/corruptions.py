"""The 15 common image corruptions at severities 1 to 5 (Hendrycks & Dietterich, 2019), with explicit randomness.

The kinds and, where named CIFAR-C below, the constants are those of arXiv:1903.12261, Section 3 and Appendix B, and
of the CIFAR-C set made with them. Every severity changes images more than the one before, which CIFAR-C does not
promise: where its constants break that order, the comment says what stands here instead. Lengths are in pixels of an
image of 32; larger images scale them up. The code is independent of the original, so images differ in their noise.

Shape letters: N images, C channels, H height, W width, K side of a kernel.
"""

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.random import Generator

from bdl_train.errors import UsageError
from bdl_train.evaluation._image_filters import (
    convolve,
    disc,
    gaussian,
    gaussian_blur,
    lines,
    plasma,
    scale_of,
    zoom,
)  # fmt: skip

Corruption = Callable[[np.ndarray, int, Generator], np.ndarray]
"""From images `[N, C, H, W]` uint8, a severity 1..5 and a generator to new images of the same shape."""

SEVERITIES = (1, 2, 3, 4, 5)
_AT_A_TIME = 2**20
_GREY = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # luma of ITU-R BT.601


def _corruption(change: Callable[..., np.ndarray], constants: tuple[tuple[float, ...], ...]) -> Corruption:
    """A corruption from a change of float images in [0, 1] and its constants at each severity."""

    def corrupt(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
        check_images(images)
        if severity not in SEVERITIES:
            raise UsageError(f"A severity is a whole number from 1 to 5, got {severity}: change it.")
        out = np.empty_like(images)
        size = max(1, _AT_A_TIME // max(1, int(np.prod(images.shape[1:]))))
        for start in range(0, len(images), size):
            x = images[start : start + size].astype(np.float32) / 255
            changed = change(x, random, *constants[int(severity) - 1])
            # Rounded; the original cuts decimals off, which darkens every image by half a grey level.
            out[start : start + size] = np.rint(np.clip(changed, 0, 1) * 255)
        return out

    return corrupt


def check_images(images: np.ndarray) -> None:
    """Refuse what is not uint8 `[N, C, H, W]` with 1 or 3 channels and 8 pixels a side or more.

    Raises:
        UsageError: another type or shape.
    """
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1] not in (1, 3)
        or min(images.shape[2:]) < 8
    ):
        raise UsageError(
            "Corruptions change uint8 images [N, C, H, W] with 1 or 3 channels of 8 x 8 pixels or more, got "
            f"{images.dtype} {list(images.shape)}: leave the robustness sweep out for this data."
        )


# --- noise --------------------------------------------------------------------------------------------------------


def _gaussian_noise(x: np.ndarray, random: Generator, std: float) -> np.ndarray:
    return x + np.float32(std) * random.standard_normal(x.shape, np.float32)


def _shot_noise(x: np.ndarray, random: Generator, photons: float) -> np.ndarray:
    """Poisson counts of `photons` at white: variance x / photons."""
    return (random.poisson(x * photons) / photons).astype(np.float32)


def _impulse_noise(x: np.ndarray, random: Generator, share: float) -> np.ndarray:
    """Salt and pepper on `share` of the values, half each."""
    uniform = random.random(x.shape, np.float32)
    return np.where(uniform < share, (uniform < share / 2).astype(np.float32), x)


# --- blur ---------------------------------------------------------------------------------------------------------


def _defocus_blur(x: np.ndarray, random: Generator, radius: float, alias: float) -> np.ndarray:
    from scipy.signal import convolve2d

    scale = scale_of(x)
    aperture, soft = disc(radius * scale), gaussian(alias * scale)
    kernel = convolve2d(aperture / aperture.sum(), np.outer(soft, soft))
    return convolve(x, kernel[None])


def _glass_blur(x: np.ndarray, random: Generator, std: float, rounds: float) -> np.ndarray:
    """Each pixel changes places with a neighbour, `rounds` times on average, between two soft blurs.

    The original goes through the pixels in reading order. Here those that cannot meet move at once, in lattices of
    2·reach + 1 pixels, which takes (2·reach + 1)² steps a round instead of H·W.
    """
    scale = scale_of(x)
    d, (count, _, height, width) = round(scale), x.shape
    pixels = gaussian_blur(x, std * scale).transpose(2, 3, 0, 1).copy()  # [H, W, N, C]
    image = np.arange(count)
    for done in range(int(np.ceil(rounds))):
        for phase in random.permutation((2 * d + 1) ** 2):
            down = np.arange(d + phase // (2 * d + 1), height - d, 2 * d + 1)[:, None, None]
            across = np.arange(d + phase % (2 * d + 1), width - d, 2 * d + 1)[:, None]
            step = random.integers(-d, d, (2, down.size, across.size, count), np.int16, endpoint=True)
            step *= random.random(step.shape[1:], np.float32) < rounds - done
            here, there = (down, across, image), (down + step[0], across + step[1], image)
            pixels[here], pixels[there] = pixels[there], pixels[here]
    return gaussian_blur(pixels.transpose(2, 3, 0, 1), std * scale)


def _motion_blur(x: np.ndarray, random: Generator, std: float) -> np.ndarray:
    angle = random.uniform(-np.pi / 4, np.pi / 4, len(x))
    return convolve(x, lines(angle, 4 * std * scale_of(x), std * scale_of(x)))


def _zoom_blur(x: np.ndarray, random: Generator, most: float) -> np.ndarray:
    """The mean of the image and its enlargements by 1.00, 1.01, ... up to `most`."""
    factors = 1 + np.arange(round(100 * (most - 1)) + 1) / 100
    total = x.copy()
    for factor in factors:
        total += zoom(x, factor)
    return total / (len(factors) + 1)


# --- weather ------------------------------------------------------------------------------------------------------


def _one_channel(x: np.ndarray) -> tuple[int, ...]:
    return (len(x), *x.shape[2:])


def _fog(x: np.ndarray, random: Generator, thickness: float, decay: float) -> np.ndarray:
    white = x.max((1, 2, 3), keepdims=True)
    clouds = plasma(_one_channel(x), decay, random)[:, None]
    return (x + thickness * clouds) * white / (white + thickness)


def _frost(x: np.ndarray, random: Generator, keep: float, ice: float) -> np.ndarray:
    """Ice in place of the original's photographs: six-armed crystals on few points, in a haze with sharp ridges."""
    scale, shape = scale_of(x), _one_channel(x)
    ridges = 1 - np.abs(2 * plasma(shape, 1.5, random) - 1)
    seeds = (random.random(shape, np.float32) < 0.02 / scale**2).astype(np.float32)[:, None]
    first = random.uniform(0, np.pi / 3, len(x))
    arms = [lines(first + arm * np.pi / 3, 12 * scale, 4 * scale) for arm in range(6)]
    star = np.sum(arms, axis=0)
    crystals = convolve(seeds, star / star.max((1, 2), keepdims=True))[:, 0]
    pattern = np.clip(0.7 * ridges + 0.9 * crystals, 0, 1)[:, None]
    return keep * x + ice * pattern


def _snow(
    x: np.ndarray, random: Generator, mean: float, std: float, size: float, least: float,
    longest: float, fade: float, keep: float,
) -> np.ndarray:  # fmt: skip
    """Flakes that fall at an angle, and their point reflection, on a whitened image."""
    scale = scale_of(x)
    flakes = mean + std * random.standard_normal(_one_channel(x), np.float32)
    flakes = zoom(flakes, size * scale)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)[:, None]
    angle = random.uniform(-0.75 * np.pi, -0.25 * np.pi, len(x))
    flakes = convolve(flakes, lines(angle, longest * scale, fade * scale))
    grey = (x * _GREY).sum(1, keepdims=True) if x.shape[1] == 3 else x
    white = keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5)
    return white + flakes + flakes[..., ::-1, ::-1]


def _brightness(x: np.ndarray, random: Generator, more: float) -> np.ndarray:
    """The value of HSV, its largest channel, rises; hue and saturation stay, so all channels rise by one factor."""
    value = x.max(1, keepdims=True)
    raised = np.minimum(value + more, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


# --- digital ------------------------------------------------------------------------------------------------------


def _contrast(x: np.ndarray, random: Generator, factor: float) -> np.ndarray:
    mean = x.mean((2, 3), keepdims=True)
    return mean + factor * (x - mean)


def _elastic_transform(x: np.ndarray, random: Generator, std: float) -> np.ndarray:
    """Pixels move by a smooth random field of `std` pixels each way (Simard et al., 2003, Section 2)."""
    from scipy.ndimage import correlate1d

    count, channels, height, width = x.shape
    kernel = gaussian(0.1 * min(height, width))
    field = random.standard_normal((2, count, height, width), np.float32)
    for axis in (2, 3):
        field = correlate1d(field, kernel, axis=axis, mode="reflect")
    # Σ w² of the kernel is the factor by which smoothing along both axes shrinks the standard deviation.
    field *= std * scale_of(x) / np.square(kernel).sum()
    y = np.clip(np.arange(height)[:, None] + field[0], 0, height - 1)
    z = np.clip(np.arange(width) + field[1], 0, width - 1)
    top, left = np.minimum(y.astype(int), height - 2), np.minimum(z.astype(int), width - 2)
    below, right = (y - top)[:, None], (z - left)[:, None]
    flat, corner = x.reshape(count, channels, -1), (top * width + left).reshape(count, 1, -1)

    def at(shift: int) -> np.ndarray:
        return np.take_along_axis(flat, corner + shift, 2).reshape(x.shape)

    upper = at(0) + right * (at(1) - at(0))
    lower = at(width) + right * (at(width + 1) - at(width))
    return upper + below * (lower - upper)


def _pixelate(x: np.ndarray, random: Generator, share: float) -> np.ndarray:
    """Means over a grid of int(share · H) x int(share · W) blocks, of sizes that differ by one pixel at most."""
    for axis in (2, 3):
        size = x.shape[axis]
        blocks = int(share * size)
        starts = np.arange(blocks) * size // blocks
        widths = np.diff(starts, append=size)
        sums = np.add.reduceat(x, starts, axis)
        x = np.repeat(sums / np.expand_dims(widths, tuple(range(1, 4 - axis))), widths, axis)
    return x


def _jpeg_compression(x: np.ndarray, random: Generator, quality: float) -> np.ndarray:
    from PIL import Image

    pixels = np.rint(x * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    out = np.empty_like(pixels)
    for i, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
            buffer, "JPEG", quality=round(quality)
        )
        with Image.open(buffer) as read:
            out[i] = np.asarray(read).reshape(image.shape)
    return out.transpose(0, 3, 1, 2).astype(np.float32) / 255


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        # CIFAR-C: standard deviation; photons at white; share of values.
        "gaussian_noise": _corruption(_gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))),
        "shot_noise": _corruption(_shot_noise, ((500,), (250,), (100,), (75,), (50,))),
        "impulse_noise": _corruption(_impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
        # Radius of the disc, Gaussian at its edge. CIFAR-C's radii 1 and 1.5 count whole pixels, 5 and 9 of them;
        # discs of 1.3 and 1.6 with parts of pixels spread light as far.
        "defocus_blur": _corruption(
            _defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.3, 0.2), (1.6, 0.1))
        ),
        # Gaussian, rounds; the last is CIFAR-C's, whose others do not grow: a soft blur there undoes the shuffle.
        "glass_blur": _corruption(_glass_blur, ((0.4, 0.3), (0.4, 0.6), (0.4, 1.0), (0.4, 1.5), (0.4, 2.0))),
        # Fading; CIFAR-C has 2 in place of 2.25, with a trace that is longer only where it has faded.
        "motion_blur": _corruption(_motion_blur, ((1.0,), (1.5,), (2.0,), (2.25,), (2.5,))),
        # CIFAR-C: largest zoom.
        "zoom_blur": _corruption(_zoom_blur, ((1.05,), (1.10,), (1.15,), (1.20,), (1.25,))),
        # CIFAR-C: mean and spread of the flakes, their size, the least that shows, length and fading of their trace,
        # what is kept of the image.
        "snow": _corruption(
            _snow,
            (
                (0.1, 0.2, 1, 0.6, 16, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 20, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 20, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 24, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 28, 12, 0.8),
            ),
        ),
        # What is kept of the image, ice. CIFAR-C goes down to 0.75 and up to 0.45, where bright images come back.
        "frost": _corruption(_frost, ((1, 0.2), (1, 0.3), (0.95, 0.4), (0.9, 0.5), (0.85, 0.6))),
        # CIFAR-C: thickness, decay of detail.
        "fog": _corruption(_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
        # CIFAR-C: added to the value of HSV; factor.
        "brightness": _corruption(_brightness, ((0.05,), (0.10,), (0.15,), (0.20,), (0.30,))),
        "contrast": _corruption(_contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
        # Pixels of displacement. CIFAR-C mixes an affine map that weakens with a field that grows, which has no order.
        "elastic_transform": _corruption(_elastic_transform, ((0.4,), (0.7,), (1.0,), (1.3,), (1.6,))),
        # CIFAR-C: share of rows and columns left; quality.
        "pixelate": _corruption(_pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
        "jpeg_compression": _corruption(_jpeg_compression, ((80,), (65,), (58,), (50,), (40,))),
    }
)
"""The 15 kinds by name, in the order of the paper. Images of another type or shape raise UsageError, and so does a
severity that is not 1, 2, 3, 4 or 5. Equal generators give equal images."""

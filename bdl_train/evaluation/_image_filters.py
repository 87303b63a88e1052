"""Blurs, zooms and clouds of many images at once.

Shape letters: N images, C channels, H height, W width, K side of a kernel.
"""

import numpy as np
from numpy.random import Generator


def scale_of(x: np.ndarray) -> float:
    """Pixels of these images to one of CIFAR-C's; never less than 1, as no blur is finer than a pixel."""
    return max(1.0, min(x.shape[2:]) / 32)


def convolve(x: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Convolution with kernels `[N or 1, K, K]`, K odd, of images mirrored at their edges."""
    from scipy import fft

    reach, (height, width) = kernels.shape[-1] // 2, x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="reflect")
    size = [fft.next_fast_len(n, real=True) for n in padded.shape[2:]]
    image, kernel = (
        np.asarray(fft.rfft2(one, size)) for one in (padded, kernels[:, None].astype(np.float32))
    )
    # The circular product is the plain one from index K - 1 on, the first one that needs nothing outside.
    start = 2 * reach
    out = np.asarray(fft.irfft2(image * kernel, size))
    return out[..., start : start + height, start : start + width]


def gaussian(std: float) -> np.ndarray:
    """A kernel of one axis `[K]`."""
    reach = max(1, round(4 * std))
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / std))
    return weights / weights.sum()


def gaussian_blur(x: np.ndarray, std: float) -> np.ndarray:
    kernel = gaussian(std)
    return convolve(x, np.outer(kernel, kernel)[None])


def disc(radius: float) -> np.ndarray:
    """The share of each pixel inside a disc, `[K, K]`, on a grid of 16 x 16 points a pixel."""
    reach = int(np.ceil(radius + 0.5))
    fine = (np.arange((2 * reach + 1) * 16) + 0.5) / 16 - reach - 0.5
    inside = fine[:, None] ** 2 + fine**2 <= radius**2
    side = 2 * reach + 1
    return inside.reshape(side, 16, side, 16).mean((1, 3))


def lines(angle: np.ndarray, longest: float, std: float) -> np.ndarray:
    """Kernels `[N, K, K]` of a line from the centre, fading as a Gaussian of `std` pixels, then cut off.

    Args:
        angle: `[N]` radians; 0 points along a row.
    """
    length = int(min(longest, np.ceil(4 * std)))
    side, count = 2 * length + 3, np.arange(len(angle))
    kernels = np.zeros((len(angle), side, side), np.float32)
    for along in range(length + 1):
        y, x = along * np.sin(angle) + length + 1, along * np.cos(angle) + length + 1
        top, left = np.floor(y).astype(int), np.floor(x).astype(int)
        weight = np.exp(-0.5 * (along / std) ** 2)
        for i, near_y in ((0, 1 - y + top), (1, y - top)):
            for j, near_x in ((0, 1 - x + left), (1, x - left)):
                # In a line of length 0 the lower right neighbours have weight 0 and lie inside.
                kernels[count, top + i, left + j] += weight * near_y * near_x
    return kernels / kernels.sum((1, 2), keepdims=True)


def zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarged around the centre of the last two axes, bilinear, same size."""
    down, across = (_enlarging(size, factor) for size in x.shape[-2:])
    return down @ x @ across.T


def _enlarging(size: int, factor: float) -> np.ndarray:
    middle = (size - 1) / 2
    source = (np.arange(size) - middle) / factor + middle
    return np.maximum(0, 1 - np.abs(source[:, None] - np.arange(size))).astype(np.float32)


def plasma(shape: tuple[int, ...], decay: float, random: Generator) -> np.ndarray:
    """Clouds in [0, 1], `[N, H, W]`: diamond-square midpoints on a torus; each finer level varies decay² times less."""
    count, height, width = shape
    size = 1 << (max(height, width) - 1).bit_length()
    grid, step, spread = np.zeros((count, size, size), np.float32), size, 1.0

    def around(*points: np.ndarray) -> np.ndarray:
        noise = random.random(points[0].shape, np.float32)
        return np.add.reduce(points) / np.float32(4) + np.float32(spread) * (2 * noise - 1)

    while step > 1:
        half = step // 2
        corner = grid[:, ::step, ::step]
        right, below = np.roll(corner, -1, 2), np.roll(corner, -1, 1)
        centre = around(corner, right, below, np.roll(right, -1, 1))
        grid[:, half::step, half::step] = centre
        grid[:, ::step, half::step] = around(corner, right, centre, np.roll(centre, 1, 1))
        grid[:, half::step, ::step] = around(corner, below, centre, np.roll(centre, 1, 2))
        step, spread = half, spread / decay**2
    low, high = grid.min((1, 2), keepdims=True), grid.max((1, 2), keepdims=True)
    return ((grid - low) / (high - low))[:, :height, :width]

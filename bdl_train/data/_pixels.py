"""Images as arrays: decoding, one layout, and the statistics of their pixels.

Shape letters: N images, C channels, H height, W width.
"""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bdl_train.errors import UsageError


def decode_jpegs(jpeg_bytes: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The images of some rows, `[N, H, W, 3]` uint8.

    Args:
        jpeg_bytes: All files, one after another, uint8.
        offsets: Image i is `jpeg_bytes[offsets[i]:offsets[i + 1]]`.
        rows: Which images, in the order wanted.

    Raises:
        UsageError: bytes that are no image, or images of different sizes.
    """
    from PIL import Image

    def decode(row: int) -> np.ndarray:
        stored = jpeg_bytes[int(offsets[row]) : int(offsets[row + 1])].tobytes()
        try:
            with Image.open(io.BytesIO(stored)) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
            raise UsageError(f"Image {row} cannot be decoded: {error}.") from error

    with ThreadPoolExecutor() as pool:  # PIL decodes without the interpreter lock
        images = list(pool.map(decode, rows.tolist()))
    odd = next((i for i, image in enumerate(images) if image.shape != images[0].shape), None)
    if odd is not None:
        raise UsageError(
            f"All images must be of one size: image {rows[0]} is {list(images[0].shape[:2])}, image "
            f"{rows[odd]} is {list(images[odd].shape[:2])}."
        )
    return np.stack(images)


def channels_first(images: np.ndarray, where: str) -> np.ndarray:
    """`[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` to `[N, C, H, W]` uint8; C is 1 or 3.

    Args:
        images: As stored.
        where: Names the array in an error.
    """
    if images.dtype != np.uint8:
        raise UsageError(f"{where} must hold uint8 pixels 0..255, got {images.dtype}.")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    raise UsageError(
        f"{where} must be [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, got "
        f"{list(images.shape)}."
    )


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of `[N, C, H, W]` uint8, in units of pixel values in [0, 1].

    A channel of one colour has standard deviation 1, so that it can be divided by.
    """
    means, stds = [], []
    values = np.arange(256) / 255
    for channel in range(images.shape[1]):
        # From the histogram: exact, and no float copy of the images.
        share = np.bincount(images[:, channel].ravel(), minlength=256) / images[:, channel].size
        mean = float(share @ values)
        std = float(np.sqrt(share @ (values - mean) ** 2))
        means.append(mean)
        stds.append(std if np.count_nonzero(share) > 1 else 1.0)
    return tuple(means), tuple(stds)

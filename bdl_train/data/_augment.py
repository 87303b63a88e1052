"""Random crops and flips of image batches, per example and with explicit randomness.

Shape letters: M members, B batch, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

PADDING = 4
"""Black pixels added on every side before the crop: with it and the flip, the usual scheme for CIFAR
(He et al., 2016, arXiv:1512.03385, section 4.2)."""


def augment(x: Tensor, generator: Generator | Sequence[Generator]) -> Tensor:
    """Shift each image by up to `PADDING` pixels either way and flip it left to right with probability one
    half.

    Args:
        x: `[..., C, H, W]` uint8.
        generator: One on the CPU for the whole batch; or, for `x` of shape `[M, ..., C, H, W]`, one per
            member, so that a member sees the same crops alone and in a stack.

    Returns:
        A new tensor like `x`; each example has a crop and a flip of its own.

    Raises:
        TypeError: `x` is not uint8.
        ValueError: `x` is no batch of images, or there are not M generators.
    """
    if x.dtype != torch.uint8:
        raise TypeError(f"Images to augment must be uint8, got {x.dtype}.")
    if x.ndim < 3:
        raise ValueError(f"Images must be [..., channels, height, width], got {list(x.shape)}.")
    *lead, C, H, W = x.shape
    if isinstance(generator, Generator):
        top, left, flip = _draw(lead, generator)
    else:
        if len(lead) == 0 or len(generator) != lead[0]:
            raise ValueError(f"{len(generator)} generators do not fit images of shape {list(x.shape)}.")
        top, left, flip = torch.stack([_draw(lead[1:], one) for one in generator], dim=1)
    num_images = flip.numel()
    across, down = torch.arange(W), torch.arange(H)
    across_NW = torch.where(flip.reshape(-1, 1) == 1, across.flip(0), across) + left.reshape(-1, 1)
    down_NH = down + top.reshape(-1, 1)
    padded = F.pad(x.reshape(num_images, C, H, W), (PADDING,) * 4)
    image = torch.arange(num_images, device=x.device)[:, None, None, None]
    channel = torch.arange(C, device=x.device)[:, None, None]
    down_N1H1 = down_NH.to(x.device)[:, None, :, None]
    across_N11W = across_NW.to(x.device)[:, None, None, :]
    return padded[image, channel, down_N1H1, across_N11W].reshape(x.shape)


def _draw(shape: Sequence[int], generator: Generator) -> Tensor:
    """Top and left corner of the crop in the padded image, and whether to flip: `[3, *shape]`."""
    corner = torch.randint(0, 2 * PADDING + 1, (2, *shape), generator=generator)
    return torch.cat([corner, torch.randint(0, 2, (1, *shape), generator=generator)])

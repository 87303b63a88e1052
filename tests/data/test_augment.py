"""Crops and flips: each output is one of the 9 x 9 x 2 views of its image, drawn evenly."""

from collections import Counter

import pytest
import torch
from torch import Generator, Tensor

from bdl_train.data._augment import PADDING, augment

torch.set_num_threads(1)


def some_images(*shape: int) -> Tensor:
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=Generator().manual_seed(0))


def views(image: Tensor) -> dict[bytes, tuple[int, int, bool]]:
    """Every shift and mirror image, by slicing a canvas."""
    C, H, W = image.shape
    found = {}
    for flip in (False, True):
        canvas = torch.zeros(C, H + 2 * PADDING, W + 2 * PADDING, dtype=torch.uint8)
        for top in range(2 * PADDING + 1):
            for left in range(2 * PADDING + 1):
                canvas.zero_()
                canvas[:, PADDING : PADDING + H, PADDING : PADDING + W] = image
                view = canvas[:, top : top + H, left : left + W]
                view = view.flip(-1) if flip else view
                found[view.contiguous().numpy().tobytes()] = (top, left, flip)
    return found


def test_each_image_becomes_one_of_its_views_evenly():
    image = some_images(3, 12, 10)
    num_draws = 162 * 50
    out = augment(image.expand(num_draws, -1, -1, -1), Generator().manual_seed(1))
    known = views(image)
    assert len(known) == 162
    seen = Counter(known[one.numpy().tobytes()] for one in out)
    assert len(seen) == 162
    # Pearson's statistic has mean 161 and standard deviation 18 under even draws.
    assert sum((count - 50) ** 2 / 50 for count in seen.values()) < 161 + 5 * 18


def test_images_of_a_batch_are_not_mixed_up():
    images = some_images(20, 1, 9, 9)
    out = augment(images, Generator().manual_seed(0))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    drawn = [views(image)[one.numpy().tobytes()] for image, one in zip(images, out, strict=True)]
    assert len(set(drawn)) > 10


def test_same_generator_state_same_images_and_the_global_one_is_untouched():
    images, state = some_images(8, 3, 8, 8), torch.random.get_rng_state()
    one, again, other = (augment(images, Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_member_sees_the_same_crops_alone_and_in_a_stack():
    images = some_images(3, 5, 3, 8, 8)
    stacked = augment(images, [Generator().manual_seed(seed) for seed in (11, 12, 13)])
    for m, seed in enumerate((11, 12, 13)):
        assert torch.equal(stacked[m], augment(images[m], Generator().manual_seed(seed)))
        assert torch.equal(stacked[m], augment(images[m][None], [Generator().manual_seed(seed)])[0])


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"must be uint8, got torch\.float32"):
        augment(torch.zeros(2, 1, 8, 8), Generator())
    with pytest.raises(ValueError, match=r"must be \[\.\.\., channels, height, width\], got \[8, 8\]"):
        augment(torch.zeros(8, 8, dtype=torch.uint8), Generator())
    with pytest.raises(ValueError, match=r"2 generators do not fit images of shape \[3, 1, 8, 8\]"):
        augment(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), [Generator(), Generator()])

"""Random numbers of the members of a stack: a stream each, so that a member alone draws what it draws in a stack."""

from collections.abc import Sequence

import torch
from torch import Tensor


class MemberNoise:
    """One generator a member, on the device of the weights.

    Args:
        seeds: One a member.
        like: `[M, P]`; the numbers come in its dtype and on its device.
    """

    def __init__(self, seeds: Sequence[int], like: Tensor) -> None:
        self._like = like.detach()
        self._generators = [torch.Generator(like.device).manual_seed(seed) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers `[M, *shape]`; without a shape, `[M, P]`."""
        z = self._like.new_empty(len(self._generators), *(shape or self._like.shape[1:]))
        for row, generator in zip(z, self._generators, strict=True):
            row.normal_(generator=generator)
        return z

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), `[M, *shape]`."""
        u = self._like.new_empty(len(self._generators), *shape)
        for row, generator in zip(u, self._generators, strict=True):
            row.uniform_(generator=generator)
        return u

    def state_dict(self) -> dict[str, Tensor]:
        return {"generators": torch.stack([generator.get_state() for generator in self._generators])}

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        for generator, state in zip(self._generators, stored["generators"].cpu(), strict=True):
            generator.set_state(state.clone())  # of a view, torch 2.13 reads past its storage

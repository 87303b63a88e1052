"""A stack that spans several processes, one a device: each takes a part of every batch, gradients are summed.

Every rank holds all members of the stack, with equal weights, seeds and steps; only the rows of a batch differ. There
is one place where ranks meet in a step, the gradient of the potential, whatever the method. Decisions (stop, save,
early stopping) are rank 0's, and rank 0 alone writes files.
"""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bdl_train.files import write_bytes

_TCPStore: Any = dist.__dict__["TCPStore"]  # not among the names that torch's stubs export

TIMEOUT_S = 600.0
"""To wait for a rank that has gone silent, before the stack counts as crashed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its stack.

    Attributes:
        rank: From 0.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, num_rows: int) -> slice:
        """The rows of a batch that are this rank's: contiguous, shares differ by at most one row."""
        return slice(num_rows * self.rank // self.world, num_rows * (self.rank + 1) // self.world)

    def mean(self, nll: Tensor, grad: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Means over the whole batch from those over each rank's rows.

        Args:
            nll: `[M]`.
            grad: `[M, P]`.
            num_rows: Of this rank.
        """
        rows = torch.full_like(nll[:, None], num_rows)
        sums = torch.cat([grad * num_rows, nll[:, None] * num_rows, rows], dim=1)
        dist.all_reduce(sums)
        means = sums[:, :-1] / sums[:, -1:]
        return means[:, -1].contiguous(), means[:, :-1].contiguous()

    def of_first(self, values: Tensor) -> Tensor:
        """What rank 0 holds, `[...]` of the same shape on all."""
        if self.world > 1:
            values = values.contiguous()
            dist.broadcast(values, src=0)
        return values

    def decide(self, number: int, device: torch.device | str = "cpu") -> int:
        """Rank 0's whole number."""
        if self.world == 1:
            return number
        return int(self.of_first(torch.tensor(number, dtype=torch.int64, device=device)))


ALONE = Ranks()


@contextmanager
def joined(folder: Path, rank: int, world: int, token: str, address: str, *, gpu: bool) -> Iterator[Ranks]:
    """The ranks of one stack as a process group, for the time of the context.

    Args:
        folder: Of the stack, seen by all ranks: rank 0 says there where it listens.
        rank, world: Of this process.
        token: The same on all ranks, another one at each try.
        address: An address of this machine that the others reach; rank 0 listens on it and nowhere else.
        gpu: Whether tensors are on GPUs.

    Raises:
        RuntimeError: the others do not come in time.
    """
    patience = timedelta(seconds=TIMEOUT_S)
    place = folder / f"rendezvous-{token}.json"
    if rank == 0:
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        store = _TCPStore(
            address, port, world, is_master=True, timeout=patience, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        write_bytes(place, json.dumps({"address": address, "port": port}).encode())
    else:
        where = _wait_for(place)
        store = _TCPStore(where["address"], where["port"], world, is_master=False, timeout=patience)
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world, timeout=patience
    )
    try:
        yield Ranks(rank, world)
    finally:
        dist.destroy_process_group()
        if rank == 0:
            place.unlink(missing_ok=True)


def _wait_for(place: Path) -> dict:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        try:
            return json.loads(place.read_bytes())
        except (OSError, ValueError):
            time.sleep(0.05)
    raise RuntimeError(f"rank 0 of {place.parent} did not come in {TIMEOUT_S:.0f} s")

"""Every seed of a run, as a function of (run seed, member, stream, attempt).

No seed depends on rank, worker or start order, so member 7 is the same network on 1 worker or 64.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a seed is for. The numbers are part of the run's identity: never renumber them."""

    INIT = 0
    ORDER = 1
    NOISE = 2
    SPLIT = 3
    DRAWS = 4
    PRIOR_CHECK = 5
    ROWS = 6


def member_seed(run_seed: int, member: int, stream: Stream, attempt: int = 0) -> int:
    """A 63-bit seed of one member's stream (numpy `SeedSequence` with the triple as spawn key)."""
    sequence = np.random.SeedSequence(run_seed, spawn_key=(member, int(stream), attempt))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def run_seed(seed: int, stream: Stream) -> int:
    """A 63-bit seed of a stream that belongs to the run, not to a member."""
    # Members count from 0; one entry instead of three keeps the two families of keys apart.
    sequence = np.random.SeedSequence(seed, spawn_key=(int(stream),))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)

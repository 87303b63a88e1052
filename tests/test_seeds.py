"""Seeds are functions of (run, member, stream, attempt), and never equal by accident."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from bdl_train.seeds import Stream, member_seed, run_seed


def test_no_two_seeds_of_a_run_are_equal():
    seeds = [
        member_seed(run, member, stream, attempt)
        for run, member, stream, attempt in itertools.product(range(4), range(50), Stream, range(3))
    ]
    seeds += [run_seed(run, stream) for run, stream in itertools.product(range(4), Stream)]
    assert len(set(seeds)) == len(seeds)


def test_run_and_member_cannot_be_swapped():
    assert member_seed(3, 7, Stream.INIT) != member_seed(7, 3, Stream.INIT)
    assert member_seed(0, 1, Stream.INIT) != member_seed(0, 0, Stream.ORDER)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 5])
def test_every_seed_suits_torch_and_numpy(seed: int):
    for stream in Stream:
        for found in (member_seed(seed, 10**6, stream), run_seed(seed, stream)):
            assert 0 <= found < 2**63


def test_the_numbers_of_the_streams_are_fixed():
    # A run's identity: renumbering would change every network of an old config.
    expected = {"INIT": 0, "ORDER": 1, "NOISE": 2, "SPLIT": 3, "DRAWS": 4, "PRIOR_CHECK": 5, "ROWS": 6}
    assert {name: stream.value for name, stream in Stream.__members__.items()} == expected


def test_the_seed_is_that_of_the_documented_recipe():
    sequence = np.random.SeedSequence(42, spawn_key=(7, 2, 1))
    assert member_seed(42, 7, Stream.NOISE, 1) == int(sequence.generate_state(1, np.uint64)[0]) // 2
    sequence = np.random.SeedSequence(42, spawn_key=(3,))
    assert run_seed(42, Stream.SPLIT) == int(sequence.generate_state(1, np.uint64)[0]) // 2


def test_another_process_has_the_same_seeds():
    code = (
        "from bdl_train.seeds import *; print(member_seed(5, 3, Stream.ORDER, 2), run_seed(5, Stream.SPLIT))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.split() == [str(member_seed(5, 3, Stream.ORDER, 2)), str(run_seed(5, Stream.SPLIT))]


def test_neighbouring_members_start_from_unrelated_numbers():
    first = [np.random.default_rng(member_seed(0, m, Stream.INIT)).normal() for m in range(2000)]
    assert abs(np.mean(first)) < 5 / np.sqrt(2000)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / np.sqrt(2000)

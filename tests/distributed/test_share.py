"""How several trainings side by side divide the machines."""

from dataclasses import replace

import pytest

from bdl_train.distributed import Resources
from bdl_train.distributed.inline import Inline
from bdl_train.distributed.ray_local import RayLocal
from bdl_train.distributed.share import Share, divided, room

RAY = RayLocal(
    num_workers=None,
    members_per_stack=None,
    cpus_per_stack=None,
    gpus_per_stack=0,
    ranks_per_stack=1,
    num_cpus=8,
    num_gpus=0,
    max_retries=0,
)


@pytest.mark.parametrize(
    ("machines", "num_shares", "part"),
    [
        ([(8, 0.0)], 2, ((4, 0.0),)),
        ([(8, 4.0)], 3, ((2, 1.0),)),
        ([(8, 0.0), (16, 2.0)], 2, ((16, 2.0),)),
        ([(8, 1.0)] * 5, 2, ((8, 1.0), (8, 1.0))),
        ([(8, 2.0), (8, 2.0)], 4, ((4, 1.0),)),
    ],
)
def test_parts_are_whole_machines_or_parts_of_one(machines, num_shares, part):
    assert divided(Resources.of_nodes(machines), num_shares).machines == part


def test_a_part_that_holds_no_stack_is_all_of_it():
    assert Share(RAY, 2).resources() == Resources.of_nodes([(4, 0.0)])
    large = replace(RAY, cpus_per_stack=5)
    assert Share(large, 2).resources() == Resources(8, 0)
    gpu = replace(RAY, num_gpus=1, gpus_per_stack=0.25)
    assert Share(gpu, 4).resources() == Resources(8, 1)


def test_room_counts_the_stacks_that_run_at_a_time():
    assert room(RAY) == 8
    assert room(replace(RAY, cpus_per_stack=3)) == 2
    assert room(replace(RAY, ranks_per_stack=4)) == 2
    assert room(replace(RAY, num_workers=3)) == 3
    assert Share(replace(RAY, num_workers=3), 2).num_workers == 1


def test_inline_trains_one_after_another():
    inline = Inline(members_per_stack=None, cpus_per_stack=1, gpus_per_stack=0)
    assert not Share(inline, 1).concurrent
    assert Share(RAY, 1).concurrent

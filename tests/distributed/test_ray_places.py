"""What the driver makes of the nodes that Ray lists; no Ray is started."""

from types import SimpleNamespace

import pytest

from bdl_train.distributed.ray_places import Places, forget_places, note_place, places_of
from bdl_train.training.prepared import StackTask


def ray_with(*nodes: tuple[str, bool, dict[str, float]], draining: tuple[str, ...] = ()) -> SimpleNamespace:
    listed = [{"NodeID": name, "Alive": alive, "Resources": held} for name, alive, held in nodes]
    client = SimpleNamespace(get_draining_nodes=lambda: dict.fromkeys(draining, 1))
    worker = SimpleNamespace(global_worker=SimpleNamespace(gcs_client=client))
    return SimpleNamespace(nodes=lambda: listed, _private=SimpleNamespace(worker=worker))


def stack(cpus: int = 1, gpus: float = 0, ranks: int = 1) -> StackTask:
    return StackTask(id="000", members=(0,), cpus=cpus, gpus=gpus, ranks=ranks)


HEAD, BIG, GPU = ("head", True, {}), ("big", True, {"CPU": 8.0}), ("gpu", True, {"CPU": 2.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("task", "held"),
    [
        (stack(8), True),
        (stack(9), False),  # 10 CPUs in all, on two machines
        (stack(2, 1), True),
        (stack(3, 0.5), False),  # the CPUs are where the GPU is not
        (stack(1, 0.5, ranks=2), True),
        (stack(1, 1, ranks=2), False),
        (stack(4, ranks=2), True),
        (stack(5, ranks=2), False),
    ],
)
def test_a_share_lies_on_one_node(task, held):
    places = Places(ray_with(HEAD, BIG, GPU))
    places.look()
    assert places.can_hold(task) == held


def test_nodes_that_are_gone_that_go_and_that_are_blind_hold_nothing():
    places = Places(
        ray_with(BIG, ("dead", False, {"CPU": 64.0}), ("going", True, {"CPU": 64.0}), draining=("going",))
    )
    places.look()
    assert places.draining == {"going"}
    assert places.can_hold(stack(8))
    assert not places.can_hold(stack(16))
    assert places.allowed() == {}
    places.blind["big"] = "n1"
    places.blind["another"] = "n2"
    places.look()
    assert not places.can_hold(stack(1))
    assert places.allowed() == {"ray.io/node-id": "!in(another,big)"}


def test_a_ray_that_does_not_tell_of_draining_nodes_is_no_error():
    ray = ray_with(BIG)
    del ray._private.worker.global_worker.gcs_client.get_draining_nodes
    places = Places(ray)
    places.look()
    assert places.draining == frozenset()
    assert places.can_hold(stack(8))


def test_a_stack_tells_where_its_ranks_began_last(tmp_path):
    folder = tmp_path / "stacks" / "000"
    assert places_of(folder) == set()
    note_place(folder, 0, "a")
    note_place(folder, 1, "b")
    assert places_of(folder) == {"a", "b"}
    forget_places(folder)
    assert places_of(folder) == set()
    note_place(folder, 0, "c")
    assert places_of(folder) == {"c"}

"""The plan, by values: shares, places, refusals, seeds. No cluster is started."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdl_train.distributed import Resources
from bdl_train.distributed.plan import MEMBERS_PER_STACK, Plan, assign_members, plan, refit
from bdl_train.errors import UsageError

EIGHT = Resources(cpus=8, gpus=0)
GPUS = Resources(cpus=16, gpus=2)


def planned(num_members: int, resources: Resources = EIGHT, **settings) -> Plan:
    given = {"num_workers": None, "members_per_stack": None, "cpus_per_stack": None, "gpus_per_stack": 0}
    return plan(num_members, resources, **{**given, **settings})


def sizes(one: Plan) -> list[int]:
    return [len(task.members) for task in one.stacks]


@given(st.integers(1, 500), st.integers(1, 60))
def test_shares_are_contiguous_whole_and_even(num_members, num_stacks):
    shares = assign_members(num_members, num_stacks)
    assert [member for share in shares for member in share] == list(range(num_members))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@given(
    st.integers(1, 300),
    st.integers(1, 64),
    st.sampled_from([0, 0, 1, 2, 5]),
    st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1]),
)
def test_any_plan_holds_every_member_once_and_fits(
    num_members, cpus, gpus, num_workers, members_per_stack, share
):
    made = planned(
        num_members,
        Resources(cpus, gpus),
        num_workers=num_workers,
        members_per_stack=members_per_stack,
        gpus_per_stack=share if gpus else 0,
    )
    assert [member for task in made.stacks for member in task.members] == list(range(num_members))
    assert max(sizes(made)) <= (members_per_stack or MEMBERS_PER_STACK)
    assert len({task.id for task in made.stacks}) == len(made.stacks)
    assert 1 <= made.num_workers <= min(num_workers or cpus, len(made.stacks))
    assert made.stacks[0].cpus * made.num_workers <= cpus
    if gpus:
        # A stack lies on one GPU.
        assert made.num_workers <= gpus * int(1 / share + 1e-9)


@pytest.mark.parametrize(
    ("num_members", "settings", "expected"),
    [
        (8, {"num_workers": 2}, [4, 4]),
        (7, {"num_workers": 2}, [3, 4]),
        (5, {"num_workers": 3}, [1, 2, 2]),
        (3, {"num_workers": 8}, [1, 1, 1]),
        (100, {"num_workers": 2}, [20] * 5),
        (101, {"num_workers": 2}, [16, 17, 17, 17, 17, 17]),
        (8, {"members_per_stack": 3}, [2, 3, 3]),
        (8, {"members_per_stack": 100}, [8]),
    ],
)
def test_members_need_not_be_divisible_by_workers(num_members, settings, expected):
    assert sizes(planned(num_members, **settings)) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(1, 2), (0.5, 4), (0.4, 4), (0.3, 6), (0.25, 8), (0.7, 2), (0.1, 16)]
)
def test_shares_of_a_gpu_fit_on_single_gpus(share, expected):
    # 0.4: two fit on each of the two GPUs, although 5 × 0.4 = 2. At 0.1 the 16 CPUs are the limit.
    made = planned(40, GPUS, members_per_stack=1, gpus_per_stack=share)
    assert made.num_workers == expected
    assert {task.gpus for task in made.stacks} == {share}


def test_workers_that_do_not_fit_are_given_up_with_the_reason():
    made = planned(8, num_workers=9, cpus_per_stack=3)
    assert made.num_workers == 2
    assert any("2 of 9 workers fit into 8 CPUs" in reason for reason in made.reasons)


@pytest.mark.parametrize(
    ("settings", "asked", "there"),
    [
        ({"gpus_per_stack": 1}, "cluster.gpus_per_stack=1 ", "0 GPUs"),
        ({"gpus_per_stack": 0.5}, "cluster.gpus_per_stack=0.5 ", "0 GPUs"),
        ({"cpus_per_stack": 9}, "cluster.cpus_per_stack=9 ", "8 CPUs"),
    ],
)
def test_what_no_resource_can_hold_is_refused_before_anything_waits_for_it(settings, asked, there):
    with pytest.raises(UsageError) as caught:
        planned(4, **settings)
    assert asked in str(caught.value)
    assert there in str(caught.value)


UNEQUAL = Resources.of_nodes([(8, 0), (2, 1), (0, 0)])


@pytest.mark.parametrize(
    ("settings", "workers", "cpus"),
    [
        ({"cpus_per_stack": 3}, 2, 3),  # 10 CPUs, but two of them alone on their machine
        ({"gpus_per_stack": 0.5}, 2, 1),  # both where the GPU is, with its CPUs
        ({"cpus_per_stack": 2, "gpus_per_stack": 0.5}, 1, 2),
        ({"cpus_per_stack": 1, "ranks_per_stack": 2}, 5, 1),
        ({"num_workers": 2}, 2, 4),  # 5 each would not fit on two machines of 8 and 2
    ],
)
def test_a_stack_lies_on_one_of_unequal_machines(settings, workers, cpus):
    made = planned(40, UNEQUAL, members_per_stack=1, **settings)
    assert (made.num_workers, made.stacks[0].cpus) == (workers, cpus)


def test_what_fits_on_no_single_machine_is_refused_with_all_of_them():
    for settings in ({"cpus_per_stack": 9}, {"cpus_per_stack": 3, "gpus_per_stack": 1}):
        with pytest.raises(UsageError) as caught:
            planned(4, UNEQUAL, **settings)
        for kind in ("1 machine with 8 CPUs and 0 GPUs", "1 machine with 2 CPUs and 1 GPU"):
            assert kind in str(caught.value)


def test_no_members_are_refused():
    with pytest.raises(UsageError, match="num_members must be 1 or more, got 0"):
        planned(0)


def test_every_plan_says_why():
    for made in (planned(16), planned(8, members_per_stack=2), planned(100, num_workers=2)):
        text = "\n".join(made.reasons)
        assert f"up to {max(sizes(made))} members in a stack" in text
        assert f"{len(made.stacks)} stacks, {made.num_workers} at a time" in text


def test_reasons_count_in_words_that_agree():
    one = planned(1, Resources(cpus=1, gpus=1), num_workers=2, gpus_per_stack=1)
    assert one.reasons == (
        "1 of 2 workers fit into 1 CPU and 1 GPU",
        "up to 1 member in a stack: 1 member over 1 worker, at most 20 in one stack",
        "1 stack with 1 CPU and 1 GPU",
    )
    assert planned(4, members_per_stack=2, num_workers=1).reasons == (
        "up to 2 members in a stack: cluster.members_per_stack=2",
        "2 stacks, 1 at a time, each with 8 CPUs and 0 GPUs; the others wait for their turn",
    )
    assert (
        refit(one, planned(1, EIGHT)).reasons[-1] == "resumed with 8 CPUs and 0 GPUs for the recorded stack"
    )


def test_seeds_belong_to_members_not_to_the_packing():
    def seeds(made: Plan, run_seed: int = 3) -> dict[int, int]:
        stored = made.to_json(run_seed)["stacks"]
        return {m: seed for one in stored for m, seed in zip(one["members"], one["seeds"], strict=True)}

    alone = seeds(planned(8, members_per_stack=1))
    assert alone == seeds(planned(8)) == seeds(planned(8, num_workers=3))
    more = seeds(planned(100, num_workers=2))
    assert more[7] == alone[7]
    assert len(set(more.values())) == 100
    assert seeds(planned(8), run_seed=4)[7] != alone[7]


def test_a_plan_survives_its_json():
    made = planned(7, GPUS, num_workers=2, gpus_per_stack=0.5)
    assert Plan.from_json(json.loads(json.dumps(made.to_json(0))), 7) == made


def test_a_damaged_plan_is_wrong_usage():
    stored = planned(2).to_json(0)
    del stored["stacks"][0]["members"]
    with pytest.raises(UsageError, match=r"plan\.json.*members"):
        Plan.from_json(stored, 2)


def test_a_resumed_plan_keeps_its_stacks_and_takes_todays_machine():
    recorded = planned(8, Resources(16, 2), num_workers=2, gpus_per_stack=1)
    today = planned(8, Resources(2, 0))
    refitted = refit(recorded, today)
    assert [task.members for task in refitted.stacks] == [task.members for task in recorded.stacks]
    assert [task.id for task in refitted.stacks] == [task.id for task in recorded.stacks]
    assert {(task.cpus, task.gpus) for task in refitted.stacks} == {(1, 0)}
    assert "resumed with 1 CPU and 0 GPUs" in refitted.reasons[-1]
    assert refit(recorded, recorded) is recorded


TOGETHER = "in svgd each member feels the others"


@pytest.mark.parametrize("num_members", [1, 5, 50])
@pytest.mark.parametrize("resources", [EIGHT, GPUS, Resources(1, 0)])
def test_members_that_interact_are_one_stack_with_the_reason(num_members, resources):
    made = planned(num_members, resources, num_workers=4, together=TOGETHER)
    assert sizes(made) == [num_members]
    assert made.num_workers == 1
    assert made.stacks[0].cpus == resources.cpus
    assert made.stacks[0].together == TOGETHER
    assert f"in one stack: {TOGETHER}" in "\n".join(made.reasons)
    assert Plan.from_json(json.loads(json.dumps(made.to_json(0))), num_members) == made
    assert planned(num_members).stacks[0].together is None


def test_cutting_members_that_interact_is_refused_with_the_key():
    for enough in (5, 9, None):
        assert sizes(planned(5, members_per_stack=enough, together=TOGETHER)) == [5]
    with pytest.raises(
        UsageError, match=rf"cluster\.members_per_stack=4 would cut 5 members.*{TOGETHER}.*Set it to 5"
    ):
        planned(5, members_per_stack=4, together=TOGETHER)


def test_a_recorded_plan_that_cuts_members_that_interact_is_damaged():
    today = planned(4, together=TOGETHER)
    old = planned(4, members_per_stack=4)
    assert refit(old, today).stacks[0].together == TOGETHER
    with pytest.raises(UsageError, match=rf"plan\.json is damaged: it has 2 stacks.*{TOGETHER}"):
        refit(planned(4, members_per_stack=2), today)
    stored = planned(2, together=TOGETHER).to_json(0)
    stored["stacks"][0]["together"] = 3
    with pytest.raises(UsageError, match="together of stack 000 must be text or null, got 3"):
        Plan.from_json(stored, 2)

"""What samplers share: which steps are kept, what is kept, and the members' own random numbers.

Shape letters: M members, K draws, P parameters.
"""

from itertools import pairwise

import pytest
import torch
from scipy import stats
from tiny_problems import example, through_disk, work
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference._draws import KeepEvery, Kept
from bdl_train.inference._noise import MemberNoise
from bdl_train.posteriors.chain import Chain
from bdl_train.stack import Layout, Stack

LIKE = torch.zeros(3, 4, dtype=torch.float64)


# --- which steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "burn_in", "thin", "num_draws", "taken"),
    [
        (10, 0, None, 5, [2, 4, 6, 8, 10]),
        (11, 0, None, 5, [3, 5, 7, 9, 11]),
        (10, 4, None, 3, [6, 8, 10]),
        (10, 0, 3, 3, [4, 7, 10]),
        (10, 9, None, 1, [10]),
        (10, 7, 1, 3, [8, 9, 10]),
    ],
)
def test_the_last_states_of_a_stretch_are_kept(num_steps, burn_in, thin, num_draws, taken):
    keep = KeepEvery.over(num_steps, burn_in, thin, num_draws)
    assert [step for step in range(num_steps + 5) if keep.keeps(step)] == taken


@pytest.mark.parametrize("thin", [None, 1, 2, 5])
@pytest.mark.parametrize("burn_in", [0, 3, 10])
@pytest.mark.parametrize("num_draws", [1, 2, 7])
def test_as_many_are_kept_as_were_asked_for_and_none_of_the_burn_in(num_draws, burn_in, thin):
    refused = 0
    for num_steps in range(1, 60):
        free = num_steps - burn_in
        try:
            keep = KeepEvery.over(num_steps, burn_in, thin, num_draws)
        except UsageError:
            assert free < 1 + (num_draws - 1) * (thin or 1)
            refused += 1
            continue
        taken = [step for step in range(1, num_steps + 1) if keep.keeps(step)]
        assert len(taken) == num_draws
        assert taken[0] > burn_in
        assert taken[-1] == num_steps
        assert {late - early for early, late in pairwise(taken)} <= {keep.thin}
        # Spread evenly: one step more between two draws would not fit into equal shares.
        assert thin is not None or (keep.thin + 1) * num_draws > free
    assert refused < 59


@pytest.mark.parametrize(
    ("num_steps", "burn_in", "thin", "num_draws", "message"),
    [
        (5, 0, None, 6, r"6 draws \(inference.num_draws\), 1 steps apart, need 6 steps .*there are 5 of 5"),
        (10, 2, 4, 3, r"3 draws .*4 steps apart, need 9 steps after the burn-in, there are 8 of 10"),
        (10, 12, None, 1, r"1 draws .*need 1 steps after the burn-in, there are 0 of 10"),
    ],
)
def test_too_few_steps_are_refused(num_steps, burn_in, thin, num_draws, message):
    with pytest.raises(UsageError, match=message):
        KeepEvery.over(num_steps, burn_in, thin, num_draws)


# --- what is kept -----------------------------------------------------------------------------------------------


def stack_at(number: float) -> Stack:
    """Two members of two parameters and a buffer of whole numbers."""
    flat = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * number
    return Stack(flat, {"count": torch.tensor([[7], [8]]) + int(number)}, Layout(("w",), ((2,),)))


def taken(numbers: list[float], num_draws: int) -> Kept:
    kept = Kept(stack_at(0), num_draws, ("potential",))
    for number in numbers:
        kept.take(stack_at(number), {"potential": torch.tensor([number, -number])})
    return kept


def assert_holds(kept: Kept, numbers: list[float]) -> None:
    """Members have these draws in this order."""
    for m, posterior in enumerate(kept.posteriors()):
        assert isinstance(posterior, Chain)
        assert torch.equal(posterior.flat, torch.stack([stack_at(number).flat[m] for number in numbers]))
        counts = torch.stack([stack_at(number).buffers["count"][m] for number in numbers])
        assert torch.equal(posterior.buffers["count"], counts)
        signed = torch.tensor(numbers, dtype=torch.float64) * (1, -1)[m]
        assert torch.equal(posterior.traces["potential"], signed)


def test_draws_stay_in_the_order_in_which_they_were_visited():
    assert_holds(taken([1, 2, 3], 3), [1, 2, 3])


def test_of_more_draws_the_last_ones_stay():
    assert_holds(taken([1, 2, 3, 4, 5, 6, 7], 3), [5, 6, 7])
    assert_holds(taken([1, 2], 1), [2])


def test_draws_are_copies():
    stack, kept = stack_at(1), Kept(stack_at(0), 1, ("potential",))
    potential = torch.tensor([1.0, -1.0])
    kept.take(stack, {"potential": potential})
    for tensor in (stack.flat, stack.buffers["count"], potential):
        tensor.zero_()
    first = kept.posteriors()
    kept.take(stack_at(2), {"potential": torch.tensor([2.0, -2.0])})
    assert torch.equal(first[0].moments()[0], stack_at(1).flat[0])
    assert_holds(kept, [2])


@pytest.mark.parametrize("before", [0, 1, 2, 3, 5])
def test_kept_draws_survive_a_checkpoint(before: int):
    numbers = [1.0, 2.0, 3.0, 4.0, 5.0]
    stored = through_disk(taken(numbers[:before], 3).state_dict())
    assert len(stored["flat"]) == 2
    assert stored["flat"].shape[1] == min(before, 3)
    kept = taken([9.0, 8.0], 3)
    kept.load_state_dict(stored)
    for number in numbers[before:]:
        kept.take(stack_at(number), {"potential": torch.tensor([number, -number])})
    assert_holds(kept, [3, 4, 5])


def test_a_posterior_before_the_last_draw_is_refused():
    with pytest.raises(RuntimeError, match="2 of 3 draws"):
        taken([1, 2], 3).posteriors()


# --- random numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [MemberNoise.normal, lambda noise: noise.uniform(5, 2)], ids=["normal", "uniform"]
)
def test_a_member_alone_draws_what_it_draws_in_a_stack(draw):
    stacked, alone = MemberNoise([5, 6, 7], LIKE), MemberNoise([6], LIKE[:1])
    numbers = [draw(stacked) for _ in range(3)]
    assert torch.equal(torch.stack(numbers)[:, 1:2], torch.stack([draw(alone) for _ in range(3)]))
    assert len({float(number) for number in torch.stack(numbers).flatten()}) == torch.stack(numbers).numel()


def test_shapes_and_dtype():
    noise = MemberNoise([1, 2, 3], LIKE)
    assert noise.normal().shape == (3, 4)
    assert noise.normal(2, 5).shape == (3, 2, 5)
    assert noise.uniform().shape == (3,)
    assert noise.uniform(6).shape == (3, 6)
    assert noise.normal().dtype == torch.float64
    assert MemberNoise([1], LIKE.float()[:1]).uniform(2).dtype == torch.float32


def test_numbers_follow_their_laws_and_members_are_independent():
    noise = MemberNoise([11, 12], LIKE)
    z, u = noise.normal(20_000), noise.uniform(20_000)
    for m in range(2):
        assert stats.kstest(z[m].numpy(), "norm").pvalue > 1e-4
        assert stats.kstest(u[m].numpy(), "uniform").pvalue > 1e-4
    # The correlation of n independent pairs has the standard error 1/√n.
    assert torch.corrcoef(z)[0, 1].abs() < 4.5 / 20_000**0.5
    assert torch.corrcoef(torch.stack([z[0, :-1], z[0, 1:]]))[0, 1].abs() < 4.5 / 20_000**0.5


def test_generators_go_on_after_a_checkpoint_and_leave_the_global_one_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = MemberNoise([1, 2, 3], LIKE)
    noise.normal()
    stored = through_disk(noise.state_dict())
    assert [len(tensor) for tensor in stored.values()] == [3]
    expected: list[Tensor] = [noise.normal(), noise.uniform(7)]
    other = MemberNoise([4, 5, 6], LIKE)
    other.load_state_dict(stored)
    assert torch.equal(other.normal(), expected[0])
    assert torch.equal(other.uniform(7), expected[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_does_not_hold_on_to_the_graph_of_the_weights():
    the_work = work(example("mlp"), [0, 1])
    flat = the_work.problem.stack.flat.clone().requires_grad_(True)
    assert not MemberNoise([1, 2], flat).normal().requires_grad

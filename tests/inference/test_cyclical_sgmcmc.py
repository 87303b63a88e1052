"""Cyclical SG-MCMC: its curve against the paper's, its two stages, its draws.

Shape letters: M members, S draws, P parameters.
"""

import math
from typing import Any

import pytest
import torch
from langevin_chains import assert_second_moments, by_hand, measured
from linear_gaussian import LinearGaussian, draws_of
from tiny_problems import KNOWN_NOISE, SGD, example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method, Setting
from bdl_train.inference._sgmcmc import FLOOR
from bdl_train.inference.cyclical_sgmcmc import Cycles, CyclicalSgmcmc
from bdl_train.posteriors.chain import Chain
from bdl_train.priors.gaussian import Gaussian

MODEL = LinearGaussian.make()
NUM_DATA = len(MODEL.y)
ONES = torch.ones(4, dtype=torch.float64)


def cyclical(**changed: Any) -> CyclicalSgmcmc:
    settings = {**node_of("inference", "cyclical_sgmcmc"), "preconditioner": "none", **changed}
    method = build(settings, Method, key="inference")
    assert isinstance(method, CyclicalSgmcmc)
    return method


def paper_lr(lr: float, k: int, num_steps: int, num_cycles: int) -> float:
    """Zhang et al. (2020), equation 1; k counts from 1."""
    length = math.ceil(num_steps / num_cycles)
    return lr / 2 * (math.cos(math.pi * ((k - 1) % length) / length) + 1)


# --- cycles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "num_cycles"), [(12, 3), (40, 4), (7, 1), (30, 30)])
def test_the_step_size_follows_the_paper(num_steps: int, num_cycles: int):
    cycles = Cycles(num_steps, num_cycles, 0.5)
    found = [0.3 * cycles.lr_factor(step) for step in range(num_steps)]
    expected = [paper_lr(0.3, k, num_steps, num_cycles) for k in range(1, num_steps + 1)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == 0.3


@pytest.mark.parametrize(("num_steps", "num_cycles"), [(10, 4), (11, 3), (50, 7), (51, 4)])
def test_cycles_that_do_not_divide_the_steps_differ_by_one(num_steps: int, num_cycles: int):
    cycles = Cycles(num_steps, num_cycles, 0.5)
    places = [cycles.place(step) for step in range(num_steps)]
    starts = [step for step, (at, _) in enumerate(places) if at == 0]
    assert len(starts) == num_cycles
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], num_steps], strict=True)]
    assert max(lengths) - min(lengths) == 1
    expected = [(at, length) for length in lengths for at in range(length)]
    assert places == expected


@pytest.mark.parametrize(
    ("length", "exploration", "first"),
    [(10, 0.7, 7), (30, 0.1, 3), (20, 0.75, 15), (10, 0.71, 8), (10, 0.0, 0), (3, 0.9, 3), (100, 0.29, 29)],
)
def test_sampling_starts_at_the_first_place_from_its_share_on(length: int, exploration: float, first: int):
    # Round-off must not move it: 0.1 · 30 is above 3, 0.29 · 100 is below 29.
    cycles = Cycles(length, 1, exploration)
    assert cycles.sampling_starts(length) == first
    assert [cycles.samples(step) for step in range(length)] == [step >= first for step in range(length)]


@pytest.mark.parametrize(
    ("exploration", "per_cycle", "taken"),
    [
        (0.5, 1, [9, 19]),
        (0.5, 2, [7, 9, 17, 19]),
        (0.2, 4, [3, 5, 7, 9, 13, 15, 17, 19]),
        (0.7, 3, [7, 8, 9, 17, 18, 19]),
    ],
)
def test_draws_spread_over_the_sampling_stages_up_to_their_ends(
    exploration: float, per_cycle: int, taken: list[int]
):
    cycles = Cycles(20, 2, exploration)
    assert [step for step in range(20) if cycles.keeps(step, per_cycle)] == taken


# --- the two stages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "friction"), [("sgld", None), ("sghmc", None), ("sghmc", 0.4)])
def test_exploration_is_descent_without_noise_and_clipped(kernel: str, friction: float | None):
    lost = friction or {"sgld": 1.0, "sghmc": 0.1}[kernel]
    method = cyclical(lr=0.05, kernel=kernel, friction=friction, exploration=0.5, num_cycles=1, num_draws=1)
    the_work = work(example("mlp"), [0, 1], num_epochs=8, clip_norm=0.2)
    state = method.init(the_work.problem)
    flat, velocity = state.stack.flat.clone(), torch.zeros_like(state.stack.flat)
    before = state.noise.state_dict()["generators"]
    potential, buffers = the_work.problem.potential, state.stack.buffers
    for k in range(1, 13):
        batch = the_work.batch(torch.arange(8 * (k % 3), 8 * (k % 3) + 8).expand(2, -1))
        grad = potential.value_and_grad(flat, buffers, batch).grad
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        clipped = torch.where(norm > 0.2, grad * 0.2 / norm, grad)
        now, last = paper_lr(0.05, k, 24, 1), paper_lr(0.05, max(1, k - 1), 24, 1)
        velocity = (1 - lost) * math.sqrt(now / last) * velocity - now * clipped
        flat = flat + velocity
        log = method.step(state, batch)
        torch.testing.assert_close(state.stack.flat, flat, rtol=1e-11, atol=1e-13)
        assert log.traces["lr"].tolist() == pytest.approx([paper_lr(0.05, k, 24, 1)] * 2)
    assert torch.equal(state.noise.state_dict()["generators"], before)
    the_work.advance(method, state, 1)
    assert not torch.equal(state.noise.state_dict()["generators"], before)


@pytest.mark.parametrize(("kernel", "friction"), [("sgld", None), ("sghmc", None), ("sghmc", 0.4)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("at", [3, 20, 24, 34, 39])
def test_a_step_is_that_of_its_kernel_with_the_step_size_of_its_place(
    kernel: str, friction: float | None, temperature: float, at: int
):
    """Two cycles of 20 steps, of which the last 8 sample: at 3, 20 and 24 they explore."""
    method = cyclical(
        lr=0.05,
        kernel=kernel,
        friction=friction,
        temperature=temperature,
        exploration=0.6,
        num_cycles=2,
        num_draws=2,
    )
    moved, pushed = measured(MODEL, method, at=at)
    expected, noise = by_hand(
        MODEL,
        lr=paper_lr(0.05, at + 1, 40, 2),
        friction=friction or {"sgld": 1.0, "sghmc": 0.1}[kernel],
        temperature=temperature,
        scale=ONES,
    )
    if at % 20:  # the momentum is kept in units of √lr, and starts a cycle at 0
        expected[:, 4:] *= math.sqrt(paper_lr(1, at + 1, 40, 2) / paper_lr(1, at, 40, 2))
    else:
        expected[:, 4:] = 0
    size, sampling = len(moved), at % 20 >= 12
    torch.testing.assert_close(moved, torch.from_numpy(expected[:size, :size]), rtol=1e-7, atol=1e-10)
    own = sampling * torch.from_numpy(noise[:size, :size])
    torch.testing.assert_close(pushed @ pushed.T, own, rtol=1e-7, atol=1e-14)


class OneStream:
    """Random numbers of all members from one generator: thousands of streams of their own are slow."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.generator = like, torch.Generator().manual_seed(4)

    def normal(self) -> Tensor:
        return torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype)


@pytest.mark.parametrize(("kernel", "lr"), [("sgld", 0.15), ("sghmc", 0.15)])
def test_draws_of_a_run_are_from_the_posterior_and_have_the_covariance_that_the_cycles_give(
    kernel: str, lr: float
):
    """Σ ← F Σ Fᵀ + Q with the F and Q of each step, from no variance at the start; momentum in units of √lr_k."""
    friction = {"sgld": 1.0, "sghmc": 0.1}[kernel]
    method = cyclical(lr=lr, kernel=kernel, friction=None, exploration=0.2, num_cycles=2, num_draws=4)
    the_work = MODEL.work(range(1500), batch_size=NUM_DATA, num_epochs=160)
    the_work.problem.stack.flat.copy_(MODEL.mean.expand(1500, -1))
    state = method.init(the_work.problem)
    state.noise = OneStream(state.stack.flat)  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(160):
        method.step(state, the_work.all_rows())
    draws = draws_of(method.posterior(state), 4)

    expected, joint = [], torch.zeros(8, 8, dtype=torch.float64)
    for step in range(160):
        now, before = (paper_lr(lr, k, 160, 2) for k in (step + 1, step))
        moved, noise = (
            torch.from_numpy(one)
            for one in by_hand(MODEL, lr=now, friction=friction, temperature=1.0, scale=ONES)
        )
        in_units = torch.ones(8, dtype=torch.float64)
        in_units[4:] = math.sqrt(now / before) if step % 80 else 0.0
        moved = moved * in_units
        joint = moved @ joint @ moved.T + (step % 80 >= 16) * noise
        if step in (47, 79, 127, 159):
            expected.append(joint[:4, :4])
    for i in range(4):
        assert_second_moments(draws[:, i : i + 1], MODEL.mean, expected[i], largest_error=0.05)
    # With the last and smallest steps it is the posterior itself, whatever was too wide before.
    for i in (1, 3):
        excess = torch.linalg.matrix_norm(expected[i] - MODEL.covariance())
        assert excess < 0.06 * torch.linalg.matrix_norm(MODEL.covariance())


@pytest.mark.parametrize(("kernel", "lost"), [("sgld", 1.0), ("sghmc", 0.1)])
def test_a_preconditioner_is_learned_anew_in_each_exploration_and_fixed_while_sampling(
    kernel: str, lost: float
):
    """Two cycles of 12 steps, 6 of which explore: G = 1/(r + FLOOR · mean r), r² the mean squared gradient so far."""
    method = cyclical(
        lr=0.01,
        kernel=kernel,
        exploration=0.5,
        num_cycles=2,
        num_draws=2,
        preconditioner="rmsprop",
        temperature=0.0,
    )
    the_work = work(example("mlp"), [0, 1], num_epochs=8)
    state, potential = method.init(the_work.problem), the_work.problem.potential
    flat, velocity, scale = state.stack.flat.clone(), torch.zeros_like(state.stack.flat), torch.empty(0)
    squares = []
    for k in range(1, 25):
        batch = the_work.batch(torch.arange(8 * (k % 3), 8 * (k % 3) + 8).expand(2, -1))
        grad = potential.value_and_grad(flat, {}, batch).grad
        at = (k - 1) % 12
        if at < 6:
            squares = [*(squares if at else []), grad.square()]
            r = torch.stack(squares).mean(0).sqrt()
            scale = 1 / (r + FLOOR * r.mean(1, keepdim=True))
        now, last = (paper_lr(0.01, max(1, one), 24, 2) for one in (k, k - 1))
        velocity = (1 - lost) * (math.sqrt(now / last) if at else 0.0) * velocity - now * scale * grad
        flat = flat + velocity
        method.step(state, batch)
        torch.testing.assert_close(state.stack.flat, flat, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kernel", ["sgld", "sghmc"])
def test_a_preconditioned_sampling_step_scales_force_and_noise_alike(kernel: str):
    method = cyclical(
        lr=0.05, kernel=kernel, exploration=0.6, num_cycles=2, num_draws=2, preconditioner="rmsprop"
    )
    root = torch.tensor([1.3, 0.6, 1.6, 0.4], dtype=torch.float64)
    _, pushed = measured(MODEL, method, at=34, root=root)
    _, noise = by_hand(
        MODEL,
        lr=paper_lr(0.05, 35, 40, 2),
        friction={"sgld": 1.0, "sghmc": 0.1}[kernel],
        temperature=1.0,
        scale=root.square(),
    )
    expected = torch.from_numpy(noise[: len(pushed), : len(pushed)])
    torch.testing.assert_close(pushed @ pushed.T, expected, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("kernel", ["sgld", "sghmc"])
def test_each_cycle_gives_as_many_draws_from_its_sampling_stage(kernel: str):
    method = cyclical(num_cycles=3, num_draws=6, exploration=0.6, kernel=kernel)
    the_work = work(example("mlp"), [0, 1], num_epochs=10)  # 30 steps
    method.check(the_work.problem.setting)
    state, weights, potentials = method.init(the_work.problem), [], []
    for _ in range(30):
        (log,) = the_work.advance(method, state, 1)
        weights.append(state.stack.flat.clone())
        potentials.append(log.potential)
    taken = [7, 9, 17, 19, 27, 29]
    for m, posterior in enumerate(method.posterior(state)):
        assert isinstance(posterior, Chain)
        assert torch.equal(posterior.flat, torch.stack([weights[step][m] for step in taken]))
        expected = torch.stack([potentials[step][m] for step in taken])
        assert torch.equal(posterior.traces["potential"], expected)


@pytest.mark.parametrize("before", [5, 13, 22, 29])
def test_a_run_resumed_with_more_epochs_adds_cycles_of_the_same_length(before: int):
    method = cyclical(num_cycles=3, num_draws=6, exploration=0.6)
    short, long, whole = (work(example("mlp"), [0, 1], num_epochs=num) for num in (10, 18, 10))
    state, expected = method.init(short.problem), method.init(whole.problem)
    short.advance(method, state, before)
    resumed = method.init(long.problem)
    resumed.load_state_dict(state.state_dict())
    long.advance(method, resumed, 30 - before)
    whole.advance(method, expected)
    assert torch.equal(resumed.kept.flat, expected.kept.flat)
    lr = [log.traces["lr"][0].item() for log in long.advance(method, resumed)]
    assert lr == pytest.approx([paper_lr(method.lr, k, 30, 3) for k in range(31, 55)])
    # Two more cycles, and four steps of a third that only explores.
    assert torch.equal(resumed.kept.flat[:, :2], expected.kept.flat[:, 4:])
    assert len(method.posterior(resumed)) == 2


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_draws": 31, "num_cycles": 5}, r"num_draws=31 must be a multiple of inference.num_cycles=5"),
        ({"kernel": "sgld", "friction": 0.3}, r"friction=0.3 means nothing to inference.kernel=sgld"),
        (
            {"preconditioner": "rmsprop", "exploration": 0.0},
            r"learned while exploring: set inference.exploration",
        ),
        ({"kernel": "hmc"}, r"inference.kernel"),
        ({"exploration": 1.0}, r"inference.exploration"),
        ({"num_cycles": 0}, r"inference.num_cycles"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changed: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        cyclical(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_draws": 15, "num_cycles": 5},
            r"3 draws a cycle .*there are 2 in a cycle of 10 steps .*exploration=0.8",
        ),
        ({"num_cycles": 30}, r"1 draws a cycle .*there are 0 in a cycle of 1 steps"),
        ({"num_cycles": 60, "num_draws": 60}, r"1 draws a cycle .*there are 0 in a cycle of 0 steps"),
    ],
)
def test_too_few_sampling_steps_are_refused(changed: dict[str, Any], message: str):
    setting = Setting(Gaussian(scale=1.0, fan_in=False), KNOWN_NOISE, 10, 40, 8)  # 50 steps
    cyclical(num_draws=10, num_cycles=5).check(setting)
    with pytest.raises(UsageError, match=message):
        cyclical(**changed).check(setting)


def test_it_uses_no_optimizer_and_no_scheduler():
    assert CyclicalSgmcmc.unused_groups == ("optimizer", "scheduler")
    adam = {"_target_": "torch.optim.Adam", "lr": 7.0}
    method = cyclical(num_cycles=2, num_draws=2, exploration=0.5)
    one, other = (work(example("mlp"), [0], num_epochs=4, optimizer=node) for node in (SGD, adam))
    states = [method.init(the_work.problem) for the_work in (one, other)]
    for the_work, state in zip((one, other), states, strict=True):
        the_work.advance(method, state)
    assert torch.equal(states[0].stack.flat, states[1].stack.flat)


def test_every_draw_says_in_which_cycle_it_was_taken():
    """Diagnostics must not take chains that start anew for chains that do not mix."""
    the_work = work(example("mlp"), [0, 1], num_epochs=12)
    method = cyclical(num_cycles=3, num_draws=6, exploration=0.4)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    for posterior in method.posterior(state):
        assert isinstance(posterior, Chain)
        assert posterior.traces["cycle"].tolist() == [0, 0, 1, 1, 2, 2]

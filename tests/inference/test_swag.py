"""SWAG: its moments by hand, its trajectory against SGD's stationary distribution, its draws against the matrix.

Shape letters: M members, T snapshots, K columns kept, P parameters.
"""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny_problems import KNOWN_NOISE, Example, example, node_of, work
from torch import Tensor, nn

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method, Setting
from bdl_train.inference.swag import Moments, Swag
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.potential import Batch
from bdl_train.priors.gaussian import Gaussian
from bdl_train.schedulers.step import Step
from bdl_train.specs import InputSpec


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def swag(**changed: Any) -> Swag:
    method = build({**node_of("inference", "swag"), **changed}, Method, key="inference")
    assert isinstance(method, Swag)
    return method


def moments_of(snapshots_TMP: Tensor, max_rank: int) -> Moments:
    moments = Moments.zeros(snapshots_TMP[0], max_rank)
    for flat in snapshots_TMP:
        moments.update(flat.clone())
    return moments


def posterior_of(snapshots_TP: Tensor, max_rank: int) -> LowRankGaussian:
    """The posterior of one member, through the method, for a trajectory given by hand."""
    method, the_work = swag(max_rank=max_rank), work(example("mlp"), [0])
    state = method.init(the_work.problem)
    state.moments = moments_of(snapshots_TP[:, None], max_rank)
    (posterior,) = method.posterior(state)
    assert isinstance(posterior, LowRankGaussian)
    return posterior


def random_snapshots(num: int, num_params: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(num, num_params, generator=generator, dtype=torch.float64)
    return 3.0 + steps.cumsum(0) @ torch.randn(
        num_params, num_params, generator=generator, dtype=torch.float64
    )


# --- moments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "mean", "variance"),
    [([5.0] * 4, 5.0, 0.0), ([1.0, 2.0, 3.0, 4.0], 2.5, 1.25), (range(300), 149.5, (300**2 - 1) / 12)],
)
def test_moments_of_known_trajectories(values, mean: float, variance: float):
    snapshots = torch.tensor(list(values), dtype=torch.float64)[:, None, None]
    moments = moments_of(snapshots, 2)
    assert moments.mean.item() == pytest.approx(mean, rel=1e-12)
    assert moments.sum_sq_dev.item() / moments.num_snapshots == pytest.approx(variance, rel=1e-12, abs=1e-15)
    assert moments.num_snapshots == len(snapshots)


def test_moments_are_per_member():
    snapshots_TMP = torch.stack([random_snapshots(9, seed=m) for m in range(3)], dim=1)
    moments = moments_of(snapshots_TMP, 4)
    torch.testing.assert_close(moments.mean, snapshots_TMP.mean(0), rtol=1e-12, atol=1e-13)
    variance_MP = snapshots_TMP.var(0, correction=0)
    torch.testing.assert_close(moments.sum_sq_dev / 9, variance_MP, rtol=1e-12, atol=1e-13)
    for m in range(3):
        alone = moments_of(snapshots_TMP[:, m : m + 1], 4)
        assert torch.equal(alone.deviations[0], moments.deviations[m])


def test_small_variances_far_from_zero_stay_positive_in_float32():
    """E[w²] − E[w]² gets these wrong: at |w| = 1 and standard deviation 1e-4, many come out negative."""
    generator = torch.Generator().manual_seed(0)
    snapshots_TP = (1.0 + 1e-4 * torch.randn(40, 5000, generator=generator)).float()
    naive_P = snapshots_TP.square().mean(0) - snapshots_TP.mean(0).square()
    assert (naive_P < 0).any()
    moments = moments_of(snapshots_TP[:, None], 0)
    variance_P = moments.sum_sq_dev[0] / 40
    assert (variance_P > 0).all()
    exact_P = snapshots_TP.double().var(0, correction=0)
    torch.testing.assert_close(variance_P.double(), exact_P, rtol=0.02, atol=0)


@pytest.mark.parametrize("num", [2, 3, 6, 11])
def test_columns_are_the_last_deviations_from_the_running_mean(num: int):
    snapshots_TP = random_snapshots(num)
    moments = moments_of(snapshots_TP[:, None], 6)
    running_mean_TP = snapshots_TP.cumsum(0) / torch.arange(1, num + 1)[:, None]
    expected_KP = (snapshots_TP - running_mean_TP)[-6:]
    kept_KP = moments.kept_deviations()[0]
    assert len(kept_KP) == min(num, 6)
    # A ring: the columns are a rotation of the last ones, and their order does not matter.
    rotation = num % 6 if num > 6 else 0
    torch.testing.assert_close(kept_KP, expected_KP.roll(rotation, 0), rtol=1e-10, atol=1e-12)
    assert torch.equal(moments.deviations[0, len(kept_KP) :], torch.zeros(6 - len(kept_KP), 5).double())


def test_states_share_no_tensors():
    method, the_work = swag(start_epoch=0, snapshot_every=1), work(example("mlp"), [0, 1])
    state = method.init(the_work.problem)
    the_work.advance(method, state, 5)
    assert state.moments.num_snapshots == 5
    other = method.init(the_work.problem)
    assert other.moments.num_snapshots == 0
    assert torch.equal(other.moments.mean, torch.zeros_like(state.stack.flat))
    assert not torch.equal(state.moments.mean, torch.zeros_like(state.stack.flat))


# --- which steps are snapshots ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, [12, 15, 18]),  # 6 epochs of 3 steps: from the middle on, at the end of each epoch
        ({"start_epoch": 1, "snapshot_every": 4}, [7, 11, 15]),
        ({"start_epoch": 5, "snapshot_every": 1}, [16, 17, 18]),
        ({"start_epoch": 0, "snapshot_every": 5}, [5, 10, 15]),
    ],
)
def test_snapshots_are_the_weights_after_these_steps(changed: dict[str, Any], taken: list[int]):
    method, the_work = swag(max_rank=4, **changed), work(example("mlp"), [0, 1], num_epochs=6)
    state, weights = method.init(the_work.problem), {}
    for step in range(1, 19):
        the_work.advance(method, state, 1)
        weights[step] = state.stack.flat.clone()
    expected = moments_of(torch.stack([weights[step] for step in taken]), 4)
    assert state.moments.num_snapshots == len(taken)
    assert torch.equal(state.moments.mean, expected.mean)
    assert torch.equal(state.moments.sum_sq_dev, expected.sum_sq_dev)
    assert torch.equal(state.moments.deviations, expected.deviations)


def test_the_schedule_governs_the_epochs_before_and_lr_factor_the_rest():
    the_work = work(
        example("mlp"),
        [0],
        optimizer={"_target_": "torch.optim.SGD", "lr": 0.1},
        schedule=Step(milestones=[0.5], gamma=0.1),
        num_epochs=6,
    )
    method = swag(start_epoch=4, lr_factor=0.7)
    state, rates = method.init(the_work.problem), []
    for _ in range(18):
        before = state.stack.flat.clone()
        (log,) = the_work.advance(method, state, 1)
        rates.append((torch.linalg.vector_norm(state.stack.flat - before) / log.grad_norm[0]).item())
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 6 + [0.07] * 6, rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start_epoch": 10}, r"inference.start_epoch=10 .*after the last epoch .*trainer.max_epochs=10"),
        ({"start_epoch": 25}, r"inference.start_epoch=25 .*after the last epoch"),
        ({"start_epoch": 9}, r"2 snapshots or more, these settings take 1"),
        ({"snapshot_every": 26}, r"2 snapshots or more, these settings take 0"),
    ],
)
def test_settings_that_leave_too_few_snapshots_are_refused(changed: dict[str, Any], message: str):
    setting = Setting(Gaussian(scale=1.0, fan_in=False), KNOWN_NOISE, 10, 40, 8)
    with pytest.raises(UsageError, match=message):
        swag(**changed).check(setting)


@pytest.mark.parametrize("changed", [{}, {"start_epoch": 8}, {"snapshot_every": 12}, {"start_epoch": 0}])
def test_the_check_counts_the_snapshots_that_training_takes(changed: dict[str, Any]):
    swag(**changed).check(Setting(Gaussian(scale=1.0, fan_in=False), KNOWN_NOISE, 10, 40, 8))
    the_work = work(example("mlp"), [0], batch_size=5, num_epochs=10)  # 26 examples: 5 steps an epoch
    method = swag(**changed)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 50)
    assert state.moments.num_snapshots >= 2


@pytest.mark.parametrize("start_epoch", [None, 0, 2])
@pytest.mark.parametrize("snapshot_every", [None, 1, 5, 7, 26])
def test_too_few_snapshots_are_refused_with_the_fewest_epochs_that_do(start_epoch, snapshot_every):
    method = swag(start_epoch=start_epoch, snapshot_every=snapshot_every)
    refused: dict[int, str] = {}
    for num_epochs in range(1 + (start_epoch or 0), 60):
        try:
            method.check(Setting(Gaussian(scale=1.0, fan_in=False), KNOWN_NOISE, num_epochs, 40, 8))
        except UsageError as error:
            refused[num_epochs] = str(error)
    for num_epochs, said in refused.items():
        start = num_epochs // 2 if start_epoch is None else start_epoch
        assert f"one every {snapshot_every or 5} steps from epoch {start} on" in said
        assert f"Raise trainer.max_epochs to {max(refused) + 1} or more" in said


def test_a_low_rank_of_one_is_refused():
    with pytest.raises(UsageError, match=r"max_rank must be 0 \(diagonal\) or 2 and more.*got 1"):
        swag(max_rank=1)


def test_a_posterior_before_two_snapshots_is_refused():
    method, the_work = swag(start_epoch=0), work(example("mlp"), [0])
    state = method.init(the_work.problem)
    the_work.advance(method, state, 3)
    with pytest.raises(
        RuntimeError, match=r"2 snapshots or more, this state has 1: .*inference.snapshot_every"
    ):
        method.posterior(state)


# --- the stationary distribution of SGD ------------------------------------------------------------------------


def quadratic() -> tuple[Example, Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """A linear model whose batches all have one Hessian, so that SGD is a linear recursion with additive noise.

    Groups of five examples share the inputs and differ in the targets; a batch is one group. Returns the data, the
    group members `[G, 5]`, the Hessian, the covariance of the batch gradient, and the MAP estimate.
    """
    num_groups, noise_std, precision = 12, 0.5, 4.0
    generator = torch.Generator().manual_seed(2)
    design = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    y_GB = design.sum(1) + torch.randn(num_groups, 5, generator=generator, dtype=torch.float64)
    spec = InputSpec((2,), (1, 1))
    of = Example(spec, design.repeat(num_groups, 1), y_GB.flatten(), KNOWN_NOISE, lambda: nn.Linear(2, 1))
    x_BP = np.concatenate([design.numpy(), np.ones((5, 1))], axis=1)
    num_data = 5 * num_groups
    hessian = x_BP.T @ x_BP / (5 * noise_std**2) + precision / num_data * np.eye(3)
    pulls_GP = y_GB.numpy() @ x_BP / (5 * noise_std**2)
    groups = torch.arange(num_data).reshape(num_groups, 5)
    return of, groups, hessian, np.cov(pulls_GP.T, bias=True), np.linalg.solve(hessian, pulls_GP.mean(0))


def autocovariance(stationary: np.ndarray, decay: np.ndarray, num: int) -> np.ndarray:
    """cov(θ_t, θ_s) `[T, T, P, P]` of snapshots of θ ← decay θ + noise in its stationary state."""
    powers = [np.linalg.matrix_power(decay, lag) @ stationary for lag in range(num)]
    return np.array([[powers[t - s] if t >= s else powers[s - t].T for s in range(num)] for t in range(num)])


def test_moments_of_sgd_on_a_quadratic_are_those_of_its_stationary_distribution():
    """Σ solves Σ = (I − lr H) Σ (I − lr H)ᵀ + lr² C (discrete Lyapunov), for steps of the learning rate lr."""
    lr, every, num_snapshots, max_rank, num_members, burn_in = 0.15, 2, 60, 20, 400, 96
    of, groups, hessian, noise, optimum = quadratic()
    contraction = np.eye(3) - lr * hessian
    stationary = scipy.linalg.solve_discrete_lyapunov(contraction, lr**2 * noise)

    the_work = work(
        of,
        range(num_members),
        prior=Gaussian(scale=0.5, fan_in=False),
        optimizer={"_target_": "torch.optim.SGD", "lr": lr},
        batch_size=5,
        num_epochs=(burn_in + every * num_snapshots) // 12,
    )
    method = swag(start_epoch=burn_in // 12, snapshot_every=every, max_rank=max_rank)
    the_work.problem.stack.flat[:] = torch.tensor(optimum)
    state = method.init(the_work.problem)
    generator = torch.Generator().manual_seed(6)
    for _ in range(the_work.problem.num_steps):
        # Independent batches: an epoch's permutation would make the noise of successive steps cancel.
        index_MB = groups[torch.randint(len(groups), (num_members,), generator=generator)]
        method.step(state, Batch(of.x[index_MB], of.y[index_MB], index_MB))
    assert state.moments.num_snapshots == num_snapshots
    posteriors = [p for p in method.posterior(state) if isinstance(p, LowRankGaussian)]

    def assert_mean_is(found_M: Tensor, expected: np.ndarray, largest_error: float) -> None:
        """Members are independent, so their own spread is the standard error."""
        error = found_M.std(0) / math.sqrt(num_members)
        assert ((found_M.mean(0) - torch.tensor(expected)) / error).abs().max() < 4
        assert (error / torch.tensor(np.abs(expected)).max()).max() < largest_error

    # Snapshots are correlated in time, so their moments differ from Σ by known terms of the autocovariance.
    cov_TTPP = autocovariance(stationary, np.linalg.matrix_power(contraction, every), num_snapshots)
    of_mean = cov_TTPP.mean((0, 1))
    assert_mean_is(torch.stack([p.mean for p in posteriors]), optimum, 0.01)
    assert_mean_is(torch.stack([p.variance for p in posteriors]), np.diag(stationary - of_mean), 0.03)
    columns = np.zeros((3, 3))
    for t in range(num_snapshots - max_rank, num_snapshots):
        weights = np.eye(num_snapshots)[t] - np.where(np.arange(num_snapshots) <= t, 1 / (t + 1), 0)
        columns += np.einsum("t,s,tspq->pq", weights, weights, cov_TTPP)
    low_rank = torch.stack([p.deviations.T @ p.deviations / (max_rank - 1) for p in posteriors])
    assert_mean_is(low_rank.flatten(1), (columns / (max_rank - 1)).flatten(), 0.03)
    # And with many snapshots those terms are small: SWAG's matrix is near Σ itself.
    approximate = 0.5 * np.diag(np.diag(stationary)) + 0.5 * stationary
    found = torch.stack([0.5 * p.variance.diag() for p in posteriors]).mean(0) + 0.5 * low_rank.mean(0)
    np.testing.assert_allclose(found, approximate, rtol=0.15, atol=0.15 * np.abs(stationary).max())


# --- draws -----------------------------------------------------------------------------------------------------


def draws_of(posterior: LowRankGaussian, num: int) -> Tensor:
    return torch.stack([flat for flat, _ in posterior.draw(num, seed=3)])


def assert_covariance(draws: Tensor, expected_PP: Tensor) -> None:
    """Entry by entry within five standard errors, √((C_ii C_jj + C_ij²) / n)."""
    variances = expected_PP.diag()
    error_PP = ((variances[:, None] * variances + expected_PP.square()) / len(draws)).sqrt()
    assert ((draws.T.cov() - expected_PP) / error_PP).abs().max() < 5


@pytest.mark.parametrize(("num_snapshots", "max_rank"), [(5, 3), (9, 3), (4, 20)])
def test_draws_have_the_mean_and_covariance_computed_by_hand(num_snapshots: int, max_rank: int):
    snapshots = random_snapshots(num_snapshots)
    posterior = posterior_of(snapshots, max_rank)
    running_mean = snapshots.cumsum(0) / torch.arange(1, num_snapshots + 1)[:, None]
    d_KP = (snapshots - running_mean)[-max_rank:]
    num_columns = min(num_snapshots, max_rank)
    expected_PP = snapshots.var(0, correction=0).diag() / 2 + d_KP.T @ d_KP / (2 * (num_columns - 1))
    draws = draws_of(posterior, 8000)
    assert_covariance(draws, expected_PP)
    z = (draws.mean(0) - snapshots.mean(0)) / (expected_PP.diag() / len(draws)).sqrt()
    assert z.abs().max() < 5
    mean, variance = posterior.moments()
    torch.testing.assert_close(mean, snapshots.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, expected_PP.diag(), rtol=1e-10, atol=1e-12)


def test_perfectly_correlated_layers_have_correlation_one_half_in_draws():
    """One vector z serves all tensors: the low-rank half carries the whole correlation, the diagonal half none."""
    path = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    snapshots = torch.stack([path, -2 * path], dim=1)  # a weight of one layer, a weight of another
    draws = draws_of(posterior_of(snapshots, 400), 8000)
    # The columns are relative to the running mean, so their half is not quite the variance's half.
    assert torch.corrcoef(draws.T)[0, 1].item() == pytest.approx(-0.5, abs=0.03)


def test_a_rank_of_zero_is_the_diagonal_not_halved():
    snapshots = random_snapshots(7)
    posterior = posterior_of(snapshots, 0)
    expected_PP = snapshots.var(0, correction=0).diag()
    assert_covariance(draws_of(posterior, 8000), expected_PP)
    torch.testing.assert_close(posterior.moments()[1], expected_PP.diag(), rtol=1e-10, atol=1e-12)


def test_a_constant_trajectory_draws_its_point():
    posterior = posterior_of(torch.full((4, 5), 5.0, dtype=torch.float64), 3)
    assert torch.equal(draws_of(posterior, 3), torch.full((3, 5), 5.0, dtype=torch.float64))


def test_a_draw_depends_on_its_number_alone():
    members = [posterior_of(random_snapshots(6, seed=s), 4) for s in range(3)]
    ensemble = EnsemblePosterior([0, 1, 2], members, num_draws=5, seed=11)
    whole = torch.cat([chunk.flat for chunk in ensemble.draw(chunk_size=100)])
    for chunk_size in (1, 2, 4, 15):
        chunks = list(ensemble.draw(chunk_size=chunk_size))
        assert max(len(chunk) for chunk in chunks) <= chunk_size
        assert torch.equal(torch.cat([chunk.flat for chunk in chunks]), whole)
    assert torch.equal(draws_of(members[0], 9)[:4], draws_of(members[0], 4))
    assert len(whole.unique(dim=0)) == 15


def test_more_epochs_after_a_resume_leave_the_start_where_it_was():
    method = swag(start_epoch=None)
    begun = method.init(work(example("mlp"), [0, 1], num_epochs=4).problem)
    longer = work(example("mlp"), [0, 1], num_epochs=40).problem
    resumed = method.init(longer)
    resumed.load_state_dict(begun.state_dict())
    assert resumed.start_step == 2 * longer.steps_per_epoch

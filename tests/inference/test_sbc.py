"""Simulation-based calibration: truths from the prior rank evenly among the draws of the posteriors of their own data.

Each member of one stack is a replication with a truth and rows of its own. Shape letters: M members, N examples,
P parameters, S draws of a member, Q quantities.

Source:
    Talts et al. (2018), arXiv:1804.06788, Algorithm 1; Modrák et al. (2023), arXiv:2211.02383, for the likelihood as a
    quantity: ranks of weights alone do not notice a sampler that ignores the data.
"""

from typing import Any

import pytest
import scipy.stats
import torch
from tiny_problems import LEARNED_NOISE, Example, Work, node_of, work
from torch import Tensor, nn

from bdl_train.build import build
from bdl_train.inference import Method
from bdl_train.potential import Batch
from bdl_train.priors.gaussian import Gaussian
from bdl_train.specs import InputSpec

METHODS: dict[str, dict[str, Any]] = {
    "hmc": {"patience": None, "num_warmup": 150, "num_draws": 31, "thin": 6, "num_leapfrog": 8},
    "mclmc": {
        "patience": None,
        "num_warmup": 600,
        "energy_variance_end": 5e-4,
        "num_draws": 31,
        "thin": 25,
    },
}
"""Settings under which the draws of a chain are nearly independent, 31 of them or another number that gives `BINS`."""
NUM_REPLICATIONS, NUM_DATA, BINS = 384, 8, 16
NAMES = ("weight", "bias", "log noise", "prediction", "log likelihood")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def replications() -> tuple[Work, Tensor, Batch]:
    """A linear model with learned noise, M truths `[M, P]` from its prior, and M data sets from these truths."""
    generator = torch.Generator().manual_seed(11)
    x_MN1 = torch.randn(NUM_REPLICATIONS, NUM_DATA, 1, generator=generator, dtype=torch.float64)
    of = Example(InputSpec((1,)), x_MN1[0], x_MN1[0, :, 0], LEARNED_NOISE, lambda: nn.Linear(1, 1))
    the_work = work(of, range(NUM_REPLICATIONS), prior=Gaussian(scale=1.0, fan_in=False), num_epochs=5)
    problem = the_work.problem
    assert problem.stack.layout.names == ("weight", "bias", "likelihood.log_noise_std")
    truth_MP = problem.potential.prior.sample(NUM_REPLICATIONS, generator)
    z_MN = torch.randn(NUM_REPLICATIONS, NUM_DATA, generator=generator, dtype=torch.float64)
    # By hand, and not by the likelihood under test.
    w_M1, b_M1, log_noise_M1 = truth_MP.split(1, dim=1)
    y_MN = w_M1 * x_MN1[..., 0] + b_M1 + log_noise_M1.exp() * z_MN
    return the_work, truth_MP, Batch(x_MN1, y_MN, torch.arange(NUM_DATA).expand(NUM_REPLICATIONS, -1))


def quantities(flat: Tensor, batch: Batch) -> Tensor:
    """`[..., M, P]` to `[..., M, Q]`, in the order of `NAMES`."""
    w, b, log_noise = flat.split(1, dim=-1)
    z = (batch.y - w * batch.x[..., 0] - b) / log_noise.exp()
    log_lik = (-0.5 * z.square() - log_noise).sum(-1, keepdim=True)
    return torch.cat([flat, 1.5 * w + b, log_lik], dim=-1)


def ranks(method: Method[Any]) -> Tensor:
    """How many draws of each member lie below its truth, `[M, Q]`, from 0 to S."""
    the_work, truth_MP, batch = replications()
    state = method.init(the_work.problem)
    phases = method.phases(the_work.problem.setting)
    for number, phase in enumerate(phases):
        if number > 0:
            state.phase, state.step, state.active = number, 0, ~state.failed
            method.enter(state)
        for _ in range(phase.num_steps):
            method.step(state, batch)
    assert not state.failed.any()
    draws_SMP = torch.stack(
        [
            torch.stack([flat for flat, _ in one.draw(method.num_draws, seed=1)])
            for one in method.posterior(state)
        ],
        dim=1,
    )
    return (quantities(draws_SMP, batch) < quantities(truth_MP, batch)).sum(0)


def p_values(rank_MQ: Tensor, num_draws: int) -> list[float]:
    """Of the chi-square test of evenly spread ranks, quantity by quantity."""
    assert (num_draws + 1) % BINS == 0
    bin_MQ = rank_MQ * BINS // (num_draws + 1)
    return [float(scipy.stats.chisquare(torch.bincount(bin_M, minlength=BINS)).pvalue) for bin_M in bin_MQ.T]


@pytest.mark.parametrize("name", METHODS)
def test_truths_rank_evenly_among_posterior_draws_and_not_among_those_of_half_the_temperature(name: str):
    def run(temperature: float) -> dict[str, float]:
        settings = {**node_of("inference", name), **METHODS[name], "temperature": temperature}
        method = build(settings, Method, key="inference")
        return dict(zip(NAMES, p_values(ranks(method), method.num_draws), strict=True))

    found = run(1.0)
    # Five tests: a sampler that is right passes below 0.001 once in 200 seeds, and the seed is fixed.
    assert min(found.values()) > 1e-3, found
    cold = run(0.5)
    assert max(cold.values()) < 1e-6, cold


def test_the_test_of_ranks_finds_bias_and_too_narrow_draws_and_passes_even_ones():
    generator = torch.Generator().manual_seed(0)
    even_M = torch.randint(32, (2000,), generator=generator)
    shifted_M = (even_M + 2).clamp(max=31)
    outer_M = torch.where(torch.rand(2000, generator=generator) < 0.1, 31, even_M)
    even, shifted, outer = p_values(torch.stack([even_M, shifted_M, outer_M], dim=1), 31)
    assert even > 0.01
    assert shifted < 1e-6
    assert outer < 1e-6

"""Deep ensembles: members are MAP estimates, and the prior's share is scaled by N once."""

from typing import Any

import pytest
import torch
from tiny_problems import CONF, KNOWN_NOISE, SGD, Example, Work, example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.inference import Method
from bdl_train.models.mlp import Mlp
from bdl_train.priors.gaussian import Gaussian
from bdl_train.schedulers.step import Step
from bdl_train.specs import InputSpec

NOISE_STD, PRIOR_STD = 0.5, 0.25


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def deep_ensemble(**changed: Any) -> Method[Any]:
    return build({**node_of("inference", "deep_ensemble"), **changed}, Method, key="inference")


def linear_example(copies: int = 1) -> Example:
    spec = InputSpec((4,), (1, 1, 2))
    of = example("mlp", num_data=12)
    return Example(
        spec,
        of.x.repeat(copies, 1),
        of.y.repeat(copies),
        KNOWN_NOISE,
        lambda: Mlp(hidden=[], activation="relu", dropout=0.0).network(spec, 1),
    )


def ridge(of: Example, precision: float) -> Tensor:
    """argmin ‖y − Xθ‖² / (2σ²) + precision/2 ‖θ‖², X with a column of ones for the bias."""
    x_NP = torch.cat([of.x, torch.ones(len(of.x), 1, dtype=of.x.dtype)], dim=1)
    a_PP = x_NP.T @ x_NP / NOISE_STD**2 + precision * torch.eye(5, dtype=of.x.dtype)
    return torch.linalg.solve(a_PP, x_NP.T @ of.y / NOISE_STD**2)


def map_estimates(of: Example, optimizer: dict[str, Any], batch_size: int, num_steps: int) -> Tensor:
    the_work: Work = work(
        of,
        [0, 1, 2],
        prior=Gaussian(scale=PRIOR_STD, fan_in=False),
        optimizer=optimizer,
        batch_size=batch_size,
    )
    method = deep_ensemble(patience=None)
    state = method.init(the_work.problem)
    the_work.advance(method, state, num_steps)
    return torch.cat([posterior.tensors()["atoms"] for posterior in method.posterior(state)])


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_members_are_the_map_and_duplicated_data_shrink_the_priors_share(copies: int):
    of = linear_example(copies)
    found = map_estimates(of, {**SGD, "lr": 0.1}, len(of.y), 400)
    torch.testing.assert_close(found, ridge(of, PRIOR_STD**-2).expand(3, -1), rtol=1e-8, atol=1e-10)
    # The same data once, with a prior of 1 / copies of the precision: the halved share, by another road.
    once = ridge(linear_example(), PRIOR_STD**-2 / copies)
    torch.testing.assert_close(found, once.expand(3, -1), rtol=1e-8, atol=1e-10)
    assert (ridge(linear_example(), PRIOR_STD**-2) - once).abs().max() > 0.05 or copies == 1


def test_an_optimisers_weight_decay_adds_to_the_prior_and_stands_at_zero_by_default():
    """L2 weight decay λ on a potential per example is a Gaussian precision of N λ on top of the prior's."""
    of, decay = linear_example(), 0.3
    found = map_estimates(of, {**SGD, "lr": 0.1, "weight_decay": decay}, len(of.y), 600)
    expected = ridge(of, PRIOR_STD**-2 + len(of.y) * decay)
    torch.testing.assert_close(found, expected.expand(3, -1), rtol=1e-8, atol=1e-10)
    for path in (CONF / "optimizer").glob("*.yaml"):
        assert node_of("optimizer", path.stem)["weight_decay"] == 0.0


def test_the_update_of_a_member_does_not_depend_on_how_many_there_are():
    steps = []
    for members in ([2], list(range(12))):
        the_work = work(example("mlp"), members, optimizer={"_target_": "torch.optim.SGD", "lr": 1.0})
        before = the_work.problem.stack.flat.clone()
        method = deep_ensemble()
        state = method.init(the_work.problem)
        the_work.advance(method, state, 1)
        steps.append((state.stack.flat - before)[members.index(2)])
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=1e-15)


def test_the_posterior_is_one_atom_a_member_at_its_weights():
    the_work = work(example("conv-batch-norm"), [0, 1, 2])
    method = deep_ensemble()
    state = method.init(the_work.problem)
    the_work.advance(method, state, 3)
    posteriors = method.posterior(state)
    assert [posterior.num_atoms for posterior in posteriors] == [1, 1, 1]
    for m, posterior in enumerate(posteriors):
        ((flat, buffers),) = posterior.draw(1, seed=0)
        assert torch.equal(flat, state.stack.flat[m])
        assert all(torch.equal(buffers[name], b[m]) for name, b in state.stack.buffers.items())
    kept = posteriors[0].tensors()["atoms"].clone()
    the_work.advance(method, state, 1)
    assert torch.equal(posteriors[0].tensors()["atoms"], kept)


def test_the_learning_rate_follows_the_schedule_by_step():
    """With SGD and no momentum the change of a step is lr · factor(step) · gradient."""
    schedule = Step(milestones=[0.5], gamma=0.1)
    settings = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}, "num_epochs": 2}
    the_work = work(example("mlp"), [0, 1], schedule=schedule, **settings)
    method = deep_ensemble()
    state = method.init(the_work.problem)
    ratios = []
    for _ in range(6):
        before = state.stack.flat.clone()
        (log,) = the_work.advance(method, state, 1)
        change = torch.linalg.vector_norm(state.stack.flat - before, dim=1)
        ratios.append((change / log.grad_norm).tolist())
    torch.testing.assert_close(
        torch.tensor(ratios), torch.tensor([[0.1] * 2] * 3 + [[0.01] * 2] * 3), rtol=1e-6, atol=0
    )

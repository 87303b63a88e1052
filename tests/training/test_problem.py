"""From a resolved config to the problem of one stack: what is refused, and what every setting reaches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_problems import config_of, data_of, example, node_of
from torch import Tensor, nn

from bdl_train.data import Data
from bdl_train.errors import UsageError
from bdl_train.inference import Problem
from bdl_train.priors import BoundGaussian, Prior
from bdl_train.seeds import Stream, member_seed
from bdl_train.stack import Layout, build_stack
from bdl_train.training.problem import Recipe, require_different

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("BDL_ALLOW", __name__)


def data() -> Data:
    return data_of(example("mlp"))


def problem(members: tuple[int, ...] = (0, 1), attempt: int = 0, **changed: Any) -> tuple[Problem, str]:
    return Recipe.of(config_of(**changed), data()).problem(data(), members, attempt, CPU)


def test_the_trainers_settings_reach_the_problem():
    plain, reason = problem()
    assert plain.potential.num_data == 14
    assert (plain.steps_per_epoch, plain.num_steps, plain.clip_norm) == (1, 6, None)
    assert reason.startswith("vmap")
    assert plain.stack.flat.dtype == torch.float64
    assert problem(trainer={"clip_norm": 0.7})[0].clip_norm == 0.7
    assert problem(trainer={"max_epochs": 9})[0].num_steps == 9
    assert problem(trainer={"precision": "32-true"})[0].stack.flat.dtype == torch.float32
    assert problem(trainer={"executor": "loop"})[1].startswith("loop")
    assert problem(data={"batch_size": 3})[0].steps_per_epoch == 4


@pytest.mark.parametrize("method", ["deep_ensemble", "anchored", "swag"])
def test_trainer_compile_reaches_the_potential_that_the_method_steps_on(method: str):
    for compiled in (True, False):
        inference = node_of("inference", method)
        settings = {"inference": inference, "trainer": {"compile": compiled, "max_epochs": 60}}
        recipe = Recipe.of(config_of(**settings), data())
        the_problem, _ = recipe.problem(data(), (0, 1), 0, CPU)
        assert recipe.method.init(the_problem).potential.compile is compiled


@pytest.mark.parametrize(
    ("name", "compiled", "on_cpu", "on_gpu"),
    [
        ("mclmc", "auto", True, False),
        ("mclmc", True, True, True),
        ("mclmc", False, False, False),
        ("deep_ensemble", "auto", False, False),
    ],
)
def test_auto_compiles_long_chains_on_a_cpu(name: str, compiled: Any, on_cpu: bool, on_gpu: bool):
    recipe = Recipe.of(config_of(inference=node_of("inference", name), trainer={"compile": compiled}), data())
    setting = recipe.setting(data())
    assert recipe.compiles_steps(setting, CPU) is on_cpu
    assert recipe.compiles_steps(setting, torch.device("cuda")) is on_gpu


def test_members_are_built_by_their_own_seeds_whatever_the_stack():
    stack = problem((0, 1, 5))[0].stack
    assert torch.equal(stack.flat[2], problem((5,))[0].stack.flat[0])
    assert not torch.equal(stack.flat[2], problem((5,), attempt=1)[0].stack.flat[0])
    seeds = problem((0, 1, 5))[0].noise_seeds
    assert len(set(seeds)) == 3
    assert seeds[2] == problem((5,))[0].noise_seeds[0]
    # A stream of its own: noise must not repeat the draws that made the initial weights.
    assert seeds == [member_seed(config_of()["seed"], m, Stream.NOISE) for m in (0, 1, 5)]


@dataclass(frozen=True, kw_only=True)
class PriorOfEachMember(Prior):
    """Member m around m, as `from_posterior` per member."""

    starts_members = True

    def bind(self, layout: Layout, members: Sequence[int]) -> BoundGaussian:
        mean = torch.tensor(members, dtype=torch.float32)[:, None].expand(-1, layout.num_params)
        return BoundGaussian(mean.clone(), torch.full_like(mean, 0.5))


def test_a_start_from_the_prior_does_not_depend_on_the_place_in_the_stack():
    prior = {"_target_": f"{__name__}.PriorOfEachMember"}
    together = problem((0, 1, 5), prior=prior)[0].stack.flat
    for m, member in enumerate((0, 1, 5)):
        assert torch.equal(together[m], problem((member,), prior=prior)[0].stack.flat[0])
        assert together[m].mean() == pytest.approx(member, abs=5 * 0.5 / together.shape[1] ** 0.5)


class SeedsItself(nn.Module):
    """Every member gets the same weights: the classic accident."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class StartsAtZero(SeedsItself):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.layer.weight)
        nn.init.ones_(self.layer.bias)


def test_members_that_start_equal_by_accident_are_refused():
    model = {"_target_": f"{__name__}.SeedsItself"}
    # Before any stack is built, so that members of different stacks are caught too.
    for members in ((0, 1), (0,)):
        with pytest.raises(UsageError, match=r"model: Two members .* start at the same weights.*generator"):
            problem(members, model=model)
    with pytest.raises(RuntimeError, match="start at the same weights"):
        problem((3, 1, 3))


def test_constant_initial_weights_are_allowed_and_logged(caplog):
    with caplog.at_level(logging.WARNING, logger="bdl_train"):
        problem(model={"_target_": f"{__name__}.StartsAtZero"})
    assert "members start equal" in caplog.text


def test_one_shared_tensor_among_different_ones_is_no_accident(caplog):
    """Norm layers start at the same ones and zeros in every member; only whole members are compared."""
    _, stack = build_stack(lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), [1, 2])
    require_different(stack)
    stack.flat[1] = stack.flat[0]
    with pytest.raises(RuntimeError):
        require_different(stack)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "CosineAnnealingLR"])
def test_torchs_schedulers_are_refused_with_the_reason(name: str):
    scheduler = {"_target_": f"torch.optim.lr_scheduler.{name}"}
    with pytest.raises(UsageError, match=rf"scheduler={name} .*function of the step") as caught:
        Recipe.of(config_of(scheduler=scheduler), data())
    assert "scheduler=constant, cosine or step" in str(caught.value)


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "Muon", "SparseAdam"])
def test_optimisers_that_mix_members_are_refused_before_training(name: str):
    with pytest.raises(UsageError, match=f"optimizer={name} cannot train a stack"):
        Recipe.of(config_of(optimizer={"_target_": f"torch.optim.{name}", "lr": 0.1}), data())


def test_swag_that_starts_too_late_is_refused_before_training():
    inference = {**node_of("inference", "swag"), "start_epoch": 6}
    with pytest.raises(UsageError, match=r"inference.start_epoch=6 starts SWAG after the last epoch"):
        Recipe.of(config_of(inference=inference), data())


def test_anchored_with_another_prior_is_refused_before_training():
    settings = {"inference": node_of("inference", "anchored"), "prior": node_of("prior", "laplace")}
    with pytest.raises(UsageError, match="inference=anchored needs a Gaussian prior"):
        Recipe.of(config_of(**settings), data())


class Attends(nn.Module):
    """Dropout as a rate of a layer and not a layer of its own."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, dropout=rate, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return self.head(self.attention(x, x, x)[0].squeeze(1))


class WithDropout(nn.Sequential):
    def __init__(self, rate: float) -> None:
        super().__init__(nn.Linear(4, 4), nn.Dropout(rate), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("model", "key", "layer"),
    [
        ({}, "dropout", "Dropout"),
        ({"_target_": f"{__name__}.WithDropout"}, "rate", "Dropout"),
        ({"_target_": f"{__name__}.Attends"}, "rate", "MultiheadAttention"),
    ],
)
def test_a_method_on_a_fixed_potential_refuses_dropout_before_training(
    model: dict[str, str], key: str, layer: str
):
    inference = node_of("inference", "hmc")
    Recipe.of(config_of(inference=inference, model={**model, key: 0.0}), data())
    with pytest.raises(
        UsageError, match=rf"inference=hmc needs a potential that is one function.*'s {layer} "
    ):
        Recipe.of(config_of(inference=inference, model={**model, key: 0.1}), data())


@pytest.mark.parametrize("name", ["hmc", "mclmc"])
def test_chains_that_follow_energies_refuse_bfloat16(name: str):
    inference = node_of("inference", name)
    Recipe.of(config_of(inference=inference, trainer={"precision": "32-true"}), data())
    with pytest.raises(UsageError, match=rf"inference={name} .*trainer.precision must be 32-true or 64-true"):
        Recipe.of(config_of(inference=inference, trainer={"precision": "bf16-mixed"}), data())


def test_early_stopping_without_a_validation_part_is_refused():
    with pytest.raises(UsageError, match=r"data.val_fraction above 0, or inference.patience=null"):
        Recipe.of(config_of(inference={"patience": 3}), data_of(example("mlp"), num_val=0))
    Recipe.of(config_of(inference={"patience": None}), data_of(example("mlp"), num_val=0))

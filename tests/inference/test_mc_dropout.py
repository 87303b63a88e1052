"""MC dropout: the expected potential over masks is minimised, and the draws are masks around its minimum."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stack_runs import BATCHES, CONV, data, task
from tiny_problems import KNOWN_NOISE, Example, SmallConvNet, config_of, data_of, example, node_of, work
from torch import Tensor, nn

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method
from bdl_train.models._dropout import Dropout
from bdl_train.posteriors.atoms import Atoms
from bdl_train.posteriors.dropout_masks import DropoutMasks
from bdl_train.priors.gaussian import Gaussian
from bdl_train.runs import RunDir
from bdl_train.specs import InputSpec
from bdl_train.training.problem import Recipe
from bdl_train.training.train_stack import train_stack

NOISE_STD, PRIOR_STD, RATE = 0.5, 0.7, 0.3


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("BDL_ALLOW", __name__)


def mc_dropout(**changed: Any) -> Method[Any]:
    return build({**node_of("inference", "mc_dropout"), **changed}, Method, key="inference")


def linear_example(num_data: int = 24) -> Example:
    """y = x·w + b + noise, with dropout on x; columns correlated, so that masks change more than a scale."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_data, 3, generator=generator, dtype=torch.float64)
    x = x + 0.8 * torch.randn(num_data, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_data, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64) + 0.3 + NOISE_STD * noise
    spec = InputSpec((3,))
    return Example(spec, x, y, KNOWN_NOISE, lambda: nn.Sequential(Dropout(RATE), nn.Linear(3, 1)))


def minimum(of: Example) -> Tensor:
    """Of Σ_n E_mask (y − x̃·w − b)² / 2σ² + ‖θ‖² / 2s²: a ridge of Σ_n x_ni² p / (1 − p) on top of the prior's.

    Wager et al. (2013), arXiv:1307.1493, Section 2.
    """
    design = torch.cat([of.x, torch.ones(len(of.x), 1, dtype=of.x.dtype)], dim=1)
    variance = RATE / (1 - RATE) * of.x.square().sum(0)
    masks = torch.cat([variance, torch.zeros(1, dtype=of.x.dtype)]).diag()
    precision = (design.T @ design + masks) / NOISE_STD**2 + torch.eye(4, dtype=of.x.dtype) / PRIOR_STD**2
    return torch.linalg.solve(precision, design.T @ of.y / NOISE_STD**2)


def test_members_of_a_linear_model_are_on_average_at_the_minimum_over_masks():
    of = linear_example()
    the_work = work(
        of,
        range(100),
        prior=Gaussian(scale=PRIOR_STD, fan_in=False),
        optimizer={"_target_": "torch.optim.SGD", "lr": 0.01},
        batch_size=len(of.y),
        num_epochs=700,
    )
    method = mc_dropout(patience=None)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    found = torch.stack([posterior.tensors()["weights"] for posterior in method.posterior(state)])
    expected = minimum(of)
    # The step is linear in the weights and its masks do not depend on them: its mean goes to the minimum exactly.
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    # A test that could not tell the penalty of the masks, of the prior or of N from another would say nothing.
    assert 5 * error.max() < 0.03
    plain = torch.linalg.lstsq(torch.cat([of.x, torch.ones(24, 1, dtype=of.x.dtype)], 1), of.y).solution
    assert (plain - expected).abs().max() > 0.1


def test_training_is_that_of_a_deep_ensemble_and_the_draws_are_masks_around_it():
    trained: dict[str, Any] = {}
    for name in ("mc_dropout", "deep_ensemble"):
        method = build(node_of("inference", name), Method, key="inference")
        the_work = work(example("mlp-dropout"), [0, 1], num_epochs=4)
        state = method.init(the_work.problem)
        the_work.advance(method, state)
        trained[name] = method.posterior(state)
    for masks, atom in zip(*trained.values(), strict=True):
        assert isinstance(masks, DropoutMasks)
        assert isinstance(atom, Atoms)
        assert torch.equal(masks.flat, atom.flat[0])
        assert sorted(masks.layers) == ["2", "5"]
        for name, layer in masks.layers.items():
            assert layer.tolist() == [int(atom.buffers[f"{name}.seed"]), int(atom.buffers[f"{name}.step"])]
            assert layer[1] == 4 * 3


def test_a_posterior_that_was_formed_does_not_follow_the_training():
    method, the_work = mc_dropout(), work(example("mlp-dropout"), [0], num_epochs=4)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 3)
    (before,) = method.posterior(state)
    kept = {name: tensor.clone() for name, tensor in before.tensors().items()}
    the_work.advance(method, state)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.tensors().items())


def test_other_buffers_of_a_network_go_with_the_weights():
    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), Dropout(RATE), nn.Linear(4, 1))

    of = linear_example()
    of = Example(of.inputs, of.x, of.y, of.likelihood, Normed)
    method, the_work = mc_dropout(), work(of, [0, 1], num_epochs=2)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    for m, posterior in enumerate(method.posterior(state)):
        _, buffers = next(posterior.draw(1, 0))
        assert buffers.keys() == state.stack.buffers.keys()
        assert torch.equal(buffers["1.running_var"], state.stack.buffers["1.running_var"][m])


class ConvWithDropout(SmallConvNet):
    """Batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__(3)
        self.head = nn.Sequential(Dropout(RATE), self.head)


def test_batch_norm_keeps_the_statistics_of_training_and_the_weights_are_stored_once(tmp_path: Path):
    model = {"_target_": f"{__name__}.ConvWithDropout"}
    config = config_of(**{**CONV, **BATCHES, "model": model, "inference": node_of("inference", "mc_dropout")})
    run = RunDir(tmp_path)
    result = train_stack(task((0,)), config, data("conv-batch-norm"), run)
    assert result["batch_norm"] == "running statistics of training"
    assert result["members"][0]["_target_"] == "bdl_train.posteriors.dropout_masks.DropoutMasks"
    found = load_file(run.posterior / result["members"][0]["file"])
    weights = [tensor for name, tensor in ConvWithDropout().named_parameters()]
    assert found["weights"].shape == (sum(tensor.numel() for tensor in weights),)
    assert found["dropout:head.0"].shape == (2,)
    assert float(found["buffer:features.1.running_var"].sub(1).abs().min()) > 1e-3


# --- networks that are refused ------------------------------------------------------------------------------------


class WithTorchs(nn.Sequential):
    def __init__(self, rate: float) -> None:
        super().__init__(nn.Linear(4, 4), nn.Dropout(rate), Dropout(0.2), nn.Linear(4, 1))


class Without(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 1)


def recipe_of(model: dict[str, Any]) -> Recipe:
    return Recipe.of(
        config_of(inference=node_of("inference", "mc_dropout"), model=model), data_of(example("mlp"))
    )


def test_a_network_without_dropout_is_refused_and_the_rates_to_set_are_named():
    with pytest.raises(UsageError, match=r"inference=mc_dropout .* no dropout: set model.dropout above 0"):
        recipe_of({"dropout": 0.0})
    recipe_of({"dropout": 0.1})
    transformer = {**node_of("model", "ft_transformer"), "width": 8, "num_heads": 2}
    rates = ("attention_dropout", "ffn_dropout", "residual_dropout")
    with pytest.raises(
        UsageError, match=r"set model.attention_dropout or model.ffn_dropout or model.residual"
    ):
        recipe_of({**transformer, **dict.fromkeys(rates, 0.0)})
    for rate in rates:
        recipe_of({**transformer, **dict.fromkeys(rates, 0.0), rate: 0.1})
    with pytest.raises(UsageError, match="this model has none to set: use model=mlp, lenet"):
        recipe_of({"_target_": f"{__name__}.Without"})


def test_torchs_dropout_is_refused_with_the_reason():
    with pytest.raises(UsageError, match=r"inference=mc_dropout: masks of torch.nn.Dropout follow a global"):
        recipe_of({"_target_": f"{__name__}.WithTorchs", "rate": 0.1})
    recipe_of({"_target_": f"{__name__}.WithTorchs", "rate": 0.0})


def test_other_methods_take_a_network_without_dropout():
    assert not any(
        build(node_of("inference", name), Method, key="inference").needs_dropout
        for name in ("deep_ensemble", "swag", "snapshot")
    )


@pytest.mark.parametrize(("field", "value"), [("num_draws", 0), ("patience", 0)])
def test_impossible_settings_are_refused(field: str, value: int):
    with pytest.raises(UsageError, match=rf"inference\.{field}.*{value}"):
        mc_dropout(**{field: value})

"""What is promised on a CPU holds on a GPU: the same bits again, checkpoints that go on, members on their own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_methods import NAMES, class_of, shipped, small_node
from small_posteriors import small_artefact
from stack_runs import BATCHES, CONV, MEMBERS, at_step, atoms, data, hashes, task
from tiny_problems import config_of
from torch import Tensor

from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir
from bdl_train.training.train_stack import train_stack

pytestmark = pytest.mark.gpu
NETWORKS = {"mlp": {}, "mlp-dropout": {"model": {"dropout": 0.2}}, "conv-batch-norm": CONV}


def fits(name: str, network: str) -> bool:
    if (name == "mc_dropout") != (network == "mlp-dropout"):
        return False
    return network != "conv-batch-norm" or not shipped(name).needs_per_example_likelihood


TRAINED = [(name, network) for name in NAMES for network in NETWORKS if fits(name, network)]
INDEPENDENT = [(name, network) for name, network in TRAINED if not class_of(name).members_interact]
EXACT = ("deep_ensemble", "snapshot")
"""Methods that draw nothing on the device: their weights are a CPU's, but for rounding."""


def train(
    run: RunDir, config: dict[str, Any], network: str = "mlp", members: tuple[int, ...] = MEMBERS
) -> Any:
    return train_stack(replace(task(members), gpus=1), config, data(network.removesuffix("-dropout")), run)


def config_for(name: str, network: str = "mlp", **trainer: Any) -> dict[str, Any]:
    return config_of(inference=small_node(name), trainer=trainer, **NETWORKS[network], **BATCHES)


@pytest.mark.parametrize(("name", "network"), TRAINED)
def test_the_same_run_again_gives_the_same_bits(name: str, network: str, run):
    config = config_for(name, network)
    once, again = (train(run(folder), config, network) for folder in ("once", "again"))
    assert once["device"] == "cuda"
    assert hashes(once) == hashes(again)


@pytest.mark.parametrize("step", [7, 23])
@pytest.mark.parametrize(("name", "network"), TRAINED)
def test_stopped_and_resumed_is_straight_through_bit_for_bit(
    name: str, network: str, step: int, run, monkeypatch
):
    config = config_for(name, network)
    expected, resumed = train(run("straight"), config, network), run("resumed")
    resumed.path.mkdir()
    with monkeypatch.context() as patched:
        at_step(patched, name, step, lambda state: resumed.stop_file.touch())
        assert train(resumed, config, network)["status"] == "stopped"
    resumed.stop_file.unlink()
    assert hashes(train(resumed, config, network)) == hashes(expected)


@pytest.mark.parametrize(("name", "network"), INDEPENDENT)
def test_a_member_alone_is_the_member_of_a_stack(name: str, network: str, run):
    config = config_for(name, network, max_epochs=3)
    train(run("stack"), config, network)
    train(run("alone"), config, network, members=(1,))
    one, other = (
        load_file(run(folder).posterior / "member-00001.safetensors") for folder in ("stack", "alone")
    )
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", EXACT)
def test_weights_are_those_of_a_cpu(name: str, run):
    config = config_for(name)
    train(run("gpu"), config)
    train_stack(task(), config, data(), run("cpu"))
    for member in MEMBERS:
        torch.testing.assert_close(atoms(run("gpu"), member), atoms(run("cpu"), member), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old parts
@pytest.mark.parametrize("name", ["mclmc", "hmc", "sghmc"])
def test_compiled_training_ends_where_eager_training_does(name: str, run, caplog):
    for compiled in (True, False):
        hashes(train(run(str(compiled)), config_for(name, compile=compiled)))
    assert "uncompiled" not in caplog.text
    torch.testing.assert_close(atoms(run("True"), 0), atoms(run("False"), 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_precisions_train_and_store_float32(precision: str, run):
    hashes(train(run("one"), config_for("deep_ensemble", precision=precision)))
    hashes(train(run("double"), config_for("deep_ensemble")))
    assert atoms(run("one"), 0).dtype == torch.float32
    difference = (atoms(run("one"), 0) - atoms(run("double"), 0)).abs().max().item()
    assert 0 < difference < (1e-4 if precision == "32-true" else 0.1)


@pytest.mark.parametrize("method", ["ensemble", "swag"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "heteroscedastic_gaussian", "student_t"])
def test_predictions_are_those_of_a_cpu(likelihood: str, method: str):
    artefact = small_artefact(likelihood, method, num_draws=4, dtype="float64")
    x = torch.linspace(-2, 2, 9 * artefact.inputs.shape[0], dtype=torch.float64).view(9, -1)
    y = torch.arange(9) % 3 if likelihood == "categorical" else torch.linspace(-1, 1, 9, dtype=torch.float64)
    on_gpu, on_cpu = (stats(Predictor(artefact, device=device), x, y) for device in ("cuda", "cpu"))
    for name in on_cpu:
        torch.testing.assert_close(on_gpu[name], on_cpu[name], rtol=1e-8, atol=1e-10, msg=f"{name} differs")


def stats(predictor: Predictor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    tiles = list(predictor(x, y))
    names = ("total", "aleatoric", "epistemic", "nll")
    return {name: torch.cat([getattr(tile.stats, name).cpu() for tile in tiles]) for name in names}

"""Training one stack: resumed or straight through, alone or in company, whole or with members lost."""

import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stack_runs import BATCHES, CASES, MEMBERS, NUM_DATA, STEPS, at_step, atoms, data, hashes, task
from tiny_problems import SmallConvNet, Work, config_of, data_of, example, work
from torch import Tensor

from bdl_train.inference._descent import DescentState
from bdl_train.inference.deep_ensemble import DeepEnsemble
from bdl_train.training.checkpoints import LATEST
from bdl_train.training.prepared import StackTask
from bdl_train.training.train_stack import train_stack


@pytest.mark.parametrize(
    "stops",
    [(7,), (9,), (3, 4, 16), (29,)],
    ids=["middle of an epoch", "end of an epoch", "three times", "at the last step"],
)
@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_straight_through_bit_for_bit(case: str, stops, run, straight, monkeypatch):
    name, config = CASES[case]
    method = config["inference"]["_target_"].split(".")[2]
    expected = straight(case)
    resumed_run = run("resumed")
    resumed_run.path.mkdir()
    spent = 0.0
    for step in stops:
        with monkeypatch.context() as patched:
            at_step(patched, method, step, lambda state: resumed_run.stop_file.touch())
            result = train_stack(task(), config, data(name), resumed_run)
        if result["status"] == "done":  # early stopping came first
            assert case.startswith("early_stopping")
            break
        assert result["status"] == "stopped"
        stored = torch.load(resumed_run.stack("s0") / LATEST, weights_only=True)["seconds"]
        assert spent < stored <= result["seconds"]  # of all sessions so far
        spent = stored
        assert not (resumed_run.stack("s0") / "result.json").exists()
        resumed_run.stop_file.unlink()
    result = train_stack(task(), config, data(name), resumed_run)
    assert result["seconds"] > spent
    assert hashes(result) == hashes(expected)
    assert result["steps"] == expected["steps"]
    assert [e.get("best_epoch") for e in result["members"]] == [
        e.get("best_epoch") for e in expected["members"]
    ]
    assert not (resumed_run.stack("s0") / LATEST).exists()


def test_a_second_call_returns_the_result_without_training(run, monkeypatch):
    first = train_stack(task(), config_of(), data(), run("once"))
    monkeypatch.setattr(DeepEnsemble, "step", None)
    assert train_stack(task(), config_of(), data(), run("once")) == first


def test_a_checkpoint_of_other_data_is_not_continued(run, monkeypatch):
    target = run("stopped")
    target.path.mkdir()
    with monkeypatch.context() as patched:
        at_step(patched, "deep_ensemble", 7, lambda state: target.stop_file.touch())
        train_stack(task(), config_of(), data(), target)
    target.stop_file.unlink()
    other = data_of(example("mlp", num_data=NUM_DATA), num_val=7, num_test=5)
    fresh = train_stack(task(), config_of(), other, run("fresh"))
    assert hashes(train_stack(task(), config_of(), other, target)) == hashes(fresh)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_a_member_alone_is_the_member_of_a_stack(executor: str, run):
    config = config_of(trainer={"executor": executor, "max_epochs": 10})
    train_stack(task((4, 2, 0)), config, data(), run("stack"))
    train_stack(task((2,)), config, data(), run("alone"))
    torch.testing.assert_close(atoms(run("stack"), 2), atoms(run("alone"), 2), rtol=1e-8, atol=1e-12)
    assert not torch.allclose(atoms(run("stack"), 4), atoms(run("stack"), 0), rtol=0.1)


def test_another_attempt_is_another_member(run):
    first = train_stack(task(), config_of(), data(), run("first"))
    again = train_stack(StackTask("s0", MEMBERS, 1, 0, attempt=1), config_of(), data(), run("again"))
    assert not set(hashes(first)) & set(hashes(again))
    assert {e["seed"] for e in first["members"]}.isdisjoint({e["seed"] for e in again["members"]})


def best_of_one_member(the_work: Work, method: DeepEnsemble, val: tuple[Tensor, Tensor], patience: int):
    """Early stopping of a single network, with an ordinary module for validation: weights and best epoch."""
    state = method.init(the_work.problem)
    network = the_work.example.make_network().double()
    best, best_epoch, weights = math.inf, 0, state.stack.flat[0].clone()
    for epoch in range(1, 41):
        the_work.advance(method, state, the_work.problem.steps_per_epoch)
        torch.nn.utils.vector_to_parameters(state.stack.flat[0], network.parameters())
        with torch.no_grad():
            noise = torch.tensor(0.5, dtype=torch.float64)
            nll = -torch.distributions.Normal(network(val[0])[:, 0], noise).log_prob(val[1]).mean().item()
        if nll < best:
            best, best_epoch, weights = nll, epoch, state.stack.flat[0].clone()
        elif epoch - best_epoch >= patience:
            break
    return weights, best_epoch


def test_early_stopping_is_that_of_each_network_trained_by_itself(run):
    tiny, patience = data(), 3
    config = config_of(
        inference={"patience": patience}, trainer={"max_epochs": 40}, optimizer={"lr": 0.05}, **BATCHES
    )
    result = train_stack(task((0, 1, 2, 3)), config, tiny, run("stack"))
    of = example("mlp", num_data=NUM_DATA)
    x, y = of.x.float().double(), of.y.float().double()
    train = type(of)(of.inputs, x[:26], y[:26], of.likelihood, of.make_network)
    epochs = []
    for m in range(4):
        the_work = work(train, [m], optimizer={**config["optimizer"]}, batch_size=5)
        weights, best_epoch = best_of_one_member(
            the_work, DeepEnsemble(patience=None), (x[26:34], y[26:34]), patience
        )
        epochs.append(best_epoch)
        torch.testing.assert_close(atoms(run("stack"), m)[0], weights, rtol=1e-6, atol=1e-9)
    assert [entry["best_epoch"] for entry in result["members"]] == epochs
    assert len(set(epochs)) > 1
    assert max(epochs) < 40


@pytest.mark.parametrize("method", ["deep_ensemble", "swag"])
def test_a_member_that_diverges_is_reported_and_the_others_are_as_without_it(
    method: str, run, straight, monkeypatch
):
    config = CASES[method][1]
    healthy = straight(method)

    def diverge(state: DescentState) -> None:
        state.stack.flat[1] = torch.inf

    at_step(monkeypatch, method, 6, diverge)
    result = train_stack(task(), config, data(), run("partial"))
    assert result["status"] == "done"
    assert [entry["status"] for entry in result["members"]] == ["done", "failed", "done"]
    assert "NaN or infinite" in result["members"][1]["reason"]
    assert "optimizer.lr" in result["members"][1]["reason"]
    for m in (0, 2):
        assert result["members"][m]["sha256"] == healthy["members"][m]["sha256"]
    assert sorted(path.name for path in run("partial").posterior.iterdir()) == [
        "member-00000.safetensors",
        "member-00002.safetensors",
    ]


@pytest.mark.parametrize("num_val", [8, 0])
@pytest.mark.parametrize("method", ["deep_ensemble", "swag"])
def test_when_all_members_diverge_each_is_reported_and_training_ends(
    method: str, num_val: int, run, monkeypatch
):
    def diverge(state: DescentState) -> None:
        state.stack.flat[:] = torch.nan

    config = CASES[method][1]
    at_step(monkeypatch, method, 6, diverge)
    result = train_stack(task(), config, data(num_val=num_val), run("lost"))
    assert [entry["status"] for entry in result["members"]] == ["failed"] * 3
    assert all("potential or gradient became NaN" in entry["reason"] for entry in result["members"])
    assert result["steps"] < config["trainer"]["max_epochs"] * STEPS


def test_the_global_generators_are_untouched(run):
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    train_stack(task(), CASES["swag_conv"][1], data("conv-batch-norm"), run("one"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]
    assert random.getstate() == before[2]


def test_every_draw_of_a_network_with_batch_norm_is_stored_with_its_own_statistics(run):
    tiny = data("conv-batch-norm")
    train_stack(task((0, 1)), CASES["swag_conv"][1], tiny, run("one"))
    x = torch.from_numpy(tiny.train.x).double()
    for member in (0, 1):
        stored = load_file(run("one").posterior / f"member-{member:05d}.safetensors")
        assert len(stored["atoms"]) == 2
        for k, flat in enumerate(stored["atoms"]):
            network = SmallConvNet(3).double()
            torch.nn.utils.vector_to_parameters(flat, network.parameters())
            with torch.no_grad():
                # Batches of about 5, as in training: every fifth of 26 examples.
                batches = [network.features[0](x[b::5]) for b in range(5)]
            mean = torch.stack([one.mean((0, 2, 3)) for one in batches]).mean(0)
            var = torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in batches]).mean(0)
            for name, expected in (("mean", mean), ("var", var)):
                got = stored[f"buffer:features.1.running_{name}"][k]
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_precisions_train_and_store_float32(precision: str, run):
    config = config_of(trainer={"precision": precision}, **BATCHES)
    hashes(train_stack(task(), config, data(), run("one")))
    hashes(train_stack(task(), config_of(**BATCHES), data(), run("double")))
    assert atoms(run("one"), 0).dtype == torch.float32
    difference = (atoms(run("one"), 0) - atoms(run("double"), 0)).abs().max().item()
    assert 0 < difference < (1e-4 if precision == "32-true" else 0.1)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old parts
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_compiled_training_ends_where_eager_training_does(precision: str, run, caplog):
    for compiled in (True, False):
        config = config_of(trainer={"compile": compiled, "precision": precision}, **BATCHES)
        hashes(train_stack(task(), config, data(), run(str(compiled))))
    assert "uncompiled" not in caplog.text
    tolerance = 1e-9 if precision == "64-true" else 0.02
    torch.testing.assert_close(atoms(run("True"), 0), atoms(run("False"), 0), rtol=tolerance, atol=tolerance)

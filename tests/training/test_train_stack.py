"""Training one stack: resumed or straight through, alone or in company, whole or with members lost."""

import functools
import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_problems import SmallConvNet, Work, config_of, data_of, example, node_of, work
from torch import Tensor

from bdl_train.data import Data
from bdl_train.errors import UsageError
from bdl_train.inference._descent import DescentState
from bdl_train.inference.anchored import Anchored
from bdl_train.inference.deep_ensemble import DeepEnsemble
from bdl_train.inference.swag import Swag
from bdl_train.runs import RunDir
from bdl_train.training.checkpoints import LATEST
from bdl_train.training.problem import Recipe
from bdl_train.training.train_stack import StackTask, train_stack

METHODS = {"deep_ensemble": DeepEnsemble, "anchored": Anchored, "swag": Swag}
MEMBERS = (0, 1, 2)
CONV = {
    "model": {"_target_": "tiny_problems.SmallConvNet", "num_outputs": 3},
    "likelihood": node_of("likelihood", "categorical"),
}
# 26 training examples in batches of 5: 5 steps an epoch, handed over as 2, 2 and 1.
NUM_DATA, STEPS = 26 + 12, 5
BATCHES = {"data": {"batch_size": 5}}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("BDL_ALLOW", "tiny_problems")


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], RunDir]:
    return lambda name: RunDir(tmp_path / name)


def task(members: tuple[int, ...] = MEMBERS) -> StackTask:
    return StackTask(id="s0", members=members, cpus=1, gpus=0)


def data(name: str = "mlp", **parts: int) -> Data:
    return data_of(example(name, num_data=NUM_DATA), **parts)


def hashes(result: dict[str, Any]) -> list[str]:
    assert result["status"] == "done"
    assert {entry["status"] for entry in result["members"]} == {"done"}
    return [entry["sha256"] for entry in result["members"]]


def at_step(monkeypatch, method: str, step: int, act: Callable[[DescentState], None]) -> None:
    """Call `act` once, just before the step with this number."""
    cls, done = METHODS[method], []
    plain = cls.step

    def watched(self: Any, state: Any, batch: Any) -> Any:
        if state.step == step and not done:
            done.append(step)
            act(state)
        return plain(self, state, batch)

    monkeypatch.setattr(cls, "step", watched)


CASES = {
    "deep_ensemble": ("mlp", config_of(**BATCHES)),
    "early_stopping": ("mlp", config_of(inference={"patience": 2}, trainer={"max_epochs": 9}, **BATCHES)),
    "anchored": ("mlp", config_of(inference=node_of("inference", "anchored"), **BATCHES)),
    "swag": (
        "mlp",
        config_of(
            inference={**node_of("inference", "swag"), "max_rank": 3},
            scheduler=node_of("scheduler", "cosine"),
            model={"dropout": 0.2},
            **BATCHES,
        ),
    ),
    "swag_conv": (
        "conv-batch-norm",
        config_of(inference={**node_of("inference", "swag"), "num_draws": 2}, **CONV, **BATCHES),
    ),
    "early_stopping_conv": ("conv-batch-norm", config_of(inference={"patience": 1}, **CONV, **BATCHES)),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """The result of each case trained without a stop, once."""

    @functools.cache
    def result(case: str) -> dict[str, Any]:
        name, config = CASES[case]
        return train_stack(task(), config, data(name), RunDir(tmp_path_factory.mktemp(case)))

    return result


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
    for step in stops:
        with monkeypatch.context() as patched:
            at_step(patched, method, step, lambda state: resumed_run.stop_file.touch())
            result = train_stack(task(), config, data(name), resumed_run)
        if result["status"] == "done":  # early stopping came first
            assert case.startswith("early_stopping")
            break
        assert result == {"status": "stopped"}
        assert (resumed_run.stack("s0") / LATEST).is_file()
        assert not (resumed_run.stack("s0") / "result.json").exists()
        resumed_run.stop_file.unlink()
    result = train_stack(task(), config, data(name), resumed_run)
    assert hashes(result) == hashes(expected)
    assert result["steps"] == expected["steps"]
    assert [e.get("best_epoch") for e in result["members"]] == [
        e.get("best_epoch") for e in expected["members"]
    ]
    assert not (resumed_run.stack("s0") / LATEST).exists()


@pytest.mark.parametrize("case", ["swag", "early_stopping_conv"])
def test_a_crash_is_continued_from_the_last_checkpoint_bit_for_bit(case: str, run, straight, monkeypatch):
    name, config = CASES[case]
    config = {**config, "trainer": {**config["trainer"], "checkpoint_every_s": 0}}

    def crash(state: DescentState) -> None:
        raise OSError("the node is gone")

    with monkeypatch.context() as patched:
        at_step(patched, config["inference"]["_target_"].split(".")[2], 8, crash)
        with pytest.raises(OSError, match="the node is gone"):
            train_stack(task(), config, data(name), run("crashed"))
    seen = []
    at_step(
        monkeypatch, config["inference"]["_target_"].split(".")[2], 7, lambda state: seen.append(state.step)
    )
    assert hashes(train_stack(task(), config, data(name), run("crashed"))) == hashes(straight(case))
    assert seen == [7]  # the checkpoint after the call of steps 5 and 6


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


def atoms(run: RunDir, member: int) -> Tensor:
    return load_file(run.posterior / f"member-{member:05d}.safetensors")["atoms"]


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


def events_of(run: RunDir) -> list[dict[str, Any]]:
    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (run.stack("s0") / "events.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def test_events_are_json_lines_with_five_keys_even_when_a_member_diverges(run, monkeypatch):
    def diverge(state: DescentState) -> None:
        state.stack.flat[2] = torch.nan

    at_step(monkeypatch, "deep_ensemble", 12, diverge)
    config = config_of(inference={"patience": 50}, **BATCHES)
    train_stack(task((5, 6, 7)), config, data(), run("one"))
    events = events_of(run("one"))
    assert all(set(event) == {"time", "member", "step", "key", "value"} for event in events)
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    curve = [(e["step"], e["member"]) for e in events if e["key"] == "train/nll"]
    assert [member for step, member in curve if step == 5] == [5, 6, 7]
    assert [member for step, member in curve if step == 30] == [5, 6]
    assert {e["step"] for e in events if e["key"] == "val/nll"} == {5, 10, 15, 20, 25, 30}
    assert {e["member"]: e["value"] for e in events if e["key"] == "member"} == {
        5: "done",
        6: "done",
        7: "failed",
    }
    progress = [event["value"] for event in events if event["key"] == "progress"]
    assert progress[-1]["step"] == progress[-1]["num_steps"] == 30
    assert (progress[-1]["active"], progress[-1]["failed"]) == (2, 1)


def test_logged_curves_are_the_mean_nll_of_training_and_validation(run):
    config = config_of(optimizer={"lr": 1e-12}, trainer={"max_epochs": 2}, data={"batch_size": 26})
    tiny = data()
    train_stack(task((3,)), config, tiny, run("one"))
    the_work = work(example("mlp"), [3])
    network = the_work.example.make_network().double()
    torch.nn.utils.vector_to_parameters(the_work.problem.stack.flat[0], network.parameters())
    noise = torch.tensor(0.5, dtype=torch.float64)
    found = {e["key"]: e["value"] for e in events_of(run("one")) if e["key"].endswith("/nll")}
    for key, part in (("train/nll", tiny.train), ("val/nll", tiny.val)):
        x, y = torch.from_numpy(part.x).double(), torch.from_numpy(part.y).double()
        log_lik = torch.distributions.Normal(network(x)[:, 0], noise).log_prob(y)
        assert found[key] == pytest.approx(-log_lik.mean().item(), rel=1e-6)


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
                features = network.features[0](x)
            mean = stored["buffer:features.1.running_mean"][k]
            torch.testing.assert_close(mean, features.mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
            var = features.transpose(0, 1).flatten(1).var(1)
            torch.testing.assert_close(stored["buffer:features.1.running_var"][k], var, rtol=1e-6, atol=1e-9)


def test_torchs_dropout_trains_warns_and_is_reproducible(run, caplog, monkeypatch):
    model = {
        "_target_": "torch.nn.Sequential",
        "_args_": [
            {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 5},
            {"_target_": "torch.nn.Dropout", "p": 0.4},
            {"_target_": "torch.nn.Linear", "in_features": 5, "out_features": 1},
        ],
    }
    config = config_of(model=model, **BATCHES)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="bdl_train"):
        straight = train_stack(task(), config, data(), run("straight"))
    assert "torch.nn dropout" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
    target = run("resumed")
    target.path.mkdir()
    with monkeypatch.context() as patched:
        at_step(patched, "deep_ensemble", 7, lambda state: target.stop_file.touch())
        train_stack(task(), config, data(), target)
    target.stop_file.unlink()
    torch.rand(3)  # whatever the global generator did in between
    assert hashes(train_stack(task(), config, data(), target)) == hashes(straight)
    without = {**config, "model": {**model, "_args_": [model["_args_"][0], model["_args_"][2]]}}
    plain = train_stack(task(), without, data(), run("plain"))
    assert not set(hashes(plain)) & set(hashes(straight))


def test_torchs_dropout_draws_a_new_mask_at_every_step(run):
    """All examples equal and nothing learned: only the mask can tell one step from the next."""
    tiny = data()
    train = replace(tiny.train, x=np.ones_like(tiny.train.x), y=np.ones_like(tiny.train.y))
    model = {
        "_target_": "torch.nn.Sequential",
        "_args_": [
            {"_target_": "torch.nn.Dropout", "p": 0.4},
            {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 1},
        ],
    }
    config = config_of(model=model, optimizer={"lr": 1e-15}, data={"batch_size": 26})
    train_stack(task(), config, replace(tiny, train=train), run("one"))
    curve = [e["value"] for e in events_of(run("one")) if e["key"] == "train/nll"]
    assert len(curve) == 18
    assert len({round(value, 6) for value in curve}) == 18


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


def test_the_number_of_steps_per_call_changes_nothing(run):
    results = [
        hashes(train_stack(task(), config_of(trainer={"steps_per_call": k}, **BATCHES), data(), run(str(k))))
        for k in (1, 3, 16)
    ]
    assert results[0] == results[1] == results[2]


def test_early_stopping_without_a_validation_part_is_refused():
    with pytest.raises(UsageError, match=r"data.val_fraction above 0, or inference.patience=null"):
        Recipe.of(config_of(inference={"patience": 3}), data(num_val=0))
    Recipe.of(config_of(inference={"patience": None}), data(num_val=0))

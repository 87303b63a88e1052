"""The steps and the validation of a stack under Lightning."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from stack_runs import BATCHES, at_step, data, events_of, hashes, task
from tiny_problems import config_of, example, work

from bdl_train.training.train_stack import train_stack


def test_logged_curves_are_the_mean_nll_of_training_and_validation(run):
    config = config_of(optimizer={"lr": 1e-12}, trainer={"max_epochs": 2}, data={"batch_size": 26})
    tiny = data()
    tiny = replace(tiny, target=replace(tiny.target, scale=2.5))
    train_stack(task((3,)), config, tiny, run("one"))
    the_work = work(example("mlp"), [3])
    network = the_work.example.make_network().double()
    torch.nn.utils.vector_to_parameters(the_work.problem.stack.flat[0], network.parameters())
    noise = torch.tensor(0.5, dtype=torch.float64)
    found = {e["key"]: e["value"] for e in events_of(run("one"))}
    assert found["progress"]["nll"] == found["train/nll"]
    for key, part in (("train/nll", tiny.train), ("val/nll", tiny.val)):
        x, y = torch.from_numpy(part.x).double(), torch.from_numpy(part.y).double()
        log_lik = torch.distributions.Normal(network(x)[:, 0], noise).log_prob(y)
        assert found[key] == pytest.approx(-log_lik.mean().item() + math.log(2.5), rel=1e-6)
    assert found["val/stack_nll"] == pytest.approx(found["val/nll"])


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


def test_the_number_of_steps_per_call_changes_nothing(run):
    results = [
        hashes(train_stack(task(), config_of(trainer={"steps_per_call": k}, **BATCHES), data(), run(str(k))))
        for k in (1, 3, 16)
    ]
    assert results[0] == results[1] == results[2]

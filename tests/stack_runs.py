"""Small runs of `train_stack`: their configs, data, results, and a way to act in the middle of one."""

import json
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file
from small_methods import class_of
from tiny_problems import config_of, data_of, example, node_of
from torch import Tensor

from bdl_train.data import Data
from bdl_train.inference._descent import DescentState
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask
from bdl_train.training.timeline import Timeline

MEMBERS = (0, 1, 2)
CONV = {
    "model": {"_target_": "tiny_problems.SmallConvNet", "num_outputs": 3},
    "likelihood": node_of("likelihood", "categorical"),
}
# 26 training examples in batches of 5: 5 steps an epoch, handed over as 2, 2 and 1.
NUM_DATA, STEPS = 26 + 12, 5
BATCHES = {"data": {"batch_size": 5}}

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


def task(members: tuple[int, ...] = MEMBERS) -> StackTask:
    return StackTask(id="s0", members=members, cpus=1, gpus=0)


def data(name: str = "mlp", **parts: int) -> Data:
    return data_of(example(name, num_data=NUM_DATA), **parts)


def hashes(result: dict[str, Any]) -> list[str]:
    assert result["status"] == "done"
    assert {entry["status"] for entry in result["members"]} == {"done"}
    return [entry["sha256"] for entry in result["members"]]


def atoms(run: RunDir, member: int) -> Tensor:
    return load_file(run.posterior / f"member-{member:05d}.safetensors")["atoms"]


def events_of(run: RunDir) -> list[dict[str, Any]]:
    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (run.stack("s0") / "events.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def at_step(monkeypatch, method: str, step: int, act: Callable[[DescentState], None]) -> None:
    """Call `act` once, just before the step with this number, counted over all phases."""
    cls, done = class_of(method), []
    plain = cls.step

    def watched(self: Any, state: Any, batch: Any) -> Any:
        if not done and Timeline(self.phases(state.problem.setting)).step(state) == step:
            done.append(step)
            act(state)
        return plain(self, state, batch)

    monkeypatch.setattr(cls, "step", watched)

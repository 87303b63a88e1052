"""A stack of each method, cut in the middle of its training, goes on as if it had never been whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_methods import NAMES as SHIPPED
from small_methods import class_of, small_node
from stack_runs import CASES, at_step, data, hashes
from tiny_problems import config_of, node_of

from bdl_train.distributed.follow_ups import halves
from bdl_train.distributed.split import split
from bdl_train.runs import RunDir
from bdl_train.training.checkpoints import LATEST, PREVIOUS
from bdl_train.training.prepared import StackTask
from bdl_train.training.train_stack import train_stack

# As many members as the rank, the batch size and the width: shapes alone must not mislead.
MEMBERS = (3, 4, 5, 6)
TASK = StackTask(id="000", members=MEMBERS, cpus=1, gpus=0)
# Members that interact are never cut.
NAMES = [name for name in SHIPPED if not class_of(name).members_interact]
ALIKE = {"model": {"hidden": [4], "dropout": 0.2}, "data": {"batch_size": 4}}
SWAG = {**node_of("inference", "swag"), "max_rank": 4, "start_epoch": 1, "snapshot_every": 1}
STEP = 23


def case_of(name: str = "mlp", **changed: Any) -> tuple[str, dict[str, Any]]:
    return name, config_of(**{**ALIKE, **changed})


def of_method(name: str) -> tuple[str, dict[str, Any]]:
    dropout = 0.0 if class_of(name).needs_fixed_potential else 0.2
    return case_of(inference=small_node(name), model={"hidden": [4], "dropout": dropout})


CUT: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: of_method(name) for name in NAMES},
    "swag-rank-4": case_of(inference=SWAG),
    "sgd": case_of(optimizer={**node_of("optimizer", "sgd"), "momentum": 0.9}),
    "early-stopping": case_of(inference={"patience": 2}, trainer={"max_epochs": 9}),
    "batch-norm": CASES["swag_conv"],
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("BDL_ALLOW", "tiny_problems")


def with_executor(config: dict[str, Any], executor: str) -> dict[str, Any]:
    return {**config, "trainer": {**config["trainer"], "executor": executor}}


def method_of(config: dict[str, Any]) -> str:
    return config["inference"]["_target_"].split(".")[2]


def stop(run: RunDir, name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train the whole stack up to about `STEP`; returns its checkpoint."""
    with monkeypatch.context() as patched:
        at_step(patched, method_of(config), STEP, lambda state: run.stop_file.touch())
        assert train_stack(TASK, config, data(name), run)["status"] == "stopped"
    run.stop_file.unlink()
    return torch.load(run.stack("000") / LATEST, weights_only=True)


def at_first_step(monkeypatch: pytest.MonkeyPatch, method: str, act: Callable[[Any], None]) -> None:
    """Call `act` once, just before whatever step comes first."""
    cls, done = class_of(method), []
    plain = cls.step

    def watched(self: Any, state: Any, batch: Any) -> Any:
        if not done:
            done.append(state)
            act(state)
        return plain(self, state, batch)

    monkeypatch.setattr(cls, "step", watched)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("case", CUT)
def test_halves_go_on_to_the_members_of_the_whole(
    case: str, executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name, config = CUT[case]
    config = with_executor(config, executor)
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    wanted = hashes(train_stack(TASK, config, data(name), whole))
    stopped = stop(cut, name, config, monkeypatch)["state"]
    at = (stopped["phase"], stopped["step"])
    split(cut, TASK, "its worker died")
    starts, got = [], []
    for half in halves(TASK):
        with monkeypatch.context() as patched:
            at_first_step(patched, method_of(config), lambda state: starts.append((state.phase, state.step)))
            got += hashes(train_stack(half, config, data(name), cut))
    assert starts == [at, at]  # neither half began anew
    # Momentum is fused multiply-adds, but not in the last places of the stack's memory, which the halves move.
    if executor == "loop" and case != "sgd":
        assert got == wanted
        return
    # Batched products of two and of four matrices may add up in another order.
    for member in MEMBERS:
        file = f"member-{member:05d}.safetensors"
        torch.testing.assert_close(
            load_file(cut.posterior / file), load_file(whole.posterior / file), rtol=1e-9, atol=1e-11
        )


def test_a_half_that_is_cut_again_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, config = CUT["swag-rank-4"]
    config = with_executor(config, "loop")
    wanted = hashes(train_stack(TASK, config, data(name), RunDir(tmp_path / "whole")))
    run = RunDir(tmp_path / "cut")
    stop(run, name, config, monkeypatch)
    first, second = halves(TASK)
    split(run, TASK, "once")
    split(run, second, "twice")
    tasks = [first, *halves(second)]
    assert [(task.id, task.members) for task in tasks] == [("000a", (3, 4)), ("000ba", (5,)), ("000bb", (6,))]
    assert [one for task in tasks for one in hashes(train_stack(task, config, data(name), run))] == wanted


def test_the_deviations_of_swag_are_cut_along_members_not_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = RunDir(tmp_path)
    before = stop(run, *CUT["swag-rank-4"], monkeypatch)["state"]["moments"]
    split(run, TASK, "its worker died")
    assert before["deviations"].shape[:2] == (4, 4)  # [M, K, P]
    assert bool(before["deviations"].ne(0).all(2).all())
    for half, rows in zip(halves(TASK), (slice(0, 2), slice(2, 4)), strict=True):
        after = torch.load(run.stack(half.id) / LATEST, weights_only=True)["state"]["moments"]
        assert after["num_snapshots"] == before["num_snapshots"]
        for name in ("mean", "sum_sq_dev", "deviations"):
            assert torch.equal(after[name], before[name][rows])


def test_the_checkpoint_before_a_damaged_one_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDir(tmp_path)
    flat = stop(run, *CUT["anchored"], monkeypatch)["state"]["flat"]
    folder = run.stack("000")
    (folder / LATEST).rename(folder / PREVIOUS)
    (folder / LATEST).write_bytes(b"half of it")
    split(run, TASK, "its worker died")
    parts = [
        torch.load(run.stack(half.id) / LATEST, weights_only=True)["state"]["flat"] for half in halves(TASK)
    ]
    assert torch.equal(torch.cat(parts), flat)

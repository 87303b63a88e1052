"""A stack over two processes trains what one process trains, for every method; two real processes under gloo."""

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stack_runs import BATCHES, CASES, MEMBERS, data, task
from tiny_problems import config_of, data_of, example, node_of

from bdl_train.errors import UsageError
from bdl_train.runs import RunDir, read_json
from bdl_train.training.checkpoints import LATEST
from bdl_train.training.problem import Recipe
from bdl_train.training.ranks import ALONE, Ranks, joined
from bdl_train.training.train_stack import train_stack

# Batch norm has no ranks; 5 rows a batch are split 2 and 3.
NAMES = [name for name in CASES if "conv" not in name]
LONG = config_of(trainer={"max_epochs": 4000, "checkpoint_every_s": 0.2}, **BATCHES)


def _train_all(folder: str, rank: int) -> None:
    for name in NAMES:
        run = RunDir(Path(folder) / name)
        with joined(run.stack("s0"), rank, 2, "t", "127.0.0.1", gpu=False) as ranks:
            train_stack(task(), CASES[name][1], data(CASES[name][0]), run, ranks)


def _train_long(folder: str, rank: int, token: str) -> None:
    run = RunDir(Path(folder))
    with joined(run.stack("s0"), rank, 2, token, "127.0.0.1", gpu=False) as ranks:
        train_stack(task(), LONG, data(), run, ranks)


def start(target: Any, *args: Any) -> list[BaseProcess]:
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(target=target, args=(args[0], rank, *args[1:])) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    return processes


@pytest.fixture(scope="module")
def over_two(tmp_path_factory) -> Path:
    """Each case trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    before = os.environ.get("BDL_ALLOW")
    os.environ["BDL_ALLOW"] = "tiny_problems"
    try:
        processes = start(_train_all, str(folder))
    finally:
        if before is None:
            del os.environ["BDL_ALLOW"]
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_rank_at_the_same_batch(name, over_two, straight):
    expected, run = straight(name), RunDir(over_two / name)
    result = read_json(run.stack("s0") / "result.json")
    assert result["steps"] == expected["steps"]
    best = [[entry.get("best_epoch") for entry in one["members"]] for one in (result, expected)]
    assert best[0] == best[1]
    for mine, theirs in zip(result["members"], expected["members"], strict=True):
        assert mine["status"] == theirs["status"] == "done"
        assert mine["seed"] == theirs["seed"]


@pytest.mark.parametrize("name", NAMES)
def test_their_weights_agree_to_the_order_of_a_sum(name, over_two, run):
    train_stack(task(), CASES[name][1], data(CASES[name][0]), run("one"))
    for member in MEMBERS:
        file = f"member-{member:05d}.safetensors"
        mine = load_file(over_two / name / "posterior" / file)
        theirs = load_file(run("one").posterior / file)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-8, atol=1e-10)


def test_one_process_wrote_and_nothing_of_the_meeting_is_left(over_two):
    for name in NAMES:
        folder = over_two / name / "stacks" / "s0"
        assert {path.name for path in folder.iterdir()} == {"events.jsonl", "owner.json", "result.json"}
        assert (folder / "events.jsonl").read_text().count('"started"') == 1


def wait_for(path: Path, processes: list[BaseProcess]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert all(one.is_alive() for one in processes)
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.ci
def test_a_stop_saves_once_and_both_go_on_from_there(run, monkeypatch):
    target = run("stopped")
    processes = start(_train_long, str(target.path), "first")
    wait_for(target.stack("s0") / LATEST, processes)
    target.stop_file.touch()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    at = torch.load(target.stack("s0") / LATEST, weights_only=True)["state"]["step"]
    assert 0 < at < 4000 * 5
    target.stop_file.unlink()
    # A rank that is killed does not leave the other one hanging: it sees the connection break.
    processes = start(_train_long, str(target.path), "second")
    while True:
        wait_for(target.stack("s0") / LATEST, processes)
        try:
            if torch.load(target.stack("s0") / LATEST, weights_only=True)["state"]["step"] > at:
                break
        except (OSError, RuntimeError, EOFError):
            continue
        time.sleep(0.02)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[0].join(60)
    assert processes[0].exitcode not in (0, None)
    processes[1].join(60)
    assert (target.stack("s0") / LATEST).is_file()


@pytest.mark.parametrize("rows", [1, 2, 5, 32])
def test_shares_hold_each_row_once(rows):
    for world in (1, 2, 3, 7):
        held = [list(range(rows))[Ranks(rank, world).share(rows)] for rank in range(world)]
        assert [row for share in held for row in share] == list(range(rows))
        assert max(map(len, held)) - min(map(len, held)) <= 1
    assert ALONE.share(rows) == slice(0, rows)


def test_what_cannot_be_split_is_refused():
    def recipe(name: str, config: dict) -> tuple[Recipe, Any]:
        tiny = data_of(example(name, num_data=38))
        return Recipe.of(config, tiny), tiny

    conv = {"_target_": "tiny_problems.SmallConvNet", "num_outputs": 3}
    made, tiny = recipe(
        "conv-batch-norm", config_of(model=conv, likelihood=node_of("likelihood", "categorical"), **BATCHES)
    )
    with pytest.raises(UsageError, match=r"ranks_per_stack=2: batch norm.*model\.norm=group"):
        made.check_ranks(tiny, 2)
    made, tiny = recipe("mlp", config_of(data={"batch_size": 3}))
    made.check_ranks(tiny, 3)
    with pytest.raises(UsageError, match=r"ranks_per_stack=4 needs a row for each rank in a batch of 3"):
        made.check_ranks(tiny, 4)

"""What a training shows and records: the live line of a terminal, plain lines elsewhere, wandb."""

import fcntl
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import wandb
from command_line import TINY
from wandb.errors import CommError

from bdl_train.events import EventReader
from bdl_train.runs import read_json
from bdl_train.tracking import progress


def screen(folder: Path, columns: int, *words: str) -> list[str]:
    """Every state of the lines that `bdl train` draws on a terminal of so many columns, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    code = "import sys; from bdl_train.cli import main; sys.exit(main())"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *TINY, *words],
        cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    drawn = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        drawn += block
    os.close(ours)
    assert process.wait(60) == 0, drawn.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", re.sub(r"\x1b\[[0-9;]*m", "", drawn.decode()))
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_a_terminal_shows_one_line_that_says_it_all(tmp_path):
    words = ("trainer.max_epochs=150", "num_members=4", "cluster.members_per_stack=2", "inference=anchored")
    lines = screen(tmp_path, 80, *words)
    live = [line for line in lines if re.search(r"━.* \d/4 members", line)]
    assert max(map(len, live)) <= 80
    full = r"[━╸╺ ]+ (\d)/4 members, step (\d+)/1800, NLL [\d.e-]+, [\d,]+ member-steps/s, ≤\d+:\d\d left"
    shown = [match for line in live if (match := re.fullmatch(full, line.rstrip()))]
    assert shown, live
    steps = [int(match[2]) for match in shown]
    assert steps == sorted(steps)
    assert lines[0].startswith("plan: ")
    # What is logged meanwhile stands above the line, not in it.
    assert lines.count("Targets are kept: no known noise") == 2
    (last,) = [line for line in lines if line.endswith("[complete]")]
    assert last.startswith("4/4 members, step 1800/1800, NLL ")
    assert any("test metrics of 4 members" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "work"),
    [
        (["inference=swag", "inference.start_epoch=2"], "train, 48 steps of 32 examples"),
        (
            ["inference=laplace", "inference.structure=diagonal"],
            "train, up to 48 steps of 32 examples; curvature, 13 steps of 32 examples",
        ),
    ],
)
def test_the_plan_says_what_each_member_has_before_it(words, work, train):
    assert f"plan: each member: {work}\n" in train("plan_only=true", "trainer.max_epochs=4", *words).out


def test_curves_are_in_the_units_of_metrics(bdl, train):
    run = train(
        "data=sklearn",
        "data.name=diabetes",
        "likelihood=gaussian",
        "inference=deep_ensemble",
        "trainer.max_epochs=20",
    ).run
    assert bdl("evaluate", f"run={run.path}", "part=val").status == 0
    metrics = read_json(run.evaluation("val") / "metrics.json")
    best = dict[int, float]()
    for _, event in EventReader(run).read():
        if event["key"] == "val/nll":
            best[event["member"]] = min(event["value"], best.get(event["member"], math.inf))
    # Early stopping keeps the weights of the best epoch.
    assert sum(best.values()) / len(best) == pytest.approx(metrics["val/mean_member_nll"], rel=1e-5)


def test_elsewhere_there_are_plain_lines(train, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    said = train("trainer.max_epochs=60", "cluster.members_per_stack=1")
    lines = said.out.splitlines()
    assert "training 2 members in 2 stacks" in lines
    running = [
        line for line in lines if re.match(r"[012]/2 members, step \d+/720, NLL [\d.]+, .*left$", line)
    ]
    assert running
    assert re.fullmatch(
        r"2/2 members, step 720/720, NLL [\d.]+, [\d,]+ member-steps/s  \[complete\]", running_end(lines)
    )
    assert "\x1b" not in said.out


def running_end(lines: list[str]) -> str:
    return next(line for line in lines if line.endswith("]"))


WANDB = ("tracking=wandb", "inference=deep_ensemble")


def test_wandb_offline_lies_in_the_run_directory(train):
    run = train(*WANDB).run
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert read_json(run.manifest)["status"] == "complete"


def test_a_wandb_that_fails_is_one_line_and_no_lost_training(train, monkeypatch):
    def broken(**settings):
        raise CommError("no network today")

    monkeypatch.setattr(wandb, "init", broken)
    said = train(*WANDB)
    assert said.err.count("no network today") == 1
    assert "Traceback" not in said.err
    assert said.run.status() == "complete"


def test_a_view_that_breaks_is_no_lost_training(train, monkeypatch, caplog):
    def broken(self, stack, event):
        raise UnicodeEncodeError("ascii", "━", 0, 1, "not in this terminal")

    monkeypatch.setattr(progress.Progress, "event", broken)
    with caplog.at_level(logging.WARNING):
        said = train()
    assert said.run.status() == "complete"
    assert caplog.text.count("not in this terminal") == 1


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_resumed_run_goes_on_being_tracked(mode, train, bdl):
    train(*WANDB, f"tracking.mode={mode}", "plan_only=true")
    (folder,) = Path("runs").glob("*/*")
    assert bdl("train", f"resume={folder}").status == 0
    assert bool(list(folder.glob("wandb/offline-run-*"))) == (mode == "offline")

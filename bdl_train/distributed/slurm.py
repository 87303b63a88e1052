"""Submission to Slurm: the templates of the folder slurm/, called with what `cluster` says of the site and the job."""

import importlib.resources
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from bdl_train.distributed import Resources, Submission, Submitter
from bdl_train.errors import UsageError
from bdl_train.files import write_bytes
from bdl_train.runs import RunDir, read_json

log = logging.getLogger(__name__)

FOLDER = "slurm"
"""Of the run directory: the scripts that were submitted and the jobs' logs."""


@dataclass(frozen=True, kw_only=True)
class Slurm(Submitter):
    """A Slurm cluster whose nodes share the run directory and the Python environment.

    Attributes:
        shape: `ray` = one job with a private Ray over its nodes; `array` = a job array with one stack a task and a job
            that joins their results: no co-scheduling, each stack is preempted and queued again alone.
        nodes: Of the one job; of `array`, tasks at the same time.
        cpus_per_node, gpus_per_node: What each node gives.
        mem: Memory a node as sbatch takes it (`8G`, or a number in MiB); null = the partition's default.
        time: Limit as sbatch takes it: minutes, or D-HH:MM:SS; null = the partition's default.
        signal_s: Seconds before the limit at which members are asked to save.
        partition, account, qos, constraint: As in sbatch; null = the site's default.
        options: Further options of sbatch, `["--exclusive"]`.
        modules: `module load` for each.
        venv: Folder of a virtual environment; null = the interpreter that submits.
        setup: Further shell lines before Python starts.
        container: Words before Python, `apptainer exec --nv image.sif`; null = none.
        num_workers, members_per_stack, cpus_per_stack, gpus_per_stack, ranks_per_stack, max_retries: As in `ray_local`.
    """

    shape: Literal["ray", "array"]
    nodes: Annotated[int, Field(ge=1)]
    cpus_per_node: Annotated[int, Field(ge=1)]
    gpus_per_node: Annotated[int, Field(ge=0)]
    mem: str | int | None
    time: str | int | None
    signal_s: Annotated[int, Field(ge=1)]
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    options: list[str]
    modules: list[str]
    venv: str | None
    setup: list[str]
    container: str | None
    num_workers: Annotated[int, Field(ge=1)] | None
    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0, le=1)]
    ranks_per_stack: Annotated[int, Field(ge=1)]
    max_retries: Annotated[int, Field(ge=0)]

    def __post_init__(self) -> None:
        if self.shape == "array":
            if self.ranks_per_stack > 1:
                raise UsageError(
                    f"cluster.ranks_per_stack={self.ranks_per_stack} needs Ray: set cluster.shape=ray."
                )
            if self.cpus_per_stack is None:  # a task is a stack
                object.__setattr__(self, "cpus_per_stack", self.cpus_per_node)

    def resources(self) -> Resources:
        return Resources.of_nodes([(self.cpus_per_node, self.gpus_per_node)] * self.nodes)

    @property
    def needs_whole_plan(self) -> bool:
        return self.shape == "array"

    def submit(self, run: RunDir) -> Submission:
        if shutil.which("sbatch") is None:
            raise UsageError(
                "cluster=slurm needs Slurm's sbatch, which is not on the PATH of this machine: log in to a node that "
                "submits jobs, or train here with `bdl train`."
            )
        self._warn_of_short_limit(run)
        folder = run.path.absolute() / FOLDER
        write_bytes(folder / "site.sh", self.site_script().encode())
        submit = self._submit_ray if self.shape == "ray" else self._submit_array
        return submit(run.path.absolute(), folder)

    def state(self, submission: Submission) -> str:
        return state_of({"ids": submission.ids})

    def site_script(self) -> str:
        """What every job sources first."""
        lines = [f"module load {shlex.quote(module)}" for module in self.modules]
        if self.venv is not None:
            lines.append(f". {shlex.quote(str(Path(self.venv).expanduser().absolute()))}/bin/activate")
        lines += self.setup
        python = "python" if self.venv is not None or self.container is not None else sys.executable
        lines.append(f"export BDL_PYTHON={shlex.quote(python)} BDL_MAX_RETRIES={self.max_retries}")
        lines.append(f"export BDL_CONTAINER={shlex.quote(self.container or '')}")
        return "\n".join(lines) + "\n"

    def _submit_ray(self, run: Path, folder: Path) -> Submission:
        options = [
            f"--nodes={self.nodes}",
            f"--cpus-per-task={self.cpus_per_node}",
            f"--output={folder}/job.log",
        ]
        options.append(f"--signal=B:USR1@{self.signal_s}")
        job = _sbatch([*options, *self._common(self.gpus_per_node)], folder, "ray.sbatch", run)
        return Submission("slurm", (job,), f"{FOLDER}/job.log")

    def _submit_array(self, run: Path, folder: Path) -> Submission:
        stacks = read_json(run / "plan.json")["stacks"]
        left = [
            i for i, one in enumerate(stacks) if not (run / "stacks" / one["id"] / "result.json").is_file()
        ]
        collect = ["--ntasks=1", f"--output={folder}/collect.log", *self._common(0)]
        if not left:  # an earlier array trained them all
            return Submission(
                "slurm", (_sbatch(collect, folder, "collect.sbatch", run),), f"{FOLDER}/collect.log"
            )
        gpus = 1 if self.gpus_per_stack > 0 else 0
        options = [f"--array={_ranges(left)}%{self.num_workers or self.nodes}", "--ntasks=1"]
        options += [f"--cpus-per-task={self.cpus_per_stack}", f"--output={folder}/stack-%a.log"]
        options.append(f"--signal=B:USR1@{self.signal_s}")
        array = _sbatch([*options, *self._common(gpus)], folder, "array.sbatch", run)
        try:
            last = _sbatch([f"--dependency=afterany:{array}", *collect], folder, "collect.sbatch", run)
        except UsageError:
            _said(["scancel", array])  # nobody would join what it trains
            raise
        return Submission("slurm", (array, last), f"{FOLDER}/collect.log")

    def _common(self, gpus: int) -> list[str]:
        given = {
            "mem": self.mem, "time": self.time, "partition": self.partition, "account": self.account,
            "qos": self.qos, "constraint": self.constraint, "gres": f"gpu:{gpus}" if gpus else None,
        }  # fmt: skip
        return [*(f"--{name}={value}" for name, value in given.items() if value is not None), *self.options]

    def _warn_of_short_limit(self, run: RunDir) -> None:
        limit = None if self.time is None else seconds_of(str(self.time))
        config = yaml.safe_load(run.config.read_text())
        every = config["trainer"]["checkpoint_every_s"]
        if limit is not None and limit - self.signal_s < every:
            log.warning(
                "cluster.time=%s leaves %d s before members are asked to save (cluster.signal_s=%d), less than one "
                "checkpoint interval (trainer.checkpoint_every_s=%g): a job that is ended early loses all its work",
                self.time, max(0, limit - self.signal_s), self.signal_s, every,
            )  # fmt: skip


def seconds_of(limit: str) -> int | None:
    """A time limit in Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None for any other text."""
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch takes them: `0-3,7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def _sbatch(options: Sequence[str], folder: Path, template: str, run: Path) -> str:
    """The id of the job that Slurm made of a template, which stays in the run directory as it was submitted.

    Raises:
        UsageError: Slurm refuses, in its own words.
    """
    script = folder / template
    write_bytes(script, (importlib.resources.files("bdl_train.slurm") / template).read_bytes())
    # Of a shell that is itself in a job; they would stand for options that nobody gave.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SLURMD_")) or name in ("SLURM_CONF", "SLURM_CLUSTERS")
    }
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(script), str(run)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    job = re.match(r"\d+", done.stdout)
    if done.returncode != 0 or job is None:
        words = (done.stderr.strip() or done.stdout.strip()).removeprefix("sbatch: error: ")
        raise UsageError(f"sbatch refuses the job: {words} (options: {shlex.join(options)})")
    return job.group()


# --- the state of a job -------------------------------------------------------------------------------------------

_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")


def state_of(submission: Mapping[str, Any]) -> str:
    """As `states_of`, of one."""
    return states_of([submission])[0]


def states_of(submissions: Sequence[Mapping[str, Any]]) -> list[str]:
    """`queued`, `running`, `ended` or `unknown` of each, from whichever of squeue, sacct and scontrol knows its jobs.

    Each program is asked once, of all jobs. A site may have no accounting (no sacct), and Slurm itself forgets a job
    minutes after its end: one that squeue does not list, and that nobody remembers, has ended.
    """
    jobs = [
        [str(one) for one in each.get("ids", ()) if re.fullmatch(r"\d+", str(one))] for each in submissions
    ]
    states = ["unknown"] * len(jobs)
    for ask, pattern in _ASKS:
        left = [i for i, ids in enumerate(jobs) if ids and states[i] == "unknown"]
        if not left:
            return states
        listed = ",".join(sorted({one for i in left for one in jobs[i]}))
        told: dict[str, list[str]] = {}
        for job, state in re.findall(pattern, _said([word.format(jobs=listed) for word in ask]) or "", re.M):
            told.setdefault(job, []).append(state)
        for i in left:
            if known := [state for one in jobs[i] for state in told.get(one, [])]:
                states[i] = _joined(known)
    left = [i for i, ids in enumerate(jobs) if ids and states[i] == "unknown"]
    if left and _said(["squeue", "--noheader", "--me", "--format=%T"]) is not None:
        states = ["ended" if i in left else state for i, state in enumerate(states)]
    return states


# Words, and where the answer has a job's number (of an array: the whole array's) and its state.
_ASKS = (
    (("squeue", "--noheader", "--jobs={jobs}", "--format=%F %T"), r"^(\d+) (\w+)"),
    (
        ("sacct", "--noheader", "--allocations", "--jobs={jobs}", "--format=JobID,State", "--parsable2"),
        r"^(\d+)[^|]*\|(\w+)",
    ),
    (
        ("scontrol", "--oneliner", "show", "job"),
        r"^(?:JobId=\d+ .*?ArrayJobId=|JobId=)(\d+)\b.*? JobState=(\w+)",
    ),
)


def _said(words: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _joined(states: Sequence[str]) -> str:
    if any(state in _RUNNING for state in states):
        return "running"
    return "queued" if any(state in _WAITING for state in states) else "ended"

"""Hand a run to the queue of a cluster, where `bdl train` carries it out.

Everything is checked here first, as `bdl train` would. A run that was stopped, or prepared with plan_only=true, is
handed over by `resume=<run>`; its own settings decide.

Examples:
    bdl submit cluster.nodes=2 cluster.cpus_per_node=8 cluster.time=60 num_members=32
    bdl submit cluster.shape=array cluster.nodes=10 cluster.members_per_stack=1 num_members=40
    bdl submit data=uci data.name=energy likelihood=heteroscedastic_gaussian follow=true
"""

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bdl_train.build import build
from bdl_train.config import Options, override_key
from bdl_train.distributed import Cluster, Submission, Submitter
from bdl_train.distributed.queues import state_of
from bdl_train.errors import Exit, RunFailedError, UsageError
from bdl_train.files import write_json
from bdl_train.locks import lock_is_held
from bdl_train.runs import RunDir, read_json
from bdl_train.verbs._resume import check_unchanged, resumed_config
from bdl_train.verbs._unused import refuse_unused
from bdl_train.verbs.train import checked, new_run, remove_untrained

POLL_S = 1.0
MOST_UNKNOWN = 120
"""Times that the state may be asked for in vain, one after another."""
ACTIVE = ("queued", "running")
STATUS = {"complete": Exit.DONE, "partial": Exit.PARTIAL, "failed": Exit.FAILED}


def run(config: dict[str, Any], options: Options) -> Exit:
    """Queue one run, and with `follow=true` wait for it."""
    follow = config.pop("follow")
    if not isinstance(follow, bool):
        raise UsageError(f"follow must be true or false, got {follow!r}.")
    cluster = build(config["cluster"], Cluster, key="cluster")
    if not isinstance(cluster, Submitter):
        name = type(cluster).__module__.rpartition(".")[2]
        raise UsageError(
            f"cluster={name} has no queue: use `bdl train cluster={name}`, or cluster=slurm here."
        )
    run_dir = _prepared(config, options, cluster)
    try:
        submission = cluster.submit(run_dir)
    except UsageError:
        if config["resume"] is None:
            remove_untrained(run_dir)
        raise
    write_json(run_dir.submission, {**asdict(submission), "submitted": time.time()})
    print(
        f"job {', '.join(submission.ids)}: `bdl runs` shows its state, its log is {run_dir.path / submission.log}"
    )
    print(f"run: {run_dir.path}")
    if not follow:
        return Exit.DONE
    try:
        return _follow(run_dir, submission, cluster)
    except KeyboardInterrupt:
        print("\nno longer followed; the job goes on", file=sys.stderr)
        raise


def _prepared(config: dict[str, Any], options: Options, cluster: Submitter) -> RunDir:
    if config["resume"] is None:
        if config["plan_only"] or config["check_prior"]:
            raise UsageError(
                "plan_only and check_prior are for bdl train: look first, then bdl submit resume=RUN."
            )
        refuse_unused(config, options.overrides)
        return new_run(checked(config, cluster))
    words = tuple(word for word in options.overrides if override_key(word) != "follow")
    settled = {**resumed_config(config, replace(options, overrides=words)), "cluster": config["cluster"]}
    run_dir = RunDir(Path(config["resume"]))
    if run_dir.status() == "complete":
        raise UsageError(f"resume={run_dir.path} is complete: nothing is left to submit.")
    if lock_is_held(run_dir.lock):
        raise UsageError(
            f"resume={run_dir.path} is in use by another process: wait for it, or stop it first."
        )
    if (
        run_dir.submission.is_file()
        and (state := state_of(earlier := read_json(run_dir.submission))) in ACTIVE
    ):
        jobs = ", ".join(earlier["ids"])
        raise UsageError(f"resume={run_dir.path} is submitted already: job {jobs} is {state}.")
    check_unchanged(run_dir, checked(settled, cluster).inputs)
    run_dir.stop_file.unlink(missing_ok=True)
    return run_dir


def _follow(run_dir: RunDir, submission: Submission, cluster: Submitter) -> Exit:
    """Print the job's log as it grows, until the job has ended."""
    path, offset, state, unknown = run_dir.path / submission.log, 0, "", 0
    while True:
        ended = state == "ended"  # what is in the file now is all of it
        if path.is_file():
            with path.open("rb") as file:
                file.seek(offset)
                block = file.read()
            offset += len(block)
            sys.stdout.write(block.decode(errors="replace"))
            sys.stdout.flush()
        if ended:
            break
        now = cluster.state(submission)
        unknown = unknown + 1 if now == "unknown" else 0
        if unknown >= MOST_UNKNOWN:
            raise RunFailedError(
                f"the queue says nothing of job {', '.join(submission.ids)} any more. It may go on: see "
                f"{path}, and `bdl runs`."
            )
        if now != state and now != "ended":
            print(f"[{now}]", flush=True)
        state = now
        time.sleep(POLL_S)
    status = run_dir.status()
    if status not in STATUS:
        print(
            f"the job ended before the run was finished: go on with bdl submit resume={run_dir.path}",
            file=sys.stderr,
        )
        return Exit.STOPPED if any(run_dir.path.glob("stacks/*/checkpoint.pt")) else Exit.FAILED
    return STATUS[status]

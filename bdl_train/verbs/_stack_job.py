"""One stack of a prepared run, as a job of its own: `python -m bdl_train.verbs._stack_job RUN NUMBER`.

A task of a job array calls it with its number in the plan. SIGUSR1 and SIGTERM ask the stack to save and stop; the
status is then 75, and the same call goes on. `bdl train resume=RUN cluster=collect` makes the posterior afterwards.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Any

from bdl_train.distributed import Job
from bdl_train.distributed.inline import Inline
from bdl_train.distributed.plan import Plan
from bdl_train.errors import Exit, UsageError, guarded
from bdl_train.runs import RunDir, read_json
from bdl_train.verbs._resume import check_unchanged
from bdl_train.verbs._runs import load_data, read_config
from bdl_train.verbs.train import inputs_of

MEANING = {"stopped": Exit.STOPPED, "failed": Exit.FAILED}


def train_one(run: RunDir, number: int) -> Exit:
    """Train the stack with this number, and what its result asks for."""
    config = read_config(run)
    stacks = Plan.from_json(read_json(run.plan), config["num_members"]).stacks
    if not 0 <= number < len(stacks):
        raise UsageError(f"the plan of {run.path} has the stacks 0 to {len(stacks) - 1}, got {number}.")
    task = stacks[number]
    stop_file = run.stack(task.id) / run.stop_file.name
    stop_file.unlink(missing_ok=True)

    def stop(signum: int, frame: Any) -> None:
        stop_file.parent.mkdir(parents=True, exist_ok=True)
        stop_file.touch()

    for number_of_signal in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number_of_signal, stop)
    data = load_data(config)
    check_unchanged(run, inputs_of(config, data))
    inline = Inline(members_per_stack=None, cpus_per_stack=task.cpus, gpus_per_stack=task.gpus)
    results = inline.launch([task], Job(config, data, run), lambda: None)
    for stack, result in results.items():
        print(f"stack {stack}: {result['status']} {result.get('reason', '')}".rstrip(), flush=True)
    return next((MEANING[one["status"]] for one in results.values() if one["status"] in MEANING), Exit.DONE)


def main(words: Sequence[str]) -> int:
    if len(words) != 2 or not words[1].isdigit():
        print(__doc__, file=sys.stderr)
        return Exit.USAGE
    return guarded("stack job", lambda: train_one(RunDir.open(words[0]), int(words[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

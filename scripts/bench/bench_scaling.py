"""What distribution costs: members an hour on 1 and 2 workers against bare processes, and the driver's time a stack.

    python scripts/bench/bench_scaling.py [REPEATS]

All figures are taken in one run, bare processes and workers in turn; the median of the repeats is printed. Start-up (of
Ray, of worker processes, of imports) is listed and left out of the throughput.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bdl_train.config import compose
from bdl_train.distributed import Job, Resources, _ray_loop, ray_local
from bdl_train.distributed._ray_loop import RayLoop
from bdl_train.files import write_bytes
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask
from bdl_train.verbs._runs import load_data

WORDS = ("inference=deep_ensemble", "inference.patience=null", "trainer.max_epochs=60", "data.batch_size=8")
STACKS, NO_OPS = 8, 1000


def job_in(folder: Path) -> Job:
    config = compose("train", [*WORDS, f"num_members={STACKS}"])
    run = RunDir(folder)
    write_bytes(run.config, b"{}\n")
    return Job(config, load_data(config), run)


def tasks() -> list[StackTask]:
    return [StackTask(id=f"{i:03d}", members=(i,), cpus=1, gpus=0) for i in range(STACKS)]


def bare(connection: Any) -> None:
    """A process that trains stacks as it is told, without Ray; the first message warms it up."""
    from bdl_train.training.train_stack import train_stack

    while (message := connection.recv()) is not None:
        folder, numbers = message
        job, all_tasks = job_in(Path(folder)), tasks()
        start = time.perf_counter()
        for number in numbers:
            train_stack(all_tasks[number], job.config, job.data, job.run)
        connection.send(time.perf_counter() - start)


def no_op(task: StackTask, *rest: Any) -> dict[str, Any]:
    return {"status": "done", "members": []}


def main(repeats: int) -> None:
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    ray = ray_local.start(Resources(2, 0))
    print(f"start of Ray {time.perf_counter() - start:.1f} s")
    pipes, processes = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=bare, args=(theirs,), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)

    def on_ray(workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            loop = RayLoop(ray, job_in(Path(folder)), num_workers=workers, max_retries=0)
            begin = time.perf_counter()
            results = loop.run(tasks(), lambda: None)
            spent = time.perf_counter() - begin
        assert all(result["status"] == "done" for result in results.values())
        return spent

    def on_bare(workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            for i in range(workers):
                pipes[i].send((folder, list(range(STACKS))[i::workers]))
            for i in range(workers):
                pipes[i].recv()
            return time.perf_counter() - begin

    start = time.perf_counter()
    on_ray(2)
    print(
        f"first {STACKS} stacks, with the start of two workers and their imports {time.perf_counter() - start:.1f} s"
    )
    on_bare(2)
    spent: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):  # interleaved: the machine's other work meets all of them alike
        for workers in (1, 2):
            spent.setdefault(("ray", workers), []).append(on_ray(workers))
            spent.setdefault(("bare", workers), []).append(on_bare(workers))
    median = {key: statistics.median(times) for key, times in spent.items()}
    print("| workers | bare members/h | Ray members/h | Ray / bare |\n| --- | --- | --- | --- |")
    for workers in (1, 2):
        one, other = median["bare", workers], median["ray", workers]
        print(
            f"| {workers} | {3600 * STACKS / one:,.0f} | {3600 * STACKS / other:,.0f} | {one / other:.2f} |"
        )
    for pipe in pipes:
        pipe.send(None)

    true_work, _ray_loop.work_remotely = _ray_loop.work_remotely, no_op
    with tempfile.TemporaryDirectory() as folder:
        loop = RayLoop(ray, job_in(Path(folder)), num_workers=None, max_retries=0)
        many = [StackTask(id=f"{i:04d}", members=(i,), cpus=1, gpus=0) for i in range(NO_OPS)]
        begin = time.perf_counter()
        loop.run(many, lambda: None)
        a_stack = 1000 * (time.perf_counter() - begin) / NO_OPS
        launched = sum(
            1 for line in (Path(folder) / "driver.jsonl").open() if json.loads(line)["key"] == "launched"
        )
    _ray_loop.work_remotely = true_work
    print(f"{launched} stacks that do nothing: {a_stack:.1f} ms a stack")
    ray_local.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)

"""How fast the dashboard opens and follows a large run: 1,000 members, a million stored events.

    python scripts/bench/bench_dashboard.py [MEMBERS] [EVENTS]

Prints the time from an empty server to the first answer for the run, the size of that answer, the server's memory, and
whether a writer of some thousand events a second is followed without falling behind.
"""

import json
import resource
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from bdl_train.events import EventWriter
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking.dashboard.server import Dashboard

STACK = 20


def main(num_members: int, num_events: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "big" / "20260101-000000-abcdef")
        stacks = [list(range(start, start + STACK)) for start in range(0, num_members, STACK)]
        write_run(run, stacks, num_events)
        size = sum(path.stat().st_size for path in run.path.glob("stacks/*/events.jsonl"))
        server = Dashboard(Path(folder), "127.0.0.1", 0, None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ask(server, "/api/runs")  # imports, and the page before
        before = peak_mib()
        start = time.perf_counter()
        answer, length = ask(server, "/api/run", id="big/20260101-000000-abcdef")
        opened = time.perf_counter() - start
        start = time.perf_counter()
        ask(server, "/api/run", id="big/20260101-000000-abcdef")
        again = time.perf_counter() - start
        print(f"{num_members} members, {answer['events']:,} events, {size / 2**20:.0f} MiB of event files")
        print(
            f"first answer {opened:.2f} s, answer {length / 1024:.0f} KiB, next answer {again * 1000:.0f} ms"
        )
        print(f"peak memory of the process {before:.0f} MiB before, {peak_mib():.0f} MiB after")
        follow(server, run, answer["events"])
        server.shutdown()
        server.server_close()


def write_run(run: RunDir, stacks: list[list[int]], num_events: int) -> None:
    """A running run as `bdl train` writes it: two curves for every member, progress twice a second."""
    run.path.mkdir(parents=True)
    run.config.write_text("inference:\n  _target_: bdl_train.inference.swag.Swag\nseed: 0\n")
    entries = [{"id": f"{i:03d}", "members": members} for i, members in enumerate(stacks)]
    write_json(run.plan, {"stacks": entries, "reasons": ["for a benchmark"], "num_workers": 2})
    steps = num_events // (2 * sum(map(len, stacks)))
    random = np.random.default_rng(0)
    for i, members in enumerate(stacks):
        writer = EventWriter(run.stack(f"{i:03d}") / "events.jsonl")
        started = {
            "members": members,
            "executor": "vmap",
            "device": "cpu",
            "host": "n",
            "node": "n",
            "pid": 1,
        }
        writer.write("started", [(None, started)], step=0)
        for step in range(steps):
            for key in ("train/nll", "val/nll"):
                values = (1 / (1 + step) + 0.1 * random.random(len(members))).tolist()
                writer.write(key, list(zip(members, values, strict=True)), step=100 * step)
            if step % 5 == 0:
                progress = {
                    "step": 100 * step,
                    "num_steps": 200 * steps,
                    "active": len(members),
                    "failed": 0,
                    "nll": 0.1,
                }
                writer.write("progress", [(None, progress)], step=100 * step)
        writer.close()


def follow(server: Dashboard, run: RunDir, known: int, rate: int = 4000, seconds: float = 5.0) -> None:
    """Write so many events a second and poll as the page does, once a second."""
    done, written = threading.Event(), 0

    def write() -> None:
        nonlocal written
        writer = EventWriter(run.stack("000") / "events.jsonl")
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            writer.write("train/nll", [(m, 0.1) for m in range(STACK)], step=10**6 + written)
            writer.flush()
            written += STACK
            time.sleep(max(0.0, start + written / rate - time.monotonic()))
        writer.close()
        done.set()

    threading.Thread(target=write, daemon=True).start()
    behind = []
    while not done.wait(1.0):
        at = written
        behind.append(at - (ask(server, "/api/run", id="big/20260101-000000-abcdef")[0]["events"] - known))
    total = ask(server, "/api/run", id="big/20260101-000000-abcdef")[0]["events"] - known
    print(
        f"followed {written / seconds:,.0f} events/s; behind at each look: {max(0, *behind)} at most; "
        f"{total} of {written} seen"
    )


def ask(server: Dashboard, path: str, **query: str) -> tuple[dict[str, Any], int]:
    url = f"http://127.0.0.1:{server.server_port}{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=120) as answer:
        content = answer.read()
    return json.loads(content), len(content)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*(numbers + [1000, 1_000_000][len(numbers) :]))

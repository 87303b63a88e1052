"""A Ray of several nodes on this machine, in a process of its own, told what to do by lines on its standard input.

`add NAME CPUS` starts a node, `kill NAME` ends its daemon as a lost machine would, `drain NAME` takes it out of service
with a deadline, the end of the input ends all. Each command is answered by a line; the first one holds the address.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAST = {
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1000,
    "health_check_initial_delay_ms": 0,
}


class RayNodes:
    """The other end of this script's pipe."""

    def __init__(self, process: "subprocess.Popen[str]", token: str) -> None:
        self._process, self.token, self.session = process, token, process.pid
        self.address = self._answer()

    def tell(self, *words: object) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the cluster's process ended"
            if line.startswith("ok "):
                return line.split()[1]


@contextmanager
def ray_nodes(token: str, *nodes: tuple[str, int], prefix: tuple[str, ...] = ()) -> Iterator[RayNodes]:
    """A cluster with these (name, CPUs) beside its head, which has none."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
    }  # fmt: skip
    process = subprocess.Popen(
        [*prefix, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        cluster = RayNodes(process, token)
        for name, cpus in nodes:
            cluster.tell("add", name, cpus)
        yield cluster
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def main() -> None:
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": FAST}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = {}
    print("ok", cluster.address, flush=True)
    for line in sys.stdin:
        word, name, *more = line.split()
        if word == "add":
            os.environ["BDL_NODE"] = name
            nodes[name] = cluster.add_node(num_cpus=int(more[0]))
        elif word == "kill":
            nodes.pop(name).kill_raylet()
        elif word == "drain":
            client = GcsClient(address=cluster.address)
            client.drain_node(nodes[name].node_id, 2, "preempted", int(more[0]))
        print("ok", name, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent.resolve()]
    main()

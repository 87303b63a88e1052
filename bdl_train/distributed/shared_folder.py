"""Whether all nodes of a cluster see the run directory: results are files, so they must."""

import secrets
import socket
from pathlib import Path
from typing import Any

from bdl_train.errors import RunFailedError, UsageError
from bdl_train.runs import RunDir

TIMEOUT_S = 60.0


def require_shared(ray: Any, run: RunDir) -> None:
    """Let every node look for a file that was just written.

    Args:
        ray: The module, connected.
        run: Where the file is written, and removed again.

    Raises:
        UsageError: a node does not see it.
        RunFailedError: a node that is said to be alive does not answer.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    word = secrets.token_hex(8)
    probe = run.path.absolute() / f".probe-{word}"
    probe.write_text(word)
    look = ray.remote(num_cpus=0, max_retries=1)(_look)
    try:
        asked = {
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            ).remote(str(probe), word): node["NodeManagerAddress"]
            for node in ray.nodes()
            if node["Alive"]
        }
        seen, silent = ray.wait(list(asked), num_returns=len(asked), timeout=TIMEOUT_S)
        if silent:
            raise RunFailedError(
                f"The node {asked[silent[0]]} does not start a worker within {TIMEOUT_S:g} s."
            )
        blind = sorted({host for found, host in ray.get(seen) if not found})
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise UsageError(
            f"{', '.join(blind)} does not see {run.path.absolute()}, where members leave their results: set output_dir "
            "to a folder on a file system that all nodes share."
        )


def _look(path: str, word: str) -> tuple[bool, str]:
    """Whether the file is seen here, and where here is."""
    import os

    place = os.environ.get("BDL_NODE", socket.gethostname())
    try:
        return Path(path).read_text() == word, place
    except OSError:
        return False, place

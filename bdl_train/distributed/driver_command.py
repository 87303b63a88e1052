"""The command that carries out a submitted run from inside a Ray cluster."""

import yaml

from bdl_train.runs import RunDir

PLANNED = (
    "num_workers",
    "members_per_stack",
    "cpus_per_stack",
    "gpus_per_stack",
    "ranks_per_stack",
    "max_retries",
)
"""Keys of any `cluster` choice that the driver's own choice takes over."""


def driver_command(run: RunDir, address: str, python: str) -> list[str]:
    """`bdl train` on this Ray, with what the run's own `cluster` group says of stacks.

    Args:
        run: As the cluster's nodes see it.
        address: Of the Ray, or `auto`.
        python: The interpreter on its nodes.
    """
    stored = yaml.safe_load(run.config.read_text())["cluster"]
    kept = [
        f"cluster.{key}={'null' if stored[key] is None else stored[key]}" for key in PLANNED if key in stored
    ]
    words = ["train", f"resume={run.path}", "cluster=ray_cluster", f"cluster.address={address}", *kept]
    return [python, "-m", "bdl_train", *words]

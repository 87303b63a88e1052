"""A list of independent tasks over the processes of a Ray."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bdl_train.build import allowed_packages, allowing
from bdl_train.errors import RunFailedError

RETRIES = 2


def ray_map(
    ray: Any,
    function: Callable[..., Any],
    shared: tuple[Any, ...],
    tasks: Sequence[Any],
    *,
    cpus: int,
    gpus: float,
    at_once: int | None,
) -> Iterator[Any]:
    """As `Launcher.map`; a task whose process died is started again.

    Args:
        ray: The module, connected.
        function, shared, tasks: As in `Launcher.map`.
        cpus, gpus: Of each task.
        at_once: Most tasks at a time; None = as many as there is room for.

    Raises:
        RunFailedError: a task whose process died more than twice.
    """
    remote = ray.remote(max_retries=RETRIES, num_cpus=cpus, num_gpus=gpus)(_call)
    reference = ray.put((function, shared))
    packages = allowed_packages()
    waiting, flying = list(reversed(tasks)), []
    try:
        while waiting or flying:
            while waiting and (at_once is None or len(flying) < at_once):
                flying.append(remote.remote(reference, waiting.pop(), packages, cpus))
            (done, *_), flying = ray.wait(flying)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise RunFailedError(
                    f"A process that scored rows died {RETRIES + 1} times: {error}"
                ) from error
    finally:
        for one in flying:
            ray.cancel(one, force=True)


def _call(
    work: tuple[Callable[..., Any], tuple[Any, ...]], task: Any, packages: Sequence[str], cpus: int
) -> Any:
    import torch

    # Workers inherit the batch system's variables, which libraries would take for their own rank.
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    torch.set_num_threads(cpus)
    function, shared = work
    with allowing(packages):
        return function(*shared, task)

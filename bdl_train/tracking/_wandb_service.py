"""The wandb library at arm's length: is there a key, start a run within a bound, be rid of its service process."""

import os
import subprocess
from contextlib import suppress
from typing import Any, Literal

Place = Literal["online", "offline"]


def library() -> Any:
    """The wandb module, quiet."""
    # Its service also reports to the server how it fares, and waits for that at its end: with a server that hangs,
    # 12 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    return wandb


def why_not_online() -> str:
    """Why there is no point in trying the server; empty if a key is there. Asks files and environment, no network."""
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode != "online":
        return f"the environment says WANDB_MODE={mode}"
    wandb = library()
    try:
        found = wandb.login(prompt=False, verify=False)
    except Exception as error:
        return first_line(error)
    return "" if found else f"no key for {server()} in WANDB_API_KEY or a netrc file"


def server() -> str:
    return str(library().setup().settings.base_url)


def open_run(
    place: Place,
    *,
    init_timeout_s: float,
    finish_timeout_s: float,
    **words: Any,
) -> Any:
    """A wandb run that goes on where an earlier one of its id ended.

    Raises:
        Exception: of wandb's own kinds, or the system's; when online after `init_timeout_s` at the latest.
    """
    wandb = library()
    run = wandb.init(
        mode=place,
        resume="allow",
        reinit="create_new",
        allow_val_change=True,
        settings=wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=init_timeout_s,
            login_timeout=init_timeout_s,
            finish_timeout=finish_timeout_s if place == "online" else 0.0,
            finish_timeout_raises=True,
        ),
        **words,
    )
    # Members of other stacks are at other steps: the x-axis is the step that each row carries.
    run.define_metric("*", step_metric="step")
    return run


def end_service() -> None:
    """End the service process and every run in it. A run that could not start keeps its id until then."""
    library().teardown()


def service_process() -> subprocess.Popen[bytes] | None:
    """The process behind all runs of this one, to be killed when it hangs; None where wandb keeps it elsewhere."""
    with suppress(ImportError, AttributeError):
        from wandb.sdk import wandb_setup

        process = wandb_setup.singleton()._connection._proc._process  # pyright: ignore[reportOptionalMemberAccess]
        return process if isinstance(process, subprocess.Popen) else None
    return None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

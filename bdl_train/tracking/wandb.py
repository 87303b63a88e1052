"""wandb: one run, `member/07/...` keys, written by the driver only."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Wandb(Tracker):
    """Logs to wandb; a failure of wandb is logged once and never fails the training.

    Attributes:
        mode: `offline` writes `<run>/wandb`, for `wandb sync` later; `online` sends, and falls back to offline when
            the server cannot be reached; `disabled` does nothing.
        project, entity: As in wandb; a null entity is the account's own.
        init_timeout_s: Seconds to wait for the server, at the start and at the end, before going on without it.
    """

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(min_length=1)]
    entity: str | None
    init_timeout_s: Annotated[float, Field(gt=0)]
    _run: Any = field(default=None, init=False, repr=False)
    _row: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _row_stack: str = field(default="", init=False, repr=False)

    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        if self.mode == "disabled":
            return
        try:
            self._run = self._init(run, config, self.mode)
        except Exception as error:  # wandb raises its own, requests' and OS errors
            if self.mode == "offline":
                self._give_up("start", error)
                return
            log.warning("wandb failed to start online (%s): it writes offline, for wandb sync later", error)
            try:
                self._run = self._init(run, config, "offline")
            except Exception as again:
                self._give_up("start", again)

    def _init(self, run: RunDir, config: Mapping[str, Any], mode: Literal["offline", "online"]) -> Any:
        import wandb

        started = wandb.init(
            mode=mode,
            project=self.project,
            entity=self.entity,
            id=run.path.name,
            name=f"{run.path.parent.name}/{run.path.name}",
            config=dict(config),
            # Absolute: the service of wandb keeps the working directory of the run that started it.
            dir=str(run.path.resolve()),
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                x_disable_meta=True,
                init_timeout=self.init_timeout_s,
                login_timeout=self.init_timeout_s,
                finish_timeout=self.init_timeout_s if mode == "online" else 0.0,
            ),
        )
        # Members of other stacks are at other steps: the x-axis is the step that each row carries.
        started.define_metric("*", step_metric="step")
        return started

    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        value = event["value"]
        if not isinstance(value, int | float) or isinstance(value, bool):
            return
        if self._row and (stack, event["step"]) != (self._row_stack, self._row["step"]):
            self._send()
        where = f"stack/{stack}" if event["member"] is None else f"member/{event['member']:02d}"
        self._row_stack = stack
        self._row |= {f"{where}/{event['key']}": value, "step": event["step"]}

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        self._send()
        if self._run is None:
            return
        try:
            self._run.summary.update({"status": status, **metrics})
            self._run.finish(exit_code=0 if status in ("complete", "partial") else 1)
        except Exception as error:
            self._give_up("finish", error)
        self._run = None

    def _send(self) -> None:
        """One row of wandb's history holds what one stack said at one step."""
        row, self._row = self._row, {}
        if self._run is None or not row:
            return
        try:
            self._run.log(row)
        except Exception as error:
            self._give_up("log", error)

    def _give_up(self, doing: str, error: Exception) -> None:
        log.warning("wandb failed to %s (%s): the run goes on without it", doing, error)
        self._run = None

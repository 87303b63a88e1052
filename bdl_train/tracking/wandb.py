"""wandb: one run, `member/07/...` keys, written by the driver only."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Wandb(Tracker):
    """Logs to wandb; a failure of wandb is logged once and never fails the training.

    Attributes:
        mode: `offline` writes `<run>/wandb`, for `wandb sync` later; `online` sends; `disabled` does nothing.
        project, entity: As in wandb; a null entity is the account's own.
        init_timeout_s: Seconds to wait for the server before going on without it.
    """

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    init_timeout_s: float
    _run: Any = field(default=None, init=False, repr=False)

    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                id=run.path.name,
                name=f"{run.path.parent.name}/{run.path.name}",
                config=dict(config),
                dir=str(run.path),
                resume="allow",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,
                    x_disable_meta=True,
                    init_timeout=self.init_timeout_s,
                ),
            )
        except Exception as error:  # wandb raises its own, requests' and OS errors
            self._give_up("start", error)

    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        if not isinstance(event["value"], int | float) or isinstance(event["value"], bool):
            return
        where = f"stack/{stack}" if event["member"] is None else f"member/{event['member']:02d}"
        self._log({f"{where}/{event['key']}": event["value"], "step": event["step"]})

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        if self._run is None:
            return
        try:
            self._run.summary.update({"status": status, **metrics})
            self._run.finish(exit_code=0 if status in ("complete", "partial") else 1)
        except Exception as error:
            self._give_up("finish", error)

    def _log(self, values: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(values))
        except Exception as error:
            self._give_up("log", error)

    def _give_up(self, doing: str, error: Exception) -> None:
        log.warning("wandb failed to %s (%s): the run goes on without it", doing, error)
        self._run = None

"""wandb: one run with `member/07/...` and `ensemble/...` curves, written by the driver only."""

import logging
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker
from bdl_train.tracking._wandb_outcome import outcome_rows
from bdl_train.tracking._wandb_service import (
    Place,
    end_service,
    first_line,
    open_run,
    server,
    service_process,
    why_not_online,
)
from bdl_train.tracking.curves import EnsembleCurves, Point, is_number
from bdl_train.tracking.handed import Handed
from bdl_train.tracking.outcome import planned_stacks
from bdl_train.tracking.worker import Worker

log = logging.getLogger(__name__)

MOST_MEMBER_RUNS = 50
SLACK_S = 5.0
"""On top of what wandb itself is given, before it counts as hanging."""
FINAL = ("complete", "partial", "failed")


@dataclass(kw_only=True)
class Wandb(Tracker):
    """Logs to wandb from a thread of its own: neither its server nor its service can hold up a training.

    Attributes:
        mode: `auto` is online if a key is found and the server answers, else offline, with one line that says why.
            `online` wants a key, and else is the same. `offline` writes `<run>/wandb`, for `wandb sync` later.
            `disabled` does nothing.
        project, entity: As in wandb; a null entity is the account's own.
        member_runs: Also a run for every member, in a group with the run's id; for 50 members at most.
        init_timeout_s: Seconds that the server has to answer at the start.
        finish_timeout_s: Seconds at the end to send what is left.
    """

    mode: Literal["auto", "offline", "online", "disabled"]
    project: Annotated[str, Field(min_length=1)]
    entity: str | None
    member_runs: bool
    init_timeout_s: Annotated[float, Field(gt=0)]
    finish_timeout_s: Annotated[float, Field(gt=0)]
    _session: "_Session | None" = field(default=None, init=False, repr=False)

    def check(self, num_members: int) -> None:
        if self.member_runs and num_members > MOST_MEMBER_RUNS:
            raise UsageError(
                f"tracking.member_runs=true makes a wandb run a member, {num_members} here, and {MOST_MEMBER_RUNS} at "
                "most: the run itself has every member's curves as member/07/..., set tracking.member_runs=false."
            )
        if self.mode == "online" and (why := why_not_online()):
            raise UsageError(
                f"tracking.mode=online, but {why}: call `wandb login`, or choose tracking.mode=auto."
            )

    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        if self.mode != "disabled":
            self._session = _Session(self, run, config)

    def past(self, stack: str, event: Mapping[str, Any]) -> None:
        # What an earlier session handed over is known by the file that remembers it, not by when it happened: that
        # session may have had another tracker, or none.
        self.event(stack, event)

    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        if self._session is not None:
            self._session.take(stack, event)

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        if self._session is not None:
            self._session.finish(status, metrics)


class _Session:
    """One wandb run while it is open. Everything that wandb is asked to do, its thread does.

    Raises:
        RuntimeError: wandb failed, or hangs; also by `take` and `finish`. Nothing of it is left behind then.
    """

    def __init__(self, settings: Wandb, run: RunDir, config: Mapping[str, Any]) -> None:
        self._settings, self._dir = settings, run
        self._id = re.sub(r"[^\w.-]", "-", run.path.resolve().name)
        self._worker = Worker("wandb")
        self._members: dict[int, Any] = {}
        self._row: dict[str, Any] = {}
        self._row_at: tuple[str, int, int] | None = None  # stack, step, events of its file so far
        self._run: Any = None
        self._process = None
        why = "" if settings.mode == "offline" else why_not_online()
        self._place: Place = "offline" if why or settings.mode == "offline" else "online"
        self._why = why
        self._worker.put(lambda: self._open(config))
        self._require(self._worker.wait(2 * settings.init_timeout_s + SLACK_S), "start")
        target = f"{server()} {settings.entity or ''}/{settings.project}"
        # What waits in an offline folder reaches the same wandb run as what was sent.
        instead = [f"wandb online {target}"] if self._place == "offline" else []
        self._handed = Handed(run.tracking, f"wandb {self._place} {target}", instead)
        self._curves = EnsembleCurves(planned_stacks(run))
        if self._why:
            log.warning(
                "wandb writes offline (%s); send it later: wandb sync %s", self._why, self._folder(self._run)
            )
        elif self._place == "online":
            log.info("wandb: %s", self._run.url)

    # --- what the driver calls -------------------------------------------------------------------------------------

    def take(self, stack: str, event: Mapping[str, Any]) -> None:
        """An event of a stack, in the order of its file."""
        key, member, step, value = event["key"], event["member"], event["step"], event["value"]
        if self._row_at is not None and (stack, step) != self._row_at[:2]:
            self._send_row()
        is_new = self._handed.is_new(stack)
        for point in self._curves.take(stack, event):
            self._send_point(point)
        if is_new and is_number(value):
            where = f"stack/{stack}" if member is None else f"member/{member:02d}"
            self._row[f"{where}/{key}"] = value
            self._row_at = (stack, step, self._handed.position(stack))
        elif is_new and key == "member" and self._settings.member_runs:
            self._send_row()
            self._call("log", lambda: self._end_member(member, value))

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        """Send what is left, the tables and the summary."""
        self._send_row()
        if status in FINAL:
            for point in self._curves.rest():
                self._send_point(point)
        self._call("finish", lambda: self._close(status, metrics))
        self._require(self._worker.wait(self._settings.finish_timeout_s + SLACK_S), "finish")
        self._worker.close()

    def _send_row(self) -> None:
        """One row of wandb's history holds what one stack said at one step."""
        if self._row_at is None:
            return
        (stack, step, position), row = self._row_at, self._row
        self._row_at, self._row = None, {}
        self._call("log", lambda: self._log(stack, step, position, row))

    def _send_point(self, point: Point) -> None:
        if self._handed.is_new_point(point.key, point.step):
            self._call("log", lambda: self._log_point(point))

    def _call(self, doing: str, call: Callable[[], None]) -> None:
        self._require(True, doing)
        self._worker.put(call)

    def _require(self, in_time: bool, doing: str) -> None:
        error = self._worker.error
        if in_time and error is None:
            return
        self._abandon()
        if isinstance(error, TimeoutError):
            why = f"{self._settings.finish_timeout_s:g} s were too short to send all that is left"
        else:
            why = "it hangs" if error is None else f"{type(error).__name__}: {first_line(error)}"
        raise RuntimeError(
            f"cannot {doing}, {why}; send it later: wandb sync {self._dir.path}/wandb/*run-*, or, if nothing was sent "
            f"yet, bdl track run={self._dir.path}"
        ) from error

    def _abandon(self) -> None:
        """End the runs and the service: left alone they would be waited for when this process ends."""
        self._worker.close()
        ender = Worker("wandb end")
        ender.put(self._end)
        if not ender.wait(SLACK_S) and self._process is not None:
            self._process.kill()
            ender.wait(SLACK_S)
        ender.close()

    def _end(self) -> None:
        for run in (*self._members.values(), self._run):
            with suppress(Exception):  # None, or as broken as the rest
                run.finish(exit_code=1)
        end_service()

    # --- what the thread does --------------------------------------------------------------------------------------

    def _open(self, config: Mapping[str, Any]) -> None:
        try:
            self._run = self._open_run(self._id, self._name(), "ensemble", dict(config))
        except Exception as error:
            if self._place == "offline":
                raise
            self._why, self._place = first_line(error), "offline"
            end_service()
            self._run = self._open_run(self._id, self._name(), "ensemble", dict(config))
        self._process = service_process()

    def _name(self) -> str:
        path = self._dir.path.resolve()
        return f"{path.parent.name}/{path.name}"

    def _open_run(self, id: str, name: str, job_type: str, config: Mapping[str, Any]) -> Any:
        return open_run(
            self._place,
            init_timeout_s=self._settings.init_timeout_s,
            finish_timeout_s=self._settings.finish_timeout_s / 2,  # the other half is for the tables
            project=self._settings.project,
            entity=self._settings.entity,
            id=id,
            name=name,
            group=self._id if self._settings.member_runs else None,
            job_type=job_type,
            config=config,
            # Absolute: the service of wandb keeps the working directory of the run that started it.
            dir=str(self._dir.path.resolve()),
        )

    @staticmethod
    def _folder(run: Any) -> str:
        return str(Path(run.dir).parent)

    def _log(self, stack: str, step: int, position: int, row: Mapping[str, Any]) -> None:
        self._run.log({**row, "step": step})
        if self._settings.member_runs:
            self._log_members(step, row)
        self._handed.handed_over(stack, position)

    def _log_point(self, point: Point) -> None:
        curve = f"ensemble/{point.key}"
        values = {"mean": point.mean, "std": point.std, "num_members": point.num_members}
        self._run.log({**{f"{curve}/{name}": value for name, value in values.items()}, "step": point.step})
        self._handed.point_handed_over(point.key, point.step)

    def _log_members(self, step: int, row: Mapping[str, Any]) -> None:
        rows: dict[int, dict[str, Any]] = {}
        for name, value in row.items():
            kind, number, key = name.split("/", 2)
            if kind == "member":
                rows.setdefault(int(number), {})[key] = value
        for member, own in rows.items():
            self._member_run(member).log({**own, "step": step})

    def _member_run(self, member: int) -> Any:
        if member not in self._members:
            id, name = f"{self._id}-m{member:02d}", f"member {member:02d}"
            self._members[member] = self._open_run(id, name, "member", {"member": member})
        return self._members[member]

    def _end_member(self, member: int, status: str) -> None:
        run = self._member_run(member)
        run.summary.update({"status": status})
        run.finish(exit_code=0 if status == "done" else 1)
        del self._members[member]

    def _close(self, status: str, metrics: Mapping[str, float | None]) -> None:
        for member in list(self._members):
            self._members.pop(member).finish(exit_code=1)
        self._run.summary.update({"status": status, **metrics})
        if status in ("complete", "partial"):
            self._log_outcome_in_time()
        self._run.finish(exit_code=1 if status == "failed" else 0)
        self._handed.save()

    def _log_outcome_in_time(self) -> None:
        # wandb stores a table as an artifact, and asks its server before it does: that may fail, or hang, by itself.
        worker, over, taken = Worker("wandb tables"), threading.Event(), []
        worker.put(lambda: self._log_outcome(over, taken))
        in_time = worker.wait(self._settings.finish_timeout_s / 2)
        over.set()
        worker.close()
        if not in_time or worker.error is not None:
            if worker.error is not None:
                why = first_line(worker.error)
            elif taken:
                why = f"{self._settings.finish_timeout_s / 2:g} s were too short, raise tracking.finish_timeout_s"
            else:
                why = "the server does not answer"
            what = f"only {len(taken)} of the tables and plots" if taken else "no tables or plots"
            log.warning("wandb took %s: %s", what, why)

    def _log_outcome(self, over: threading.Event, taken: list[str]) -> None:
        """Log row after row until all is over; `taken` gets the names of what is logged."""
        for row in outcome_rows(self._dir):
            if over.is_set():
                return
            self._run.log(row)
            taken += row

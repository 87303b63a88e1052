"""Everything the page of one run shows, brought up to date from its files at each call."""

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from bdl_train.runs import RunDir
from bdl_train.tracking.dashboard.curves import CURVES, Curve, curve_of_member, parse
from bdl_train.tracking.dashboard.evaluations import Evaluations, Kept
from bdl_train.tracking.dashboard.files import config_of, json_of, outcome_of, status_of

MOST_POINTS = 240
"""Of one curve that a browser is sent."""
MOST_MEMBERS = 2000
"""Whose last values are sent."""
WINDOW_S = 30.0
"""Over which the speed is measured."""


class RunView:
    """What is known of one run; sums and last values, never the events themselves.

    Args:
        run: Its directory.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._evaluations = Evaluations(run)
        self._outcome: Kept[dict[str, Any]] = Kept()
        self._offsets: dict[Path, int] = {}
        self._curves = {key: Curve() for key in CURVES}
        self._stacks: dict[str, dict[str, Any]] = {}
        self._members: dict[int, dict[str, Any]] = {}
        self._decisions: list[dict[str, Any]] = []
        self._speed: deque[tuple[float, str, float]] = deque()
        self._last: dict[tuple[str, str], dict[int, int]] = {}
        self._num_events = 0
        self._planned()

    def answer(self) -> dict[str, Any]:
        """The state now, as JSON can hold it."""
        with self._lock:
            self._read()
            status = status_of(self.run)
            manifest = json_of(self.run.manifest)
            for entry in manifest.get("members", []) if isinstance(manifest.get("members"), list) else []:
                if isinstance(entry, dict) and isinstance(entry.get("id"), int):
                    known = self._member(entry["id"])
                    known |= {"state": entry.get("status", known["state"]), "reason": entry.get("reason")}
                    known["stack"] = entry.get("stack", known["stack"])
            members = [self._shown(number, status) for number in sorted(self._members)[:MOST_MEMBERS]]
            plan = json_of(self.run.plan)
            return {
                "status": status,
                "num_members": len(self._members),
                "members": members,
                "stacks": [{"id": name, **self._public(one)} for name, one in sorted(self._stacks.items())],
                "curves": {key: curve.points(MOST_POINTS) for key, curve in self._curves.items()},
                "progress": self._progress(status),
                "plan": [str(one) for one in plan.get("reasons", [])]
                if isinstance(plan.get("reasons"), list)
                else [],
                "decisions": self._decisions[-200:],
                "events": self._num_events,
                "config": config_of(self.run),
                "outcome": self._outcome_now(),
                "evaluations": self._evaluations.answer(),
                "cost": {name: manifest.get(name) for name in ("wall_time_s", "device_time_s", "finished")},
            }

    def _outcome_now(self) -> dict[str, Any]:
        if not self.run.manifest.is_file():
            return {}
        folder = self.run.evaluation("test")
        files = [folder / name for name in ("metrics_detail.parquet", "predictions.parquet")]
        return self._outcome.get(files, lambda: outcome_of(self.run))

    def member(self, number: int) -> dict[str, Any]:
        """The own curves of one member."""
        with self._lock:
            stack = self._members.get(number, {}).get("stack")
        path = self.run.stack(str(stack)) / "events.jsonl"
        curves = curve_of_member(path, number, MOST_POINTS) if stack and path.is_file() else {}
        return {"member": number, "curves": curves}

    # --- reading --------------------------------------------------------------------------------------------------

    def _planned(self) -> None:
        stacks = json_of(self.run.plan).get("stacks")
        for one in stacks if isinstance(stacks, list) else []:
            if isinstance(one, dict) and isinstance(one.get("members"), list):
                self._stacks[str(one.get("id"))] = {"members": one["members"], "state": "queued"}
                for number in one["members"]:
                    if isinstance(number, int):
                        self._member(number)["stack"] = str(one.get("id"))

    def _member(self, number: int) -> dict[str, Any]:
        blank = {
            "state": "queued",
            "stack": None,
            "reason": None,
            "train/nll": None,
            "val/nll": None,
            "step": None,
        }
        return self._members.setdefault(number, blank)

    def _read(self) -> None:
        for path in sorted(self.run.path.glob("stacks/*/events.jsonl")):
            stack, block = path.parent.name, self._new(path)
            if not block:
                continue
            others: list[dict[str, Any]] = []
            for key, (members, steps, values) in parse(block, others.append).items():
                self._num_events += len(steps)
                new = self._new_steps(stack, key, members, steps)
                self._curves[key].add(steps[new], values[new])
                if key in ("train/nll", "val/nll"):
                    # The last number of each member.
                    unique, last = np.unique(members[::-1], return_index=True)
                    for number, at in zip(unique.tolist(), (len(members) - 1 - last).tolist(), strict=True):
                        if number >= 0:
                            known = self._member(number)
                            known[key], known["step"] = float(values[at]), int(steps[at])
            self._num_events += len(others)
            for event in sorted(
                others, key=lambda one: one["time"] if isinstance(one["time"], float) else 0.0
            ):
                self._take(stack, event)
        decisions: list[dict[str, Any]] = []
        if block := self._new(self.run.driver_events):
            parse(block, decisions.append)
        for event in decisions:
            if event["key"] != "launched" and isinstance(event["value"], dict):
                self._decisions.append({"time": event["time"], "key": event["key"], **event["value"]})

    def _new_steps(self, stack: str, key: str, members: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Places of numbers `[n]` that count: work repeated from a checkpoint gives the same numbers once more."""
        first = np.unique(np.stack([members, steps]), axis=1, return_index=True)[1]
        whose, at = np.unique(members[first], return_inverse=True)
        last = self._last.setdefault((stack, key), {})
        seen = np.array([last.get(number, -1) for number in whose.tolist()])
        new = np.sort(first[steps[first] > seen[at]])
        np.maximum.at(seen, at, steps[first])
        last.update(zip(whose.tolist(), seen.tolist(), strict=True))
        return new

    def _new(self, path: Path) -> bytes:
        """Whole lines that were written since the last call."""
        try:
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                block = file.read()
        except OSError:
            return b""
        end = block.rfind(b"\n") + 1
        self._offsets[path] = self._offsets.get(path, 0) + end
        return block[:end]

    def _take(self, stack: str, event: dict[str, Any]) -> None:
        one = self._stacks.setdefault(stack, {"members": [], "state": "queued"})
        key, value = event["key"], event["value"]
        if key == "started" and isinstance(value, dict):
            starts = one.get("starts", 0) + 1
            where = {name: value.get(name) for name in ("node", "host", "device", "pid", "ranks")}
            one |= {"members": value.get("members", []), "state": "running", "starts": starts, **where}
            one["from"] = event["step"]
            for number in one["members"]:
                if isinstance(number, int):
                    self._member(number).update(state="running", stack=stack)
        elif key == "progress" and isinstance(value, dict) and isinstance(event["time"], float):
            before = one.get("step", one.get("from", 0))
            step = value.get("step") or 0
            done = max(0, step - before) * len(one["members"])
            one |= {"step": step, "num_steps": value.get("num_steps"), "active": value.get("active")}
            self._speed.append((event["time"], stack, float(done)))
        elif key == "stopped":
            self._set(one, "stopped")
        elif key == "split":
            one |= {"state": "split", "into": value}
        elif key == "again":
            one["again"] = value
        elif key == "member" and isinstance(event["member"], int):
            self._member(event["member"]).update(state=str(value), stack=stack)
            states = {self._member(number)["state"] for number in one["members"] if isinstance(number, int)}
            if states <= {"done", "failed"}:
                one["state"] = "done"

    def _set(self, stack: dict[str, Any], state: str) -> None:
        stack["state"] = state
        for number in stack["members"]:
            if isinstance(number, int) and self._member(number)["state"] == "running":
                self._member(number)["state"] = state

    # --- showing --------------------------------------------------------------------------------------------------

    def _public(self, one: dict[str, Any]) -> dict[str, Any]:
        names = (
            "state",
            "node",
            "host",
            "device",
            "pid",
            "ranks",
            "starts",
            "step",
            "num_steps",
            "active",
            "into",
        )
        return {"size": len(one["members"]), **{name: one.get(name) for name in names}}

    def _shown(self, number: int, status: str) -> dict[str, Any]:
        known = self._members[number]
        stack = self._stacks.get(str(known["stack"]), {})
        state = known["state"]
        if state == "running" and status not in ("running",):
            state = "interrupted"
        retried = max(0, stack.get("starts", 0) - 1)
        where = stack.get("node") or stack.get("host")
        return {
            "id": number,
            **known,
            "state": state,
            "retries": retried,
            "where": where,
            "device": stack.get("device"),
        }

    def _progress(self, status: str) -> dict[str, Any]:
        """Member-steps done and to do, the speed of the last half minute, and what is left at that speed."""
        known = [one for one in self._stacks.values() if one.get("num_steps") and one["state"] != "split"]
        if not known:
            return {"share": 1.0 if status == "complete" else 0.0, "per_s": None, "left_s": None}
        longest = max(one["num_steps"] for one in known)
        total = done = 0.0
        for one in self._stacks.values():
            size = len(one["members"]) if one["state"] != "split" else 0
            total += size * longest
            finished = one["state"] == "done"
            done += size * (longest if finished else min(one.get("step", 0) or 0, longest))
        per_s, left = self._speed_now(status, time.time()), None
        if per_s and total > done:
            # The slowest stack may take longer than all the work at the speed of all.
            own = [
                (longest - (one.get("step") or 0)) * len(one["members"]) / speed
                for name, one in self._stacks.items()
                if (speed := per_s.get(name)) and one["state"] == "running"
            ]
            left = max([(total - done) / sum(per_s.values()), *own])
        all_of_them = sum(per_s.values()) if per_s else None
        return {"share": done / total if total else 0.0, "per_s": all_of_them, "left_s": left}

    def _speed_now(self, status: str, now: float) -> dict[str, float] | None:
        """Member-steps a second of each stack that runs and reported in the window; None if nothing is known."""
        self._speed = deque(one for one in self._speed if one[0] >= now - WINDOW_S)
        if status != "running":
            return None
        reports: dict[str, list[tuple[float, float]]] = {}
        for when, stack, steps in self._speed:
            if self._stacks[stack]["state"] == "running":
                reports.setdefault(stack, []).append((when, steps))
        # What the first report tells was done before the window.
        return {
            stack: sum(steps for _, steps in known[1:]) / max(now - known[0][0], 1.0)
            for stack, known in reports.items()
            if len(known) > 1
        } or None

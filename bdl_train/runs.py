"""The run directory: its layout, atomic writes, the lock with its heartbeat, and the event files.

Everything a verb knows about a run it reads here. Standard library only.
"""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from bdl_train.errors import UsageError

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
STALE_S = 30.0
"""A lock of another machine whose heartbeat is older than this belongs to a process that is gone."""

DEEPEST_CONFIG = 50
"""Levels of a config that a listing reads."""


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    path: Path

    @classmethod
    def create(cls, output_dir: str, experiment: str, name: str | None = None) -> "RunDir":
        """Make a new, empty run directory `<output_dir>/<experiment>/<name>`; None = a `new_name`."""
        path = Path(output_dir) / experiment / (name or cls.new_name())
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"The run directory {path} cannot be made ({error.strerror}): change output_dir."
            ) from error
        return cls(path)

    @staticmethod
    def new_name() -> str:
        """`<timestamp>-<6 hex>`."""
        return f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"

    @classmethod
    def open(cls, path: str | Path, *, key: str = "run") -> "RunDir":
        """An existing run directory.

        Raises:
            UsageError: it does not exist or holds no run.
        """
        if str(path) == "":
            raise UsageError(f"{key}= is empty: `bdl runs` lists the runs.")
        run = cls(Path(path))
        if not run.path.is_dir():
            raise UsageError(f"{key}={path} is not a directory. `bdl runs` lists the runs.")
        if not run.config.is_file():
            below = find_runs(run.path)
            if below:
                raise UsageError(
                    f"{key}={path} is a folder of runs: name one, the newest is {below[-1].path}."
                )
            raise UsageError(f"{key}={path} holds no run: {run.config.name} is missing.")
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def posterior(self) -> Path:
        return self.path / "posterior"

    @property
    def submission(self) -> Path:
        """What `bdl submit` queued."""
        return self.path / "submission.json"

    @property
    def driver_events(self) -> Path:
        """What the driver decided about stacks, in the format of their own events: `launched`, `retry`, `split` ..."""
        return self.path / "driver.jsonl"

    @property
    def tracking(self) -> Path:
        """What of the events which tracker has been handed."""
        return self.path / "tracking.json"

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    @property
    def pruned_file(self) -> Path:
        """Why a sweep ended this run early; gone when somebody goes on with it."""
        return self.path / "PRUNED"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    def stack(self, stack_id: str) -> Path:
        return self.path / "stacks" / stack_id

    def evaluation(self, name: str) -> Path:
        return self.path / "evaluation" / name

    def status(self) -> str:
        """`complete`, `partial` or `failed` from the manifest, else `running` from the lock; without a process that
        works on it a run that was submitted and never began is `queued`, one that a
        sweep ended early `pruned`, any other `interrupted`.
        """
        if self.manifest.is_file():
            manifest = read_json(self.manifest)
            if not isinstance(manifest, dict) or "status" not in manifest:
                raise UsageError(f"{self.manifest} has no status: the run directory is damaged.")
            return str(manifest["status"])
        if lock_is_held(self.lock):
            return "running"
        if self.pruned_file.is_file():
            return "pruned"
        began = any(self.path.glob("stacks/*/events.jsonl"))
        return "queued" if self.submission.is_file() and not began else "interrupted"


KEEP_STOP = "BDL_KEEP_STOP"
"""Environment variable, not empty: a stop file that is there when the driver starts is meant for it, and stands."""


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and ((path / "plan.json").is_file() or (path / "stacks").is_dir())


def find_runs(root: str | Path) -> list[RunDir]:
    """All run directories below `root`, oldest first."""
    found = {path.parent for path in Path(root).rglob("config.yaml") if is_run(path.parent)}
    return [RunDir(path) for path in sorted(found, key=_started)]


def _started(path: Path) -> tuple[str, int, str]:
    """The time stamp in the name, and within one second the time of the plan, which is written once."""
    plan = path / "plan.json"
    return path.name.rpartition("-")[0], plan.stat().st_mtime_ns if plan.is_file() else 0, str(path)


def to_json(value: Any) -> Any:
    """A value that strict JSON can hold: NaN and infinities become null, arrays lists, the rest its text."""
    if isinstance(value, Mapping):
        return {str(name): to_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # of numpy and torch, which this module does not import
        return to_json(value.tolist())
    return str(value)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: into a temporary neighbour, to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write strict, indented JSON atomically."""
    write_bytes(path, (json.dumps(to_json(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UsageError: missing or not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing: the run is unfinished or damaged.{_to_finish(path)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}. The run directory is damaged.") from error


def _to_finish(path: Path) -> str:
    """How to finish the run that the file would belong to, if it is one that was begun and not finished."""
    runs = [RunDir(folder) for folder in path.parents]
    begun = [run for run in runs if run.plan.is_file() and not run.manifest.is_file()]
    return f" Finish it with: bdl train resume={begun[0].path}" if begun else ""


def glance_at_config(run: RunDir) -> dict[str, Any]:
    """The stored config for a listing, which shows what it can: {} where it cannot be read.

    libyaml builds nested nodes by recursion in C and would overflow the stack on a hostile file: the depth is counted
    on its events first, which do not nest.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text, depth = run.config.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_CONFIG:
                return {}
        found = yaml.load(text, loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- lock -----------------------------------------------------------------------------------------------------


def lock_is_held(path: Path) -> bool:
    """Whether the lock's process still owns it.

    On this machine it does as long as it lives, however old its heartbeat is: a suspended process goes on later. On
    another machine the heartbeat decides, which assumes that the two clocks differ by less than `STALE_S`.
    """
    try:
        stored = json.loads(path.read_bytes())
        host, pid, heartbeat = stored["host"], int(stored["pid"]), float(stored["heartbeat"])
        started = stored.get("started")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return False
    if host == socket.gethostname():
        if not _is_alive(pid):
            return False
        now = _started_at(pid)
        if started is not None and now is not None:
            return started == now  # another start time: the number was given to a new process
    return time.time() - heartbeat < STALE_S


def _is_alive(pid: int) -> bool:
    if pid < 1:  # to `kill`, a group of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] not in (["Z"], ["X"])  # ended, and its parent has not asked yet


def _started_at(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where the system has no /proc."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third, the state, on; field 22 is the start time (`man 5 proc`)."""
    try:
        # The second field is the program's name, which may hold spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


@contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """Hold the run's lock, with a heartbeat from a thread.

    Raises:
        UsageError: another living process holds it.
    """
    token = secrets.token_hex(16)
    _acquire(run.lock, token)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            try:
                with _alone_in(run.path):
                    if not _is_ours(run.lock, token):
                        log.error("%s was taken over: another process may work in %s", run.lock, run.path)
                        return
                    write_bytes(run.lock, _lock_content(token))
            except OSError:  # a full disk now may have room at the next beat
                continue

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(FileNotFoundError), _alone_in(run.path):
            if _is_ours(run.lock, token):
                run.lock.unlink()


def _lock_content(token: str) -> bytes:
    pid = os.getpid()
    lock = {
        "pid": pid,
        "started": _started_at(pid),
        "host": socket.gethostname(),
        "heartbeat": time.time(),
        "token": token,
    }
    return json.dumps(lock).encode()


def _is_ours(lock: Path, token: str) -> bool:
    """Whether the lock is the one that was written with this token; OSError if that cannot be told."""
    try:
        stored = json.loads(lock.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(stored, dict) and stored.get("token") == token


def _acquire(lock: Path, token: str) -> None:
    with _alone_in(lock.parent):
        if lock_is_held(lock):
            holder = read_json(lock)
            age = max(0.0, time.time() - float(holder["heartbeat"]))
            raise UsageError(
                f"{lock.parent} is in use by process {holder['pid']} on {holder['host']}, which was heard "
                f"{age:.0f} s ago: wait for it, or stop it first."
            )
        write_bytes(lock, _lock_content(token))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Of the processes of one machine that look at a lock and then take it, one at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# --- events ---------------------------------------------------------------------------------------------------


class EventWriter:
    """The append-only event file of one stack; one writer. A line: {time, member, step, key, value}.

    Lines wait in memory until `flush`, which appends them in one call.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed writer may leave half a line; what follows must not be glued to it.
        self._torn = path.is_file() and path.stat().st_size > 0 and not _ends_with_newline(path)
        self._file = path.open("ab", buffering=0)
        self.lines: list[str] = []

    def write(self, key: str, values: Iterable[tuple[int | None, Any]], *, step: int) -> None:
        """Add one event per (member, value); member None speaks of the whole stack."""
        now = round(time.time(), 3)
        for member, value in values:
            event = {"time": now, "member": member, "step": step, "key": key, "value": to_json(value)}
            self.lines.append(json.dumps(event, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Append what waits.

        Raises:
            OSError: the disk takes no more; the lines are lost.
        """
        if not self.lines:
            return
        block = ("\n" * self._torn + "".join(self.lines)).encode()
        self.lines = []
        self._torn = True  # until all of it is there
        written = self._file.write(block)
        if written != len(block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._torn = False

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class EventReader:
    """Follows the event files of a run; each call gives what is new, whole lines only, damaged ones left out."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._offsets: dict[Path, int] = {}

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (stack id, event) for every line that a stack wrote since the last call."""
        for path in sorted(self._run.path.glob("stacks/*/events.jsonl")):
            for event in self._new(path):
                yield path.parent.name, event

    def read_decisions(self) -> Iterator[dict[str, Any]]:
        """Yield the events that the driver wrote since the last call."""
        with suppress(FileNotFoundError):
            yield from self._new(self._run.driver_events)

    def _new(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            block = file.read()
        end = block.rfind(b"\n") + 1
        self._offsets[path] = self._offsets.get(path, 0) + end
        for line in block[:end].splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event

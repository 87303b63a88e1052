"""One process at a time works in a folder: a lock file with a heartbeat."""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bdl_train.errors import UsageError
from bdl_train.files import write_bytes

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
STALE_S = 30.0
"""A lock of another machine whose heartbeat is older than this belongs to a process that is gone."""


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
def locked(lock: Path) -> Iterator[None]:
    """Hold a lock, with a heartbeat from a thread.

    Raises:
        UsageError: another living process holds it.
    """
    token = secrets.token_hex(16)
    _acquire(lock, token)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            try:
                with _alone_in(lock.parent):
                    if not _is_ours(lock, token):
                        log.error("%s was taken over: another process may work in %s", lock, lock.parent)
                        return
                    write_bytes(lock, _lock_content(token))
            except OSError:  # a full disk now may have room at the next beat
                continue

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(FileNotFoundError), _alone_in(lock.parent):
            if _is_ours(lock, token):
                lock.unlink()


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
            holder = json.loads(lock.read_bytes())
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

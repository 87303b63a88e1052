"""Where a Ray that others started is: `auto` settled to one address, and whether a Ray answers there.

Ray's own client joins any Ray of the machine for `auto`, somebody else's too, and waits for minutes where none answers.
"""

import os
import socket

from bdl_train.errors import UsageError

# The server speaks gRPC, which is HTTP/2: both sides open with a frame of settings (RFC 9113, section 3.4), whatever
# the token.
_SETTINGS = b"\x04"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5


def settled(address: str) -> str:
    """`IP:PORT` of the head (GCS).

    Args:
        address: `IP:PORT`, or `auto`: RAY_ADDRESS, then what `ray start` noted on this machine, then the only Ray that
            runs here.

    Raises:
        UsageError: `auto` finds none, or several and no way to tell which is meant.
    """
    if address != "auto":
        return address
    if given := os.environ.get("RAY_ADDRESS"):
        return given
    running, noted = _running(), _noted()
    if noted is not None and (noted in running or not running):
        return noted
    if len(running) == 1:
        return running.pop()
    if running:
        raise UsageError(
            f"cluster.address=auto: {len(running)} Rays run on this machine, {', '.join(sorted(running))}: name one."
        )
    raise UsageError(
        "cluster.address=auto: no Ray runs on this machine. Set cluster.address to IP:PORT of the cluster's head, "
        "start one with `ray start`, or train with cluster=ray_local."
    )


def _running() -> set[str]:
    """Addresses that the Ray daemons of this machine have on their command lines."""
    from ray._private.services import find_gcs_addresses

    return set(find_gcs_addresses())


def _noted() -> str | None:
    """What the last `ray start` of this machine left."""
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None)


def require_answer(address: str, key: str, timeout_s: float) -> None:
    """Knock at the head's port.

    Args:
        address: `IP:PORT`.
        key: Where the address comes from, for messages.
        timeout_s: Most seconds to wait, each for the connection and the answer.

    Raises:
        UsageError: it is no address, nobody answers, or what answers is no Ray.
    """
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdigit():
        raise UsageError(f"{key} must be IP:PORT or auto, got {address!r}.")
    try:
        with socket.create_connection((host, int(port)), timeout_s) as connection:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
        if answer[3:4] != _SETTINGS:
            raise OSError("what answers there is no Ray")
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"Nobody answers at {key}={address} within {timeout_s:g} s ({error}): is the cluster up, and is this the "
            "port of its head (GCS)?"
        ) from error

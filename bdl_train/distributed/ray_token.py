"""The token of a Ray cluster that others started: from the environment, or from a file that only its owner reads."""

import os
import stat
from pathlib import Path

from bdl_train.errors import UsageError


def token_of(token_file: str | None) -> str | None:
    """The token, or None where nobody gave one.

    Args:
        token_file: `cluster.token_file`; None = RAY_AUTH_TOKEN, then the files in which Ray itself looks.

    Raises:
        UsageError: the file is missing, or open to others.
    """
    if token_file is not None:
        path = Path(token_file).expanduser()
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise UsageError(
                    f"cluster.token_file={path} can be read by others: chmod 600 it, and give the cluster another "
                    "token."
                )
            return path.read_text().strip()
        except OSError as error:
            raise UsageError(f"cluster.token_file={path} cannot be read: {error.strerror}.") from error
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.read_text().strip() if path.is_file() else None

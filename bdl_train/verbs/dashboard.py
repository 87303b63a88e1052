"""Watch runs in a browser: members as one ensemble, live, with their metrics and calibration.

It reads run directories and writes nothing. On another address than this machine's own it asks for a token, which
stands in the printed address.

Examples:
    bdl dashboard
    bdl dashboard root=runs/energy port=8080
    ssh -L 8080:127.0.0.1:8080 login-node bdl dashboard port=8080
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bdl_train.build import settings_of
from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/dashboard.yaml`."""

    root: str
    host: str
    port: Annotated[int, Field(ge=0, le=65535)]


def run(config: dict[str, Any], options: Options) -> Exit:
    """Serve until Ctrl-C."""
    from bdl_train.tracking.dashboard.server import LOOPBACK, Dashboard

    settings = settings_of(Settings, config, key="")
    root = Path(settings.root)
    if not root.is_dir():
        raise UsageError(f"root={settings.root} is no folder: name the one that holds runs.")
    token = None if settings.host in LOOPBACK else secrets.token_urlsafe(24)
    try:
        server = Dashboard(root, settings.host, settings.port, token)
    except OSError as error:
        raise UsageError(
            f"host={settings.host} port={settings.port} cannot be listened on ({error.strerror}): choose another port, "
            "0 = any free one."
        ) from error
    print(f"dashboard of {root}: {server.url}  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return Exit.DONE

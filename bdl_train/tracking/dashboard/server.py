"""The web server of the dashboard: files of this package and JSON about runs, for reading only."""

import contextlib
import hmac
import http.cookies
import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from bdl_train.runs import RunDir, find_runs, is_run
from bdl_train.tracking.dashboard.evaluations import report_of
from bdl_train.tracking.dashboard.files import row_of
from bdl_train.tracking.dashboard.run_view import RunView

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# A report has its styles and pictures inside, and neither scripts nor anything to ask for. In a sandbox it is of no
# origin, so that whatever somebody wrote into that file, it cannot ask this server for more.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox allow-popups"
)
COOKIE = "bdl_token"
LIST_AGE_S = 2.0
MOST_VIEWS = 16
"""Runs whose sums are kept in memory."""


class Dashboard(ThreadingHTTPServer):
    """Serves the runs below a folder.

    Args:
        root: The folder.
        host: To listen on.
        port: 0 = a free one.
        token: Asked for unless None.
    """

    daemon_threads = True

    def __init__(self, root: Path, host: str, port: int, token: str | None) -> None:
        self.root, self.token = root.resolve(), token
        self._views: dict[Path, RunView] = {}
        self._rows: dict[Path, tuple[float, dict[str, Any]]] = {}
        self._listed: tuple[float, list[dict[str, Any]]] = (-math.inf, [])
        self._lock = threading.Lock()
        super().__init__((host, port), Handler)
        self.names = {f"{name}:{self.server_port}" for name in (*LOOPBACK[:2], "[::1]", host)}

    @property
    def url(self) -> str:
        host = self.server_address[0]
        query = "" if self.token is None else f"?token={self.token}"
        return f"http://{host}:{self.server_port}/{query}"

    def runs(self) -> list[dict[str, Any]]:
        """All runs, newest first; what has finished is read once."""
        with self._lock:
            when, rows = self._listed
            if time.monotonic() - when > LIST_AGE_S:
                rows = [self._row(run) for run in reversed(find_runs(self.root)) if self._inside(run.path)]
                self._listed = (time.monotonic(), rows)
            return rows

    def _row(self, run: RunDir) -> dict[str, Any]:
        try:
            changed = run.manifest.stat().st_mtime
        except OSError:
            return row_of(run, self.root)
        known = self._rows.get(run.path)
        if known is None or known[0] != changed:
            known = self._rows[run.path] = (changed, row_of(run, self.root))
        return known[1]

    def view(self, name: str) -> RunView | None:
        """The view of a run below the root, or None if there is no such run."""
        path = (self.root / name).resolve()
        if not self._inside(path) or not is_run(path):
            return None
        with self._lock:
            view = self._views.pop(path, None) or RunView(RunDir(path))
            self._views[path] = view  # the newest stands last
            while len(self._views) > MOST_VIEWS:
                self._views.pop(next(iter(self._views)))
            return view

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.root)


class Handler(BaseHTTPRequestHandler):
    """GET only; everything else is 501 by the base class."""

    server: Dashboard  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "bdl", ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            self._get()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the browser went away
        except Exception:
            log.exception("The dashboard failed to answer %s", urlsplit(self.path).path)
            self._send(500, "application/json", b'{"error": "the dashboard failed, see its log"}')

    def _get(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if self.headers.get("Host", "") not in self.server.names:
            # A name that a foreign page made to point here (DNS rebinding).
            return self._send(403, "text/plain", b"unknown host name")
        if self.server.token is not None and not self._knows_token(query):
            return self._send(
                401, "text/plain", b"open the address with the token that bdl dashboard printed"
            )
        if address.path in FILES:
            name, kind = FILES[address.path]
            content = (resources.files("bdl_train.tracking.dashboard") / "static" / name).read_bytes()
            return self._send(200, f"{kind}; charset=utf-8", content)
        if address.path == "/api/runs":
            return self._json({"root": self.server.root.name, "runs": self.server.runs()})
        if address.path in ("/api/run", "/api/member"):
            view = self.server.view(unquote(query.get("id", [""])[0]))
            if view is None:
                return self._json({"error": "there is no such run"}, 404)
            if address.path == "/api/run":
                return self._json(view.answer())
            number = query.get("member", [""])[0]
            if not number.isdecimal():
                return self._json({"error": "member must be a number"}, 400)
            return self._json(view.member(int(number)))
        if address.path == "/report":
            return self._report(query)
        return self._send(404, "text/plain", b"there is nothing here")

    def _report(self, query: dict[str, list[str]]) -> None:
        view = self.server.view(unquote(query.get("id", [""])[0]))
        path = None if view is None else report_of(view.run, query.get("name", [""])[0])
        try:
            content = None if path is None else path.read_bytes()
        except OSError:
            content = None
        if content is None:
            return self._send(404, "text/plain", b"there is no such report: bdl report run=... writes it")
        policy = {"Content-Security-Policy": REPORT_POLICY}
        return self._send(200, "text/html; charset=utf-8", content, policy)

    def _knows_token(self, query: dict[str, list[str]]) -> bool:
        token = self.server.token or ""
        given = [*query.get("token", []), self.headers.get("Authorization", "").removeprefix("Bearer ")]
        jar = http.cookies.SimpleCookie()
        with contextlib.suppress(http.cookies.CookieError):
            jar.load(self.headers.get("Cookie", ""))
        if COOKIE in jar:
            given.append(jar[COOKIE].value)
        return any(hmac.compare_digest(one.encode(), token.encode()) for one in given)

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        self._send(status, "application/json", json.dumps(_finite(value), allow_nan=False).encode())

    def _send(self, status: int, kind: str, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in {**HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        query = parse_qs(urlsplit(self.path).query)
        if status == 200 and self.server.token is not None and "token" in query:
            self.send_header("Set-Cookie", f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses may hold the token."""


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

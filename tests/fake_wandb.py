"""A small wandb server on this machine: it takes runs as far as the tests look at them, or behaves badly."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "RW50", "name": "me"}


class Server(ThreadingHTTPServer):
    """What it was sent, by run id.

    Attributes:
        behaviour: `works`, `fails` (status 500) or `hangs` (answers when the test is over).
        rows: Rows of history; the position of a row is the one that the client gave.
        summaries: The last summary.
        groups: What each run was created with.
        asked: Names of the queries.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = "works"
        self.over = threading.Event()
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def curve(self, run: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has this key, in the order of the history."""
        return [(row["step"], row[key]) for row in self.rows[run] if key in row]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not our concern."""

    # --- what it answers ---------------------------------------------------------------------------------------

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/graphql":
            asked = json.loads(body)
            name = asked["query"].split("(")[0].split("{")[0].split()[-1]
            self.asked.append(name)
            return {"data": getattr(self, f"_{name}", dict)(**_given(name, asked.get("variables") or {}))}
        if path.endswith("/file_stream"):
            self._take(path.split("/")[-2], json.loads(body))
        return {}

    def _take(self, run: str, sent: dict[str, Any]) -> None:
        for name, chunk in sent.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                self.rows[run][chunk["offset"] :] = lines
            elif name == "wandb-summary.json":
                self.summaries[run] = lines[-1]

    def _RunResumeStatus(self, name: str) -> dict[str, Any]:  # noqa: N802
        return {"model": {"id": "UHJv", "name": "tests", "entity": ENTITY, "bucket": self._bucket(name)}}

    def _UpsertBucket(self, name: str, **given: Any) -> dict[str, Any]:  # noqa: N802
        inserted = name not in self.rows
        self.rows.setdefault(name, [])
        self.groups.setdefault(name, {}).update(
            {key: value for key, value in given.items() if value is not None}
        )
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": inserted}}

    def _Viewer(self) -> dict[str, Any]:  # noqa: N802
        account = {"id": "VXNlcg", "entity": ENTITY["name"], "username": "me", "email": "", "flags": "{}"}
        return {"viewer": {**account, "teams": {"edges": []}}}

    def _ArtifactType(self) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}

    def _CreateArtifact(self) -> dict[str, Any]:  # noqa: N802
        # One that is there already: nothing has to be uploaded.
        artifact = {
            "id": "QXJ0",
            "state": "COMMITTED",
            "artifactSequence": {"id": "U2Vx", "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _CreateRunFiles(self, files: list[str]) -> dict[str, Any]:  # noqa: N802
        urls = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in files]
        return {"createRunFiles": {"runID": "QnVj", "uploadHeaders": [], "files": urls}}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        rows = self.rows.get(name)
        if rows is None:
            return None
        return {
            "id": "QnVj",
            "name": name,
            "displayName": name,
            "description": "",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "sweepName": None,
            "tags": [],
            "project": {"id": "UHJv", "name": "tests", "entity": ENTITY},
            "historyLineCount": len(rows),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(self.summaries.get(name, {})),
        }


def _given(query: str, variables: dict[str, Any]) -> dict[str, Any]:
    wanted = {
        "RunResumeStatus": ("name",),
        "UpsertBucket": ("name", "groupName", "jobType"),
        "CreateRunFiles": ("files",),
    }
    return {name: variables.get(name) for name in wanted.get(query, ())}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.behaviour == "hangs":
            self.server.over.wait()
        works = self.server.behaviour == "works"
        reply = json.dumps(self.server.answer(self.path, body)).encode() if works else b""
        self.send_response(200 if works else 500)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def wandb_server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()

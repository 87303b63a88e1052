"""The web server: what it tells, and what it tells nobody."""

import http.client
import json
from urllib.parse import quote

import pytest

from bdl_train.tracking.dashboard.server import Dashboard


def ask(server: Dashboard, path: str, method: str = "GET", **headers: str) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(
        method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), content


def test_pages_and_runs(serve, runs_root, class_run, number_run):
    with serve(runs_root) as server:
        for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")):
            status, headers, content = ask(server, path)
            assert status == 200
            assert headers["Content-Type"].startswith(kind)
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert b"http://" not in content.replace(b"http://www.w3.org/2000/svg", b"")
            assert b"https://" not in content
        listed = json.loads(ask(server, "/api/runs")[2])["runs"]
        assert {one["experiment"] for one in listed} == {"breast_cancer", "diabetes"}
        name = quote(f"breast_cancer/{class_run.path.name}", safe="")
        answer = json.loads(ask(server, f"/api/run?id={name}")[2])
        assert answer["status"] == "complete"
        assert len(answer["members"]) == 2
        assert answer["outcome"]["reliability"]
        curves = json.loads(ask(server, f"/api/member?id={name}&member=1")[2])["curves"]
        assert len(curves["train/nll"]) == 4
        assert ask(server, f"/api/member?id={name}&member=x")[0] == 400


OUTSIDE = [
    "/api/run?id=..%2F..", "/api/run?id=%2Fetc", "/api/run", "/api/run?id=link", "/../server.py", "/static/app.js",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_the_root_is_told(path, serve, class_run, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(class_run.path)
    with serve(tmp_path / "root") as server:
        assert ask(server, path)[0] == 404
        assert json.loads(ask(server, "/api/runs")[2])["runs"] == []


def test_only_reading_and_only_by_its_own_name(serve, tmp_path):
    with serve(tmp_path) as server:
        for method in ("POST", "PUT", "DELETE"):
            assert ask(server, "/api/runs", method)[0] == 501
        assert ask(server, "/api/runs", Host=f"evil.example:{server.server_port}")[0] == 403
        assert ask(server, "/api/runs", Host=f"localhost:{server.server_port}")[0] == 200


def test_with_a_token_nothing_is_told_without_it(serve, tmp_path, capfd):
    with serve(tmp_path, token="s3cret-token") as server:
        for path in ("/", "/app.js", "/api/runs", "/?token=wrong"):
            assert ask(server, path)[0] == 401
        status, headers, _ = ask(server, "/?token=s3cret-token")
        assert status == 200
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert ask(server, "/api/runs", Cookie=cookie.split(";")[0])[0] == 200
        assert ask(server, "/api/runs", Cookie="bdl_token=wrong")[0] == 401
        assert ask(server, "/api/runs", Authorization="Bearer s3cret-token")[0] == 200
        assert server.url.endswith("/?token=s3cret-token")
    assert "s3cret-token" not in capfd.readouterr().err

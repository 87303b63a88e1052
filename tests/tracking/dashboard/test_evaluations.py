"""Chapters on the page of a run, and its report: that file and no other."""

import json
import os
from urllib.parse import quote

import pandas as pd
import pytest

from bdl_train.evaluation.section import Section, write_section
from bdl_train.runs import RunDir
from bdl_train.tracking.chapters import SECTIONS
from bdl_train.tracking.dashboard.evaluations import Evaluations, Kept, report_of
from bdl_train.tracking.dashboard.run_view import RunView

from .test_server import ask

TABLE = pd.DataFrame({"x": [1.0]})
REPORT = "<!doctype html><title>report</title><p>text</p>"


def evaluated(run: RunDir, name: str = "test") -> None:
    folder = run.evaluation(name) / SECTIONS
    write_section(folder, Section("members", "Members", "They differ.", "warn", {"m": TABLE}, ("few",)))
    write_section(folder, Section("slices", "Slices", "All alike.", "good"))


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir((tmp_path / "energy" / "20260101-000000-abcdef").resolve())
    made.path.mkdir(parents=True)
    made.config.write_text("seed: 3\n")
    made.plan.write_text('{"stacks": []}')
    evaluated(made)
    return made


def test_the_page_is_told_words_and_whether_there_is_a_report(run):
    assert RunView(run).answer()["evaluations"] == [
        {
            "name": "test",
            "report": False,
            "chapters": [
                {
                    "key": "members",
                    "title": "Members",
                    "verdict": "They differ.",
                    "level": "warn",
                    "warnings": ("few",),
                    "tables": ("m",),
                },
                {
                    "key": "slices",
                    "title": "Slices",
                    "verdict": "All alike.",
                    "level": "good",
                    "warnings": (),
                    "tables": (),
                },
            ],
        }
    ]
    (run.evaluation("new")).mkdir()
    assert [one["name"] for one in Evaluations(run).answer()] == ["test"]  # it has nothing to show
    (run.evaluation("new") / "report.html").write_text(REPORT)
    assert [(one["name"], one["report"]) for one in Evaluations(run).answer()] == [
        ("test", False),
        ("new", True),
    ]


def test_a_damaged_chapter_does_not_break_the_page(run):
    (run.evaluation("test") / SECTIONS / "members.json").write_bytes(b"\xff")
    answer = RunView(run).answer()
    json.dumps(answer)
    levels = [one["level"] for one in answer["evaluations"][0]["chapters"]]
    assert levels == ["damaged", "good"]


def test_what_has_not_changed_is_not_read_again(run, monkeypatch):
    calls = []
    one = Evaluations(run)
    read = one._chapters
    monkeypatch.setattr(one, "_chapters", lambda name: calls.append(name) or read(name))
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", None)  # never for the page
    assert one.answer() == one.answer()
    assert calls == ["test"]
    write_section(run.evaluation("test") / SECTIONS, Section("slices", "Slices", "One is worse.", "warn"))
    assert one.answer()[0]["chapters"][1]["verdict"] == "One is worse."
    assert calls == ["test", "test"]


def test_kept_follows_files_that_come_change_and_go(tmp_path):
    path, kept, count = tmp_path / "a", Kept(), iter(range(9))
    assert [kept.get([path], lambda: next(count)) for _ in range(2)] == [0, 0]
    path.write_text("x")
    assert [kept.get([path], lambda: next(count)) for _ in range(2)] == [1, 1]
    os.utime(path, ns=(1, 1))
    assert kept.get([path], lambda: next(count)) == 2
    path.unlink()
    assert kept.get([path], lambda: next(count)) == 3


def address(run: RunDir, name: str = "test") -> str:
    return (
        f"/report?id={quote(f'{run.path.parent.name}/{run.path.name}', safe='')}&name={quote(name, safe='')}"
    )


def test_a_report_is_served_as_a_page_without_scripts(run, serve):
    (run.evaluation("test") / "report.html").write_text(REPORT)
    with serve(run.path.parents[1]) as server:
        status, headers, content = ask(server, address(run))
        assert (status, content.decode()) == (200, REPORT)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        policy = {one.split()[0]: one.split()[1:] for one in headers["Content-Security-Policy"].split(";")}
        assert policy["default-src"] == ["'none'"]
        assert policy["style-src"] == ["'unsafe-inline'"]
        assert policy["img-src"] == ["data:"]
        assert "script-src" not in policy
        assert "allow-scripts" not in policy["sandbox"]
        assert "allow-same-origin" not in policy["sandbox"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert ask(server, "/")[1]["Content-Security-Policy"] != headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "name",
    [
        "..", ".", "", "test/..", "../evaluation/test", "../../../other", "..%2ftest", "/etc", "test\0", "test/",
        "new", "linked", "link_of_file", "folder", ".hidden",
    ],
)  # fmt: skip
def test_no_other_file_is_served(name, run, serve, tmp_path):
    """Every one of these places has a file of that name, or leads to one."""
    root = run.path.parents[1]
    secret = tmp_path.parent / f"{tmp_path.name}-secret"
    for folder in (secret, run.path, run.path / "evaluation", root, run.evaluation(".hidden")):
        folder.mkdir(exist_ok=True)
        (folder / "report.html").write_text("secret")
    run.evaluation("linked").symlink_to(secret)
    run.evaluation("link_of_file").mkdir()
    (run.evaluation("link_of_file") / "report.html").symlink_to(run.config)
    (run.evaluation("folder") / "report.html").mkdir(parents=True)
    with serve(root) as server:
        status, _, content = ask(server, address(run, name))
    assert (status, content) == (404, b"there is no such report: bdl report run=... writes it")
    assert report_of(run, name) is None


def test_runs_outside_the_root_have_no_report_here(run, serve, tmp_path_factory):
    (run.evaluation("test") / "report.html").write_text(REPORT)
    root = tmp_path_factory.mktemp("root")
    (root / "link").symlink_to(run.path)
    with serve(root) as server:
        for id in ("link", f"../{run.path.parent.parent.name}/energy/{run.path.name}", str(run.path), ""):
            assert ask(server, f"/report?id={quote(id, safe='')}&name=test")[0] == 404
        assert ask(server, "/report")[0] == 404


def test_a_report_asks_for_the_token_too(run, serve):
    (run.evaluation("test") / "report.html").write_text(REPORT)
    with serve(run.path.parents[1], token="s3cret") as server:
        assert ask(server, address(run))[0] == 401
        assert ask(server, address(run), Cookie="bdl_token=s3cret")[0] == 200
        assert ask(server, address(run), Host=f"evil.example:{server.server_port}")[0] == 403

"""The CI's verdict over several pytest runs: nothing failed, nothing was left out."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "ci_total.py"
SOURCE = """
import os, pytest
@pytest.fixture
def broken(): assert 0
def test_passes(): pass
def test_fails(): assert 0
def test_breaks(broken): pass
def test_waits():
    if "DATA" not in os.environ: pytest.skip("DATA is not set")
def test_gpu(): pytest.skip("no CUDA device")
@pytest.mark.xfail
def test_known(): assert 0
"""


@pytest.fixture(scope="module")
def ci_total() -> Any:
    spec = importlib.util.spec_from_file_location("ci_total", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElementTree.Element]:
    """What pytest reports of each test above; `+waits` is `waits` where the data are there."""
    folder = tmp_path_factory.mktemp("inner")
    (folder / "test_inner.py").write_text(SOURCE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "test_inner.py",
    ]
    found = {}
    for prefix, env in (("", {}), ("+", {"DATA": "here"})):
        env |= {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(
            [*command, "--junitxml=all.xml"], cwd=folder, env=env, capture_output=True, check=False
        )
        assert done.returncode == 1
        for case in ElementTree.parse(folder / "all.xml").getroot().iter("testcase"):
            found[prefix + str(case.get("name")).removeprefix("test_")] = case
    return found


@pytest.mark.parametrize(
    ("first", "second", "status", "total"),
    [
        ("passes waits gpu known", "waits", 1, "total: 2 passed, 0 failed, 2 skipped"),
        ("passes waits gpu known", "+waits", 0, "total: 3 passed, 0 failed, 1 skipped"),
        ("passes fails", "passes", 1, "total: 1 passed, 1 failed, 0 skipped"),
        ("passes breaks", "passes", 1, "total: 1 passed, 1 failed, 0 skipped"),
        ("passes", "fails", 1, "total: 1 passed, 1 failed, 0 skipped"),
        ("gpu", "gpu", 1, "total: 0 passed, 0 failed, 1 skipped"),
    ],
)
def test_verdict(first, second, status, total, ci_total, cases, tmp_path, capsys):
    files = []
    for names in (first, second):
        suite = ElementTree.Element("testsuite")
        suite.extend(cases[name] for name in names.split())
        files.append(tmp_path / f"{len(files)}.xml")
        ElementTree.ElementTree(suite).write(files[-1])
    assert ci_total.main(files) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == total
    assert any("test_waits (DATA is not set)" in line for line in lines) == (second == "waits")

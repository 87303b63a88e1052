"""Atomic writes and strict JSON."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdl_train import files
from bdl_train.files import sha256, to_json, write_bytes, write_json
from bdl_train.runs import read_json
from bdl_train.specs import TargetKind


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_crash_in_the_middle_leaves_the_old_file_and_no_litter(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "manifest.json"
    write_bytes(path, b"old")

    def crash(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    if step == "write":
        monkeypatch.setattr(files.os, "fsync", lambda fd: os.write(fd, b"half") and crash())
    elif step == "fsync":
        monkeypatch.setattr(files.os, "fsync", crash)
    else:
        monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_killed_writer_never_leaves_half_a_file(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from bdl_train.files import write_bytes\n"
        "for i in range(10**9):\n"
        "    write_bytes(Path(sys.argv[1]), bytes([65 + i % 26]) * 100_000)\n"
        "    i or print('started', flush=True)"
    )
    path = tmp_path / "checkpoint"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "started\n"
    for _ in range(200):
        content = path.read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert len(set(path.read_bytes())) == 1


def test_folders_are_made_and_files_replaced(tmp_path: Path):
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert read_json(path) == {"x": 2}
    assert os.listdir(path.parent) == ["c.json"]
    assert sha256(path) == sha256(path)
    assert len(sha256(path)) == 64


def test_json_is_strict():
    value = {
        "nan": math.nan,
        "inf": [-math.inf, (math.inf, 1.5)],
        "numpy": np.float32(0.5),
        "nan of numpy": np.float64("nan"),
        "count": np.int64(3),
        "yes": np.bool_(True),
        "array": np.array([[1.0, np.nan]]),
        "tensor": torch.tensor(2.5),
        "tensors": torch.tensor([1, 2]),
        "path": Path("a/b"),
        "kind": TargetKind.CLASS,
        7: None,
    }
    text = json.dumps(to_json(value), allow_nan=False)
    assert json.loads(text) == {
        "nan": None,
        "inf": [None, [None, 1.5]],
        "numpy": 0.5,
        "nan of numpy": None,
        "count": 3,
        "yes": True,
        "array": [[1.0, None]],
        "tensor": 2.5,
        "tensors": [1, 2],
        "path": "a/b",
        "kind": "class",
        "7": None,
    }


def test_written_json_holds_null_for_nan(tmp_path: Path):
    write_json(tmp_path / "metrics.json", {"test/nll": math.nan, "test/ece": 0.25})
    assert (tmp_path / "metrics.json").read_text() == '{\n  "test/nll": null,\n  "test/ece": 0.25\n}\n'

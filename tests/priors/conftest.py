import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from bdl_train.stack import Layout


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def layout() -> Layout:
    """A dense layer of 4 inputs, a convolution of 3 channels and a 2 × 2 kernel, and biases: P = 42."""
    names = ("dense.weight", "dense.bias", "conv.weight", "conv.bias")
    return Layout(names, ((3, 4), (3,), (2, 3, 2, 2), (3,)))


WriteRun = Callable[[Layout, Tensor, Tensor], Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes what an earlier run leaves of its posterior: a layout, and moments `[M, P]`."""

    def write(layout: Layout, mean: Tensor, var: Tensor) -> Path:
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder = run / "posterior"
        folder.mkdir(parents=True)
        content = save({"mean": mean, "var": var})
        (folder / "moments.safetensors").write_bytes(content)
        header = {
            "layout": {"names": list(layout.names), "shapes": [list(shape) for shape in layout.shapes]},
            "files": {"moments.safetensors": {"sha256": hashlib.sha256(content).hexdigest()}},
        }
        (folder / "posterior.json").write_text(json.dumps(header), encoding="utf-8")
        return run

    return write

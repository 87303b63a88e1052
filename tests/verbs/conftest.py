"""Small data sets, finished runs, and the command."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import bdl, train, train_once

from bdl_train.runs import RunDir

__all__ = ["bdl", "train"]


@pytest.fixture(scope="session")
def class_run(tmp_path_factory) -> RunDir:
    """SWAG on the breast-cancer data. Read it, never change it."""
    return train_once(tmp_path_factory.mktemp("class_run"), "inference.num_draws=3")


@pytest.fixture(scope="session")
def mixed_csv(tmp_path_factory) -> Path:
    """A table with numbers, a category, missing values and a declared split; `y` is continuous."""
    random = np.random.default_rng(0)
    n = 120
    table = pd.DataFrame(
        {
            "width": random.normal(5, 2, n).round(3),
            "colour": random.choice(["red", "green", "blue"], n),
            "age": random.integers(1, 90, n).astype(float),
            "part": ["train"] * 80 + ["val"] * 15 + ["test"] * 25,
        }
    )
    table["y"] = 3 * table["width"] + 10 * (table["colour"] == "red") + random.normal(0, 1, n)
    table["sick"] = np.where(table["y"] > table["y"].median(), "yes", "no")
    table["visits"] = random.poisson(np.exp(0.2 * table["width"]))
    table.loc[random.choice(n, 20, replace=False), "age"] = np.nan
    path = tmp_path_factory.mktemp("csv") / "mixed.csv"
    table.to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def number_run(tmp_path_factory, mixed_csv) -> RunDir:
    """A deep ensemble on `mixed_csv`, heteroscedastic. Read it, never change it."""
    return train_once(
        tmp_path_factory.mktemp("number_run"),
        "data=csv",
        f"data.path={mixed_csv}",
        "data.target=y",
        "data.drop=[sick,visits]",
        "data.split_column=part",
        "likelihood=heteroscedastic_gaussian",
        "inference=deep_ensemble",
    )


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A folder of data sets as `data.root` names it: a UCI table and small pictures."""
    random = np.random.default_rng(1)
    (tmp_path / "sets" / "uci").mkdir(parents=True)
    X = random.normal(size=(60, 3))
    np.savez(tmp_path / "sets" / "uci" / "toy.npz", X=X, y=X @ [1.0, -2.0, 0.5] + random.normal(size=60))
    (tmp_path / "sets" / "images").mkdir()
    for name, shape in (("grey", (28, 28)), ("colour", (32, 32, 3))):
        y = random.integers(0, 2, 48).astype(np.int64)
        # Bright or dark, so that there is something to learn.
        x = random.integers(0, 100, (48, *shape)) + 120 * y.reshape(-1, *[1] * len(shape))
        arrays = {"x": x.astype(np.uint8), "y": y}
        split = {f"{key}_{part}": arrays[key][rows] for key in arrays for part, rows in PARTS.items()}
        np.savez(tmp_path / "sets" / "images" / f"{name}.npz", **split)
    return tmp_path / "sets"


PARTS = {"train": slice(0, 36), "test": slice(36, 48)}

USER_MODULE = '''
import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(30, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x):
        return self.layers(x)


class Waves(LightningDataModule):
    def __init__(self, rows):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 4, generator=generator)
        self.y = self.x.sin().sum(1)

    def _loader(self, rows):
        return DataLoader(TensorDataset(self.x[rows], self.y[rows]), batch_size=16)

    def train_dataloader(self):
        return self._loader(slice(0, 40))

    def val_dataloader(self):
        return self._loader(slice(40, 50))

    def test_dataloader(self):
        return self._loader(slice(50, None))


class Diverging(nn.Module):
    """NaN for the members whose first weight is above zero, and for one example of this process's choice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 2)
        self.bad = bool(self.layer.weight[0, 0] > 0)
        self.register_buffer("poison", torch.tensor(float("nan") if self.bad else 0.0))

    def forward(self, x):
        return self.layer(x) + (self.poison if self.training else 0.0)
'''


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable module with a network and a data module of a user's own."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my_things.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    yield "my_things"
    sys.modules.pop("my_things", None)

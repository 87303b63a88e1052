"""Any LightningDataModule as a data source. The modules here live in a package of the user's, on disk."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bdl_train.build import allowing
from bdl_train.data import Data
from bdl_train.data._datamodule import DataModuleSource, source_from
from bdl_train.errors import UsageError
from bdl_train.specs import TargetKind

torch.set_num_threads(1)

MODULE = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Table(pl.LightningDataModule):
    def __init__(self, kind="class", shift=0.0):
        super().__init__()
        self.kind, self.shift, self.calls = kind, shift, []

    def part(self, num_rows, start):
        x = torch.arange(start, start + num_rows)[:, None] + torch.tensor([0.0, 0.5]) + self.shift
        y = {"class": x[:, 0].long() % 3, "float": 10 * x[:, :1], "bad": x}[self.kind]
        return TensorDataset(x, y)

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        assert self.calls[:1] == ["prepare"]
        self.calls.append(stage)

    def train_dataloader(self):
        assert self.calls == ["prepare", "fit"]
        return DataLoader(self.part(40, 0), batch_size=7, shuffle=True)

    def test_dataloader(self):
        assert self.calls[-1] == "test"
        return DataLoader(self.part(12, 100), batch_size=5)


class WithVal(Table):
    def __init__(self, batch_size, kind="class"):
        super().__init__(kind)
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.part(40, 0), batch_size=self.batch_size, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.part(9, 50), batch_size=self.batch_size)


class Pictures(Table):
    def part(self, num_rows, start):
        generator = torch.Generator().manual_seed(start)
        x = torch.randint(0, 256, (num_rows, 3, 6, 5), dtype=torch.uint8, generator=generator)
        return TensorDataset(x, torch.arange(num_rows) % 2)


class NoTest(Table):
    test_dataloader = pl.LightningDataModule.test_dataloader


class Triples(Table):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.part(40, 0).tensors, torch.zeros(40)))


class ListOfLoaders(Table):
    def val_dataloader(self):
        return [super().train_dataloader()]


class Mixed(Table):
    def test_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)))


class Endless(Table):
    class Rows(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(1000), torch.tensor(0)

    def train_dataloader(self):
        return DataLoader(self.Rows(), batch_size=50)
"""

SETTINGS: dict[str, Any] = {"batch_size": 16, "val_fraction": 0.1, "max_in_memory_gib": 8, "root": "unused"}


@pytest.fixture(autouse=True, scope="module")
def _users_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("package")
    (folder / "users_data").mkdir()
    (folder / "users_data" / "modules.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch, allowing(["users_data"]):
        patch.syspath_prepend(folder)
        yield


def node(cls: str, **changed: Any) -> dict[str, Any]:
    return {"_target_": f"users_data.modules.{cls}", **SETTINGS, **changed}


def load(cls: str, *, seed: int = 0, **changed: Any) -> Data:
    return source_from(node(cls, **changed)).load("", seed)


def test_loaders_become_parts_with_a_validation_part_cut_from_train():
    data = load("Table", val_fraction=0.25)
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 10, 12]
    assert data.name == "Table"
    assert data.target.kind is TargetKind.CLASS
    assert data.target.classes == ("0", "1", "2")
    assert data.inputs.groups == (1, 1)
    assert data.inputs.names == ("x0", "x1")
    fitted = np.concatenate([data.train.x[:, 0], data.val.x[:, 0]])
    np.testing.assert_array_equal(np.sort(fitted), np.arange(40))
    np.testing.assert_array_equal(data.test.x[:, 0], np.arange(100, 112))
    np.testing.assert_array_equal(data.test.rows, np.arange(40, 52))
    for part in (data.train, data.val, data.test):
        np.testing.assert_array_equal(part.y, part.x[:, 0] % 3)
    assert data.transform is None


def test_validation_loader_of_the_module_is_used(caplog: pytest.LogCaptureFixture):
    data = load("WithVal", name="mine")
    assert [len(part) for part in (data.train, data.val, data.test)] == [32, 9, 12]
    np.testing.assert_array_equal(data.val.rows, np.arange(32, 41))
    np.testing.assert_array_equal(data.val.x[:, 0], np.arange(50, 59))
    assert data.name == "mine"
    # The module was given the batch size 16, and drops what does not fill a batch.
    assert "mine.train_dataloader() gave 32 of its data set's 40 rows" in caplog.text


def test_floating_targets_are_standardised_with_the_training_part():
    data = load("Table", kind="float", val_fraction=0.5)
    assert data.target.kind is TargetKind.CONTINUOUS
    raw = 10 * data.train.x[:, 0].astype(np.float64)
    assert (data.target.loc, data.target.scale) == pytest.approx((raw.mean(), raw.std()))
    np.testing.assert_allclose(data.test.y, (10 * np.arange(100, 112) - raw.mean()) / raw.std(), rtol=1e-5)


def test_images_stay_uint8_with_statistics_of_the_training_part():
    data = load("Pictures")
    assert data.train.x.dtype == np.uint8
    assert data.inputs.shape == (3, 6, 5)
    np.testing.assert_allclose(data.inputs.pixel_mean, (data.train.x / 255).mean((0, 2, 3)), rtol=1e-12)


def test_rows_follow_the_seed_and_not_the_global_generator_which_is_untouched():
    order = []
    for seed, global_seed in ((0, 5), (0, 6), (1, 5)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            state = torch.random.get_rng_state()
            data = load("Table", seed=seed, val_fraction=0.0)
            assert torch.equal(torch.random.get_rng_state(), state)
        order.append(data.train.x[:, 0].tolist())
    assert order[0] == order[1]
    assert order[0] != order[2]


def test_other_keys_are_arguments_of_the_module():
    np.testing.assert_array_equal(load("Table", shift=7.0).test.x[:, 0], np.arange(107, 119))
    with pytest.raises(UsageError, match=r"Unknown key 'data\.shfit'\. Did you mean 'shift'\?"):
        load("Table", shfit=7.0)


def test_node_written_by_hand_needs_a_batch_size_only():
    by_hand = {"_target_": "users_data.modules.Table", "batch_size": 4}
    source = source_from(by_hand)
    assert isinstance(source, DataModuleSource)
    assert source.batch_size == 4
    assert len(source.load("", 0).val) == 4
    with pytest.raises(UsageError, match=r"data\.batch_size:? is missing"):
        source_from({"_target_": "users_data.modules.Table"})


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("NoTest", {}, "NoTest has no test_dataloader, which is needed"),
        ("Triples", {}, r"Triples\.train_dataloader\(\) must give pairs \(x, y\), got list of 3"),
        ("Table", {"kind": "bad"}, r"and y \[batch\], got \[7, 2\] and \[7, 2\]"),
        ("ListOfLoaders", {}, r"val_dataloader\(\) must return one loader, got list"),
        ("Mixed", {}, r"x float32 \[2\] .* for training, but x float32 \[3\] .* for the test part"),
        ("Endless", {"max_in_memory_gib": 0.001}, r"holds more than data\.max_in_memory_gib=0\.001 GiB"),
        ("Table", {"shift": float("nan")}, "gives NaN or infinite inputs"),
        ("Table", {"batch_size": 0}, r"data\.batch_size: input should be greater than or equal to 1, got 0"),
        ("Missing", {}, r"data\._target_ is 'users_data\.modules\.Missing', which cannot be imported"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, changed: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        load(name, **changed)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.path.join", "outside the allowed packages"),
        ("bdl_train.models.mlp.Mlp", r"expected a class that derives from bdl_train\.data\.DataSource"),
        ("torch.nn.Linear", r"derives from bdl_train\.data\.DataSource or .*LightningDataModule"),
    ],
)
def test_other_targets_are_refused(target: str, message: str):
    with pytest.raises(UsageError, match=message):
        source_from({"_target_": target, **SETTINGS})
    with pytest.raises(UsageError, match="data must be a mapping with a '_target_'"):
        source_from({"root": "data"})


def test_reading_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        load("Table")
    assert "Read Table: 40 rows of the train part" in caplog.text
    assert "Read Table: 12 rows of the test part" in caplog.text

"""Raw columns of a source stand at the positions that the parts name."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from bdl_train.data._datamodule import source_from
from bdl_train.schema import shipped


def source(group: str, **settings: Any):
    return source_from({**yaml.safe_load((shipped() / "data" / f"{group}.yaml").read_text()), **settings})


def test_columns_that_are_no_inputs_are_there_too(tmp_path: Path):
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {"a": random.normal(size=40), "race": ["x", "y"] * 20, "y": random.integers(0, 2, 40)}
    )
    table.to_csv(tmp_path / "t.csv", index=False)
    one = source("csv", path=str(tmp_path / "t.csv"), target="y", drop=["race"])
    data, raw = one.load(".", 0), one.table(".")
    assert raw is not None
    assert data.inputs.names == ("a",)
    picked = raw.iloc[data.test.rows]
    assert picked["race"].tolist() == table["race"].iloc[data.test.rows].tolist()
    assert picked["y"].astype(int).tolist() == data.test.y.tolist()


def test_rows_of_a_second_file_follow_those_of_the_first(tmp_path: Path):
    for name, start in (("train", 0), ("test", 100)):
        pd.DataFrame({"a": np.arange(start, start + 30), "y": np.arange(30) % 2}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    one = source("csv", path=str(tmp_path / "train.csv"), test_path=str(tmp_path / "test.csv"), target="y")
    data, raw = one.load(".", 0), one.table(".")
    assert raw is not None
    assert raw.iloc[data.test.rows]["a"].tolist() == [str(i) for i in range(100, 130)]


@pytest.mark.parametrize("name", ["iris", "diabetes"])
def test_sets_of_scikit_learn_have_their_features(name: str):
    one = source("sklearn", name=name)
    data, raw = one.load(".", 0), one.table(".")
    assert raw is not None
    column = raw.iloc[data.test.rows, 0].to_numpy()
    assert np.corrcoef(column, data.test.x[:, 0])[0, 1] == pytest.approx(1)


def test_uci_sets_have_features_and_target(tmp_path: Path):
    random = np.random.default_rng(1)
    (tmp_path / "uci").mkdir()
    X, y = random.normal(size=(50, 2)), random.normal(size=50)
    np.savez(
        tmp_path / "uci" / "toy.npz", X=X, y=y, feature_names=np.array(["u", "v"]), target_name=np.array("w")
    )
    one = source("uci", name="toy")
    data, raw = one.load(str(tmp_path), 0), one.table(str(tmp_path))
    assert raw is not None
    assert list(raw) == ["u", "v", "w"]
    np.testing.assert_allclose(
        raw["w"].to_numpy()[data.test.rows], data.test.y * data.target.scale + data.target.loc, rtol=1e-6
    )


def test_images_have_no_columns():
    assert source("images").table(".") is None

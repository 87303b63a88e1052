"""OpenML sets through scikit-learn's fetcher, which is replaced here: no network."""

import urllib.error
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
from sklearn.utils import Bunch

from bdl_train.data._datamodule import source_from
from bdl_train.errors import UsageError

SETTINGS: dict[str, Any] = {
    "_target_": "bdl_train.data.openml.Openml", "name": None, "version": "active", "data_id": 31, "cache":
    None, "target": None, "kind": "auto", "max_auto_classes": 20, "features": None, "drop": [], "categorical":
    [], "max_categories": 64, "split": 0, "test_fraction": 0.2, "val_fraction": 0.1, "batch_size": 8,
}  # fmt: skip


def a_bunch(targets: tuple[str, ...] = ("class",)) -> Bunch:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "amount": random.normal(size=50),
            "purpose": pd.Categorical(random.choice(["1", "2", "3"], 50)),
            "class": pd.Categorical(random.choice(["good", "bad"], 50)),
        }
    )
    return Bunch(frame=frame, target_names=list(targets))


def test_set_becomes_inputs_and_classes(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **given: asked.update(given) or a_bunch())
    data = source_from({**SETTINGS, "cache": "/some/where"}).load("", 0)
    assert (asked["data_id"], asked["data_home"]) == (31, "/some/where")
    assert "name" not in asked
    assert data.name == "openml-31"
    assert data.target.classes == ("bad", "good")
    assert data.inputs.groups == (1, 3)  # levels that are numbers stay categories
    assert [len(part) for part in (data.train, data.val, data.test)] == [36, 4, 10]


def test_set_by_name_and_version_with_another_target(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **given: asked.update(given) or a_bunch())
    changed = {"name": "credit-g", "version": 1, "data_id": None, "target": "amount"}
    data = source_from({**SETTINGS, **changed}).load("", 0)
    assert (asked["name"], asked["version"], "data_id" in asked) == ("credit-g", 1, False)
    assert data.name == "credit-g"
    assert data.inputs.names == ("purpose", "class")


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        OSError("no route to host"),
        TimeoutError("no route to host"),
    ],
)
def test_offline_without_a_cache_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, failure: Exception):
    def fail(**given: Any) -> Bunch:
        raise failure

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    with pytest.raises(UsageError, match="no route to host") as caught:
        source_from({**SETTINGS, "cache": "/some/where"}).load("", 0)
    for words in ("OpenML could not be reached", "data.data_id=31", "/some/where (data.cache)", "data=csv"):
        assert words in str(caught.value)


def test_set_that_openml_does_not_know(monkeypatch: pytest.MonkeyPatch):
    def fail(**given: Any) -> Bunch:
        raise ValueError("No known dataset matching")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    changed = {"name": "credit-h", "data_id": None}
    message = r"refused data\.name=credit-h, data\.version=active: No known"
    with pytest.raises(UsageError, match=message):
        source_from({**SETTINGS, **changed}).load("", 0)


def test_settings_must_name_one_set_and_one_target(monkeypatch: pytest.MonkeyPatch):
    for name, data_id in ((None, None), ("credit-g", 31)):
        with pytest.raises(UsageError, match=r"expected either data\.name or data\.data_id, got name="):
            source_from({**SETTINGS, "name": name, "data_id": data_id})
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **given: a_bunch(("class", "amount")))
    with pytest.raises(UsageError, match=r"2 targets \(class, amount\): choose one with data\.target"):
        source_from(SETTINGS).load("", 0)

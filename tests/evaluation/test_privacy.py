"""The privacy chapter: what it tells, when it warns, what it leaves out and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from bdl_train.errors import UsageError
from bdl_train.evaluation.inversion import Inversion
from bdl_train.evaluation.privacy import privacy_section
from bdl_train.evaluation.section import Section, read_section, write_section


@dataclass(frozen=True)
class Some:
    name: str
    mask: np.ndarray


def setting(
    shift: float, *, num_members: int = 8, share: float = 0.5, num_train: int = 600, num_test: int = 500
):
    """Members that are `shift` surer, in logits, of rows that they saw; rows differ in hardness."""
    random = np.random.default_rng(1)
    rows = num_train + num_test
    is_train = np.arange(rows) < num_train
    is_in = (random.random((num_members, rows)) < share) & is_train
    logits = random.normal(1, 2, rows) + shift * is_in + 0.5 * random.normal(size=is_in.shape)
    log_prob = np.log(expit(logits))
    nll = -np.log(np.exp(log_prob).mean(0))
    return nll, is_train, log_prob, is_in


def section(shift: float, *, inversion: Inversion | None = None, **settings: Any) -> Section:
    nll, is_train, log_prob, is_in = setting(shift, **settings)
    return privacy_section(
        nll, is_train, log_prob=log_prob, is_in=is_in, is_density=False, seed=0, inversion=inversion
    )


def test_a_leak_that_only_the_likelihood_ratio_sees_warns():
    found = section(1.0)
    table = found.tables["attacks"].set_index("attack")
    assert list(table.index) == ["loss of the ensemble", "loss of a member", "likelihood ratio"]
    assert list(table.columns) == [
        "slice", "auc", "low", "high", "tpr_at_1_fpr", "low2", "high2", "tpr_at_01_fpr", "low3", "high3",
        "advantage", "advantage_by_chance", "n_in", "n_out",
    ]  # fmt: skip
    assert table.loc["likelihood ratio", "low"] > 0.8
    assert table.loc["loss of a member", "high"] < 0.7
    assert table.loc["loss of the ensemble", ["n_in", "n_out"]].tolist() == [600, 500]
    assert found.level == "warn"
    assert "gives training rows away by" in found.verdict
    assert "likelihood ratio: AUC 0." in found.verdict
    assert "own thresholds: lower bounds of 0.55 and 2 %" in found.verdict
    roc = found.tables["roc"]
    assert list(roc.columns) == ["attack", "fpr", "tpr"]
    assert set(roc["attack"]) == set(table.index)
    assert any(text.startswith("likelihood ratio: online") for text in found.warnings)


def test_without_a_leak_it_does_not_warn():
    found = section(0.0)
    assert found.level in ("good", "note")
    assert "gives training rows away" not in found.verdict
    good = section(0.0, num_train=3000, num_test=3000, num_members=3)
    assert good.level == "good"
    assert "a stronger one might" in good.verdict


def test_members_of_the_same_rows_leave_the_attacks_by_loss_and_name_the_key():
    found = section(1.0, share=1.1)
    assert list(found.tables["attacks"]["attack"]) == ["loss of the ensemble", "loss of a member"]
    assert found.warnings[0].startswith("No likelihood-ratio attack: Members cannot be shadow models")
    assert "trainer.member_fraction below 1" in found.warnings[0]


def test_slices_are_attacked_by_themselves_and_small_ones_are_named():
    nll, is_train, log_prob, is_in = setting(0.0)
    rows = np.arange(len(nll))
    leaky = Some("site=B", rows % 4 == 0)
    log_prob = np.where(is_in & leaky.mask, log_prob / 4, log_prob)
    slices = [leaky, Some("site=A", rows % 4 != 0), Some("rare", rows < 30)]
    found = privacy_section(
        nll, is_train, log_prob=log_prob, is_in=is_in, is_density=False, seed=0, slices=slices
    )
    table = found.tables["attacks"].set_index(["slice", "attack"])
    assert table.loc[("site=B", "likelihood ratio"), "low"] > 0.7
    assert (
        table.loc[("site=A", "likelihood ratio"), "low"]
        < 0.5
        < table.loc[("site=A", "likelihood ratio"), "high"]
    )
    assert table.loc[("site=B", "loss of the ensemble"), "n_out"] == 125
    assert "Of 2 slices site=B is the easiest to attack, by likelihood ratio" not in found.verdict
    assert "Of 3 slices site=B is the easiest to attack, by likelihood ratio" in found.verdict
    assert any(
        "loss of the ensemble: the slice rare has 30 rows that were trained on and 0" in w
        for w in found.warnings
    )
    assert ("rare", "likelihood ratio") in table.index  # all of its rows are training rows, of some members


def test_an_inversion_that_ends_near_training_rows_warns():
    for high, warns in ((0.9, True), (1.1, False)):
        table = pd.DataFrame([{"slice": "all", "target": "all", "ratio": 0.8, "low": 0.7, "high": high}])
        kept = pd.DataFrame({"target": ["a"], "start": [0], "position": [0], "value": [0.5]})
        found = section(0.0, inversion=Inversion(table, kept, ("class b: no rows",)))
        assert (found.level == "warn") == warns
        assert "0.800 times as far from the nearest training row" in found.verdict
        assert set(found.tables) == {"attacks", "roc", "inversion", "reconstructions"}
        assert "inversion: class b: no rows" in found.warnings


def test_a_section_comes_back_from_disk(tmp_path: Path):
    found = section(1.0)
    write_section(tmp_path, found)
    back = read_section(tmp_path, "privacy")
    assert (back.verdict, back.level, back.warnings) == (found.verdict, found.level, found.warnings)
    for name, table in found.tables.items():
        pd.testing.assert_frame_equal(back.tables[name], table)


def test_arrays_that_do_not_fit_are_refused():
    nll, is_train, log_prob, is_in = setting(0.0)
    with pytest.raises(UsageError, match="must be of the same rows"):
        privacy_section(nll[1:], is_train, log_prob=log_prob, is_in=is_in, is_density=False, seed=0)
    broken = np.where(np.arange(len(nll)) == 3, np.nan, nll)
    with pytest.raises(UsageError, match="nll has 1 NaN values"):
        privacy_section(broken, is_train, log_prob=log_prob, is_in=is_in, is_density=False, seed=0)
    with pytest.raises(UsageError, match="got 1100 training rows out of 1100"):
        privacy_section(nll, np.ones(1100, bool), log_prob=log_prob, is_in=is_in, is_density=False, seed=0)
    with pytest.raises(UsageError, match="is_in says that members were trained on rows"):
        privacy_section(nll, ~is_train, log_prob=log_prob, is_in=is_in, is_density=False, seed=0)

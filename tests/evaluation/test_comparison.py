"""Experiments against a baseline: the table by hand, adjusted p-values, and a verdict in words."""

import math

import numpy as np
import pytest
import scipy.stats
from paired_runs import scored_experiment

from bdl_train.evaluation.comparison import paired_section, show_paired
from bdl_train.evaluation.paired import CORRECTED, ROWS
from bdl_train.evaluation.pairing import ScoredExperiment, ScoredRun
from bdl_train.evaluation.section import read_section, write_section


def test_a_planted_difference_is_found_in_words_and_numbers(tmp_path):
    base, other = scored_experiment("plain", splits=8), scored_experiment("good", splits=8, gain=0.1)
    section = paired_section([base, other], [], seed=0)
    table = section.tables["differences"].set_index("metric")
    d = np.array(
        [
            b.columns["nll"].mean() - a.columns["nll"].mean()
            for a, b in zip(base.runs, other.runs, strict=True)
        ]
    )
    nll = table.loc["nll"]
    error = math.sqrt((1 / 8 + 80 / 320) * d.var(ddof=1))
    assert nll["difference"] == pytest.approx(d.mean())
    assert nll["p"] == pytest.approx(2 * scipy.stats.t.sf(abs(d.mean()) / error, 7))
    assert (nll["method"], nll["splits"], nll["n"], nll["result"]) == (CORRECTED, 8, 640, "better")
    assert table["result"].to_dict() == {
        "nll": "better", "crps": "better", "mae": "no clear difference", "mse": "no clear difference",
    }  # fmt: skip
    # Four p-values in the family, in step-down order.
    order = np.argsort(table["p"].to_numpy())
    first, second = table.iloc[order[0]], table.iloc[order[1]]
    assert first["p_adjusted"] == pytest.approx(4 * first["p"])
    assert second["p_adjusted"] == pytest.approx(max(4 * first["p"], 3 * second["p"]))
    low, high = sorted((-nll["low"], -nll["high"]))
    assert section.verdict.startswith(
        f"good against plain, 8 splits: beats it in NLL by {-nll['difference']:.3g} nats ({low:.3g} .. {high:.3g}) and "
        "in CRPS by "
    )
    assert "kWh (" in section.verdict
    assert "no clear difference in MAE (" in section.verdict
    splits = section.tables["splits"]
    assert splits.loc[splits["metric"] == "nll", "difference"].tolist() == pytest.approx(d)
    write_section(tmp_path, section)
    assert read_section(tmp_path, "paired").verdict == section.verdict


def test_the_other_way_round_it_loses():
    base, other = scored_experiment("plain", splits=8), scored_experiment("good", splits=8, gain=0.1)
    section = paired_section([base, other], ["good"], seed=0)
    assert section.verdict.startswith("plain against good, 8 splits: loses to it in NLL by 0.")
    assert section.tables["differences"]["result"].tolist()[0] == "worse"


def test_one_split_rests_on_its_rows_and_a_run_equals_itself():
    base = scored_experiment("a")
    twin = ScoredExperiment("twin", base.runs)
    section = paired_section([base, twin, scored_experiment("b", seeds=2, gain=0.2)], [], seed=0)
    table = section.tables["differences"]
    assert set(table["method"]) == {ROWS}
    assert set(table.loc[table["experiment"] == "twin", "result"]) == {"equal"}
    assert section.verdict.splitlines()[0] == (
        "twin against a, 80 rows of one pair of runs: exactly equal in NLL, CRPS, MAE, MSE."
    )
    assert "b has no partner in a at split 0, seed 1: not paired." in section.warnings
    seeds = paired_section([scored_experiment("a", seeds=2), scored_experiment("b", seeds=2)], [], seed=0)
    assert "80 rows of 2 seeds of one split, averaged" in seeds.verdict


def test_experiments_that_differ_by_chance_alone_are_rarely_called_different():
    wrong = 0
    for i in range(40):
        made = [scored_experiment(f"{name}{i}", count=30) for name in "ab"]
        wrong += set(paired_section(made, [], seed=0).tables["differences"]["result"]) != {
            "no clear difference"
        }
    # At most 5 % of families by Holm: 2 of 40, and four standard errors.
    assert wrong <= 2 + 4 * math.sqrt(40 * 0.05 * 0.95)


def class_experiment(name: str, share: float) -> ScoredExperiment:
    random = np.random.default_rng(0)
    right = (random.random(500) < share).astype(float)
    nll = random.exponential(1, 500)
    columns = {"row": np.arange(500), "y": np.zeros(500), "nll": nll, "correct": right, "brier": nll / 2}
    return ScoredExperiment(name, [ScoredRun(name, (None, 0), "f", 900, columns)])


def test_of_accuracy_more_is_better_and_scores_that_are_not_finite_are_said():
    base, other = class_experiment("a", 0.5), class_experiment("b", 0.8)
    other.runs[0].columns["nll"][:2] = np.inf
    section = paired_section([base, other], [], seed=0)
    assert section.tables["differences"]["result"].tolist() == ["not judged", "better", "equal"]
    assert "beats it in accuracy by 0." in section.verdict
    assert "not judged in NLL, because it is not finite in 2 of 500 rows" in section.verdict


def test_the_terminal_shows_it_all_or_the_nll_of_many(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    few = [scored_experiment(name) for name in ("base", "one", "two")]
    show_paired(paired_section([*few, scored_experiment("z", data="other")], [], seed=0))
    said = capsys.readouterr().out
    assert said.count("crps") == 2
    assert "one against base, 80 rows of one pair of runs: " in said
    assert "z cannot be paired with base" in said
    show_paired(paired_section([scored_experiment(f"e{i}") for i in range(9)], [], seed=0))
    said = capsys.readouterr().out
    assert "crps" not in said
    assert said.count("nll") == 8
    assert "report=compare.html" in said
    show_paired(paired_section(few[:1], [], seed=0))
    assert "none. There are no two experiments on the same rows." in capsys.readouterr().out

"""Runs are paired by split and seed on the same data, and everything that is left over is told."""

import dataclasses

import numpy as np
import pytest
from paired_runs import scored_experiment, scored_run

from bdl_train.errors import UsageError
from bdl_train.evaluation.paired import NLL
from bdl_train.evaluation.pairing import ScoredExperiment, matched, splits_of


def told_of(base: ScoredExperiment, other: ScoredExperiment) -> tuple[list, list[str]]:
    """The splits of one pairing, and the messages."""
    warnings: list[str] = []
    _, partners = matched([base, other], [base.name], warnings)
    splits = [split for one, pairs in partners[base.name] for split in splits_of(base, one, pairs, warnings)]
    return splits, warnings


def test_runs_meet_by_split_and_seed_whatever_their_order():
    base, other = scored_experiment("a", splits=4), scored_experiment("b", splits=4, gain=0.3)
    mixed = dataclasses.replace(other, runs=[other.runs[i] for i in (2, 0, 3, 1)])
    splits, warnings = told_of(base, mixed)
    assert warnings == []
    assert [one.name for one in splits] == ["0", "1", "2", "3"]
    for i, one in enumerate(splits):
        assert one.rows.tolist() == base.runs[i].columns["row"].tolist()
        np.testing.assert_array_equal(one.model[NLL], other.runs[i].columns["nll"])
        np.testing.assert_array_equal(one.baseline[NLL], base.runs[i].columns["nll"])
        assert one.test_share == 80 / 320


def test_seeds_of_one_split_are_averaged_row_by_row():
    base, other = scored_experiment("a", seeds=3), scored_experiment("b", seeds=3)
    (one,), _ = told_of(base, other)
    assert one.num_pairs == 3
    np.testing.assert_allclose(one.model[NLL], np.mean([run.columns["nll"] for run in other.runs], axis=0))


def test_rows_in_another_order_or_of_one_run_only_still_meet_by_their_ids():
    base = scored_experiment("a")
    run = base.runs[0]
    shuffled = np.random.default_rng(0).permutation(80)[:75]
    other = ScoredExperiment(
        "b", [dataclasses.replace(run, columns={name: one[shuffled] for name, one in run.columns.items()})]
    )
    (one,), warnings = told_of(base, other)
    np.testing.assert_array_equal(one.model[NLL], one.baseline[NLL])
    assert len(one.rows) == 75
    assert warnings == ["b against a, split 0, seed 0: 5 rows are scored by one run only and left out."]


def test_other_data_are_refused_with_the_fingerprints():
    splits, warnings = told_of(scored_experiment("a"), scored_experiment("b", data="concrete"))
    assert splits == []
    assert warnings == [
        "b cannot be paired with a: their data differ (at split 0, seed 0 the fingerprints are concrete-0-0 and "
        "energy-0-0)."
    ]
    _, warnings = told_of(
        ScoredExperiment("a", [scored_run("a", split) for split in range(5)]),
        ScoredExperiment("b", [scored_run("b", 7)]),
    )
    assert warnings == [
        "b cannot be paired with a: they share no split and seed (split 7, seed 0 against split 0, seed 0; split 1, "
        "seed 0; split 2, seed 0 and 2 more)."
    ]


def test_runs_without_a_partner_twice_or_on_other_data_are_told():
    base = ScoredExperiment("a", [scored_run("a", split) for split in (0, 1, 2, 2)])
    other = ScoredExperiment(
        "b", [scored_run("b", 0), scored_run("b", 1, data="x"), scored_run("b", 2), scored_run("b", 5)]
    )
    splits, warnings = told_of(base, other)
    assert [one.name for one in splits] == ["0", "2"]
    assert warnings == [
        "a has 1 more runs of the same split and seed: only the first is paired.",
        "b has no partner in a at split 5, seed 0: not paired.",
        "b and a are on different data at split 1, seed 0 (other fingerprints): not paired.",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": np.arange(1000, 1080)}, "the runs score no row in common: not paired."),
        ({"y": np.zeros(80)}, "the same rows have different targets: not paired."),
        (
            {"correct": np.ones(80), "brier": np.ones(80)},
            "one predicts classes, the other numbers: not paired.",
        ),
    ],
)
def test_rows_that_are_not_the_same_are_not_paired(change: dict, message: str):
    base = scored_experiment("a")
    run = base.runs[0]
    splits, warnings = told_of(
        base, ScoredExperiment("b", [dataclasses.replace(run, columns={**run.columns, **change})])
    )
    assert splits == []
    assert warnings == [f"b against a, split 0, seed 0: {message}"]


def test_without_a_choice_the_first_on_each_data_set_is_the_baseline():
    made = [
        scored_experiment(name, data=data)
        for name, data in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "y"), ("e", "z"), ("f", "x"))
    ]
    warnings: list[str] = []
    chosen, partners = matched(made, [], warnings)
    assert [one.name for one in chosen] == ["a", "b", "e"]
    assert {name: [one.name for one, _ in own] for name, own in partners.items()} == {
        "a": ["c", "f"], "b": ["d"], "e": [],
    }  # fmt: skip
    assert [one[:30] for one in warnings] == ["e cannot be paired with a: the"]
    _, partners = matched(made, ["f"], warnings := [])
    assert [one.name for one, _ in partners["f"]] == ["a", "c"]
    assert len(warnings) == 3
    # Two that are alone are told once.
    matched([scored_experiment("a"), scored_experiment("b", data="x")], [], warnings := [])
    assert len(warnings) == 1


def test_two_baselines_on_one_data_set_are_refused():
    with pytest.raises(UsageError, match="two experiments on the same data, a and b"):
        matched([scored_experiment("a"), scored_experiment("b")], ["a", "b"], [])


def test_an_unknown_training_size_is_not_guessed():
    base, other = scored_experiment("a"), scored_experiment("b")
    other = ScoredExperiment("b", [dataclasses.replace(other.runs[0], num_train=None)])
    (one,), _ = told_of(base, other)
    assert one.test_share is None

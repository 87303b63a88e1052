"""Suggestions: every combination once, the right distribution, a function of seed, number and record."""

import math
import sys

import pytest
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.overrides import split_axes
from bdl_train.sweeps.record import Trial
from bdl_train.sweeps.samplers import check_axes, grid_size, probes, space_size, suggest


def axes_of(*words: str):
    return split_axes(words)[1]


def value_of(word: str) -> float:
    return float(word.partition("=")[2])


def drawn(word: str, count: int = 400) -> list[float]:
    axes = axes_of(word)
    return [value_of(suggest(axes, "random", 3, i, {}, maximize=False)[0]) for i in range(count)]


def test_a_grid_is_every_combination_once_the_last_axis_fastest():
    axes = axes_of("seed=1,2", "optimizer.lr=0.1,0.2,0.3")
    found = [suggest(axes, "grid", 0, i, {}, maximize=False) for i in range(grid_size(axes))]
    assert found == [[f"seed={s}", f"optimizer.lr={lr}"] for s in (1, 2) for lr in (0.1, 0.2, 0.3)]


def test_random_values_are_uniform_in_the_scale_of_the_interval():
    assert stats.kstest(drawn("x=interval(2,5)"), stats.uniform(2, 3).cdf).pvalue > 0.01
    logs = [math.log(value) for value in drawn("x=tag(log,interval(1e-4,1e-1))")]
    low, high = math.log(1e-4), math.log(1e-1)
    assert stats.kstest(logs, stats.uniform(low, high - low).cdf).pvalue > 0.01
    whole = drawn("x=int(interval(1,4))", 2000)
    # Of integers both ends are as likely as the rest.
    counts = [whole.count(i) for i in (1, 2, 3, 4)]
    assert sum(counts) == 2000
    assert stats.chisquare(counts).pvalue > 0.01


def test_random_choices_are_all_drawn_alike():
    axes = axes_of("model=mlp,lenet,resnet20")
    words = [suggest(axes, "random", 0, i, {}, maximize=False)[0] for i in range(1500)]
    assert stats.chisquare([words.count(word) for word in axes[0].words]).pvalue > 0.01


def history(axes, count: int, sampler, seed: int = 7) -> dict[int, Trial]:
    """A search for lr=0.01 that is reported as done, one trial after another."""
    record: dict[int, Trial] = {}
    for i in range(count):
        words = tuple(suggest(axes, sampler, seed, i, record, maximize=False))
        objective = (math.log10(value_of(words[0])) + 2) ** 2
        record[i] = Trial(number=i, words=words, run=f"r{i}", status="complete", objective=objective)
    return record


SPACE = (
    "optimizer.lr=tag(log,interval(1e-5,1))",
    "model.width=range(1,9)",
    "inference=swag,anchored",
    "n=int(interval(1,5))",
)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_same_seed_number_and_record_give_the_same_suggestion(sampler):
    axes = axes_of(*SPACE)
    whole = history(axes, 14, sampler)
    assert whole == history(axes, 14, sampler)
    assert whole[3].words != history(axes, 4, sampler, seed=8)[3].words
    # Taken up again after a crash: trial 12 was lost, its suggestion is asked for anew.
    record = {i: trial for i, trial in whole.items() if i < 12}
    assert tuple(suggest(axes, sampler, 7, 12, record, maximize=False)) == whole[12].words


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_no_search_asks_for_the_same_settings_twice_while_others_are_left(sampler):
    axes = axes_of("optimizer.lr=0.1,0.01,0.001", "n=int(interval(1,4))")
    whole = history(axes, 12, sampler)
    assert space_size(axes) == 12 == len({trial.words for trial in whole.values()})
    assert space_size(axes_of(*SPACE)) is None
    # With nothing left it still answers.
    assert suggest(axes, sampler, 7, 12, whole, maximize=False)


def test_tpe_learns_from_what_was_tried():
    axes = axes_of(SPACE[0])
    late, blind = (
        sorted(trial.objective or 0.0 for i, trial in history(axes, 40, sampler).items() if i >= 20)
        for sampler in ("tpe", "random")
    )
    assert late[10] < blind[10] / 2


def test_tpe_looks_for_large_values_when_they_are_better():
    axes = axes_of("x=interval(0,1)")
    record = {
        i: Trial(number=i, words=(f"x={i / 30}",), run="r", status="complete", objective=i / 30)
        for i in range(30)
    }
    up = [value_of(suggest(axes, "tpe", s, 30, record, maximize=True)[0]) for s in range(8)]
    down = [value_of(suggest(axes, "tpe", s, 30, record, maximize=False)[0]) for s in range(8)]
    assert min(up) > 0.5 > max(down)


def test_tpe_takes_a_record_with_every_kind_of_trial():
    axes = axes_of(*SPACE)
    words = ("optimizer.lr=0.1", "model.width=3", "inference=swag", "n=2")
    kinds = [
        {"status": "running"},
        {"status": "failed"},
        {"status": "pruned", "curve": ((3, 0.5), (4, math.inf))},
        {"status": "complete", "objective": 0.3},
        {"status": "complete"},  # its objective was not finite
    ]
    record = {i: Trial(number=i, words=words, run=f"r{i}", **kind) for i, kind in enumerate(kinds * 4)}
    found = suggest(axes, "tpe", 0, len(record), record, maximize=False)
    assert [word.partition("=")[0] for word in found] == ["optimizer.lr", "model.width", "inference", "n"]
    assert found[1] in axes[1].words
    assert found[3] in {f"n={i}" for i in range(1, 6)}


def test_probes_name_every_value_once():
    axes = axes_of("a=1,2,3", "b=interval(0,1)", "c=x,y")
    assert probes(axes) == [
        ["a=1", "b=0.0", "c=x"],
        ["a=2", "b=0.0", "c=x"],
        ["a=3", "b=0.0", "c=x"],
        ["a=1", "b=0.0", "c=y"],
    ]


@pytest.mark.parametrize(
    ("words", "sampler", "num_trials", "said"),
    [
        ([], "grid", None, "Nothing to sweep"),
        (["a=interval(0,1)"], "grid", 3, "'a=interval(0,1)' is an interval, and sampler=grid"),
        (
            ["a=interval(0,1)"],
            "random",
            None,
            "sampler=random needs to know how many trials to try: num_trials=20",
        ),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(words, sampler, num_trials, said):
    with pytest.raises(UsageError) as error:
        check_axes(axes_of(*words), sampler, num_trials)
    assert said in str(error.value)


def test_without_optuna_tpe_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'bdl_train\[sweep\]'"):
        check_axes(axes_of("a=1,2"), "tpe", 3)
    check_axes(axes_of("a=interval(1,2)"), "random", 3)

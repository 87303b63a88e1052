"""Quoting of paths and expansion of multiruns, against Hydra's own parser and sweeper."""

import string
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bdl_train.config import compose
from bdl_train.errors import UsageError
from bdl_train.overrides import (
    Axis,
    expand_multirun,
    first_values,
    names_file,
    override_key,
    parse,
    quote_path,
    split_axes,
)

AWKWARD = "=(),[]{} '\"\\:;$@#~!*?|&%+-./" + string.ascii_letters + string.digits + "é\t"


def is_plain(path: str) -> bool:
    """Not one of the few values that keep a meaning of their own."""
    in_quotes = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    return "${" not in path and path not in ("null", "???") and not in_quotes


PATHS = st.text(AWKWARD, min_size=1, max_size=30).filter(is_plain)


@given(
    path=PATHS, key=st.sampled_from(["run", "input", "output_dir", "data.root", "++prior.run", "data.path"])
)
@settings(deadline=None, max_examples=300)
def test_a_path_arrives_as_it_was_typed(path, key):
    (override,) = parse([f"{key}={path}"])
    assert override.value() == path
    assert override.key_or_group == key.lstrip("+")


@given(path=PATHS)
@settings(deadline=None, max_examples=15)
def test_a_path_survives_the_whole_composition(path):
    assert compose("predict", [f"run={path}", "input=a.csv", "output=b.csv"])["run"] == path


@given(path=PATHS)
@settings(deadline=None, max_examples=100)
def test_a_path_is_one_job_of_a_multirun_and_still_arrives(path):
    assume(not path.startswith("choice("))
    (job,) = expand_multirun([f"run={path}"])
    assert parse(job)[0].value() == path


def test_a_value_in_quotes_is_not_quoted_again():
    assert quote_path("run='a b'") == "run='a b'"
    assert parse(['run="a,b"'])[0].value() == "a,b"


def test_null_and_interpolations_keep_their_meaning():
    assert quote_path("resume=null") == "resume=null"
    assert compose("train", ["output_dir=${name}/x", "name=abc"])["output_dir"] == "abc/x"


def test_only_keys_that_name_files_are_quoted():
    assert quote_path("model.hidden=[3,4]") == "model.hidden=[3,4]"
    assert names_file("prior.run")
    assert names_file("data.root")
    assert not names_file("trainer.max_epochs")
    assert not names_file("rerun")


@pytest.mark.parametrize(
    ("text", "key"),
    [("a.b=3", "a.b"), ("++a=x=y", "a"), ("~a", "a"), ("+a.b={c: 1}", "a.b"), ("model=mlp", "model")],
)
def test_key_of_an_override(text, key):
    assert override_key(text) == key


@pytest.mark.parametrize("text", ["mlp", "a b=c", "=3", "model.=3", "--x"])
def test_a_word_that_sets_nothing_is_refused(text):
    with pytest.raises(UsageError, match=f"'{text}' is not an override: write key=value"):
        parse([text])


@pytest.mark.parametrize("text", ["name=a(b", "name='open", "name=[1,2", "seed=a=b"])
def test_a_value_outside_the_grammar_is_refused_with_a_hint_that_works(text):
    with pytest.raises(UsageError, match="quotes of its own") as caught:
        parse([text])
    assert f"'{text}'" in str(caught.value)
    hint = str(caught.value).rpartition(': "')[2].removesuffix('".')
    assert parse([hint])[0].value() == text.partition("=")[2]


def test_a_wrong_call_of_a_function_is_explained():
    with pytest.raises(UsageError, match=r"Cannot read the value in 'seed=choice\(1,null\)': .*NoneType"):
        parse(["seed=choice(1,null)"])


def test_hydra_settings_are_refused():
    with pytest.raises(UsageError, match=r"'hydra.run.dir=x': bdl has no hydra"):
        parse(["hydra.run.dir=x"])


def values(job: list[str]) -> list[tuple[str, object]]:
    return [
        (override.get_key_element(), override.value())
        for override in OverridesParser.create().parse_overrides(job)
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["seed=1,2", "num_members=3"],
        ["data.split=0,1,2", "inference=deep_ensemble,swag"],
        ["seed=range(0,3)", "model.hidden=[50],[50,50]"],
        ["name='a,b','c'", "+model.x=choice(true,x,1e-5)"],
        ["seed=1,2", "seed=7"],
        ["trainer={a: 1},{a: 2}", "~prior=gaussian"],
    ],
)
def test_expansion_equals_hydras_own(words):
    own = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)[0]
    assert [values(job) for job in expand_multirun(words)] == [values(job) for job in own]


def test_the_last_word_runs_fastest():
    assert expand_multirun(["a=1,2", "b=x,y"]) == [
        ["a=1", "b=x"],
        ["a=1", "b=y"],
        ["a=2", "b=x"],
        ["a=2", "b=y"],
    ]


def test_several_paths_are_named_by_choice_only():
    assert len(expand_multirun(["run=a,b"])) == 1
    jobs = expand_multirun(["run=choice('a=1,x', b)"])
    assert [parse(job)[0].value() for job in jobs] == ["a=1,x", "b"]


def test_glob_matches_shipped_and_own_choices(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mlp_small.yaml").write_text("_target_: torch.nn.Linear\n")
    assert expand_multirun(["model=glob(ml*)"], tmp_path) == [["model=mlp"], ["model=mlp_small"]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=interval(0,1)", r"'seed=interval\(0,1\)' is an interval"),
        ("seed=shuffle(1,2,3)", r"'seed=shuffle\(1,2,3\)' is shuffled"),
        ("model=glob(nothing*)", r"'model=glob\(nothing\*\)' matches no value"),
    ],
)
def test_sweeps_without_a_fixed_grid_are_refused(word, message):
    with pytest.raises(UsageError, match=message):
        expand_multirun([word])


# --- sweeps -----------------------------------------------------------------------------------------------------


def test_overrides_with_several_values_are_told_from_the_others():
    words = ["seed=3", "model=mlp,lenet", "data.split=range(0,3)", "num_members=2", "num_members=4"]
    fixed, axes = split_axes(words)
    assert fixed == ["seed=3", "num_members=4"]
    assert axes == [
        Axis("model", "model=mlp,lenet", ("model=mlp", "model=lenet")),
        Axis("data.split", "data.split=range(0,3)", tuple(f"data.split={i}" for i in range(3)), ordered=True),
    ]
    assert first_values(words) == ["seed=3", "model=mlp", "data.split=0", "num_members=4"]


def test_an_interval_keeps_its_kind_of_number_and_its_scale():
    _, (plain, log, whole) = split_axes(
        ["a=interval(0,2)", "b=tag(log,interval(1e-4,1))", "c=tag(log,int(interval(1,64)))"]
    )
    assert (plain.low, plain.high, plain.log, plain.words) == (0.0, 2.0, False, ())
    assert (log.low, log.high, log.log) == (1e-4, 1.0, True)
    assert (whole.low, whole.high, whole.log) == (1, 64, True)
    assert [type(end) for end in (plain.low, whole.low, whole.high)] == [float, int, int]
    assert [one.first for one in (plain, log, whole)] == ["a=0.0", "b=0.0001", "c=1"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a=interval(2,1)", "from a number up to a larger one, got 2.0 to 1.0"),
        ("a=int(interval(1.2,1.7))", "got 1 to 1"),
        ("a=tag(log,interval(-1,1))", "begins above 0, got -1.0 to 1.0"),
        ("a=tag(exp,interval(0,1))", "has the tag exp"),
        ("a=shuffle(range(1,4))", "is shuffled"),
        ("model=glob(zzz*)", "matches no value"),
    ],
)
def test_an_axis_that_means_nothing_is_refused(word, said):
    with pytest.raises(UsageError) as error:
        split_axes([word])
    assert said in str(error.value)
    assert word in str(error.value)


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("slices=[sex, age>65, race×sex]", ["sex", "age>65", "race×sex"]),
        ("slices=['a, b', marital-status==Never married]", ["a, b", "marital-status==Never married"]),
        ('slices=["x>1"]', ["x>1"]),
        ("slices=[]", []),
        ("slices=[race*sex & age in 18..25]", ["race*sex & age in 18..25"]),
    ],
)  # fmt: skip
def test_items_of_a_list_of_expressions_need_no_quotes(given: str, items: list[str]):
    (override,) = parse([given])
    assert [getattr(one, "text", one) for one in override.value()] == items  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]

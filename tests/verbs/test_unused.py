"""Words of the command line that the chosen method has no use for are refused before any work, by every verb."""

from typing import Any

import pytest

from bdl_train.config import compose
from bdl_train.distributed import ray_local
from bdl_train.errors import UsageError
from bdl_train.verbs._unused import refuse_unused, tell_unused


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch):
    def start(resources: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_local, "start", start)


SNAPSHOT = ("inference=snapshot", "inference.num_cycles=4", "inference.num_draws=2", "trainer.max_epochs=4")


@pytest.mark.parametrize(
    "word",
    [
        "scheduler=cosine",
        "scheduler=constant",
        "scheduler.warmup_fraction=0.1",
        "+scheduler.final_factor=0.5",
    ],
)
def test_words_that_set_an_unused_group_are_refused(word: str):
    config = compose("train", SNAPSHOT)
    with pytest.raises(UsageError) as caught:
        refuse_unused(config, [*SNAPSHOT, word])
    said = str(caught.value)
    assert said.startswith(
        f"'{word}' would have no effect: inference=snapshot does not use the group 'scheduler'."
    )
    assert "inference.num_cycles, inference.num_draws" in said


@pytest.mark.parametrize(
    ("method", "word", "group"),
    [
        ("sgld", "optimizer.lr=0.1", "optimizer"),
        ("sghmc", "scheduler=cosine", "scheduler"),
        ("swag", "scheduler=cosine", "scheduler"),
    ],
)
def test_groups_of_an_optimisation_that_is_left_out_are_refused(method: str, word: str, group: str):
    words = [f"inference={method}", word]
    refuse_unused(compose("train", words), words)
    words.append("inference.start_epoch=0")
    with pytest.raises(UsageError) as caught:
        refuse_unused(compose("train", words), words)
    said = str(caught.value)
    assert said.startswith(
        f"'{word}' would have no effect: inference={method} with these settings does not use the group '{group}'."
    )
    assert "inference.start_epoch" in said


def test_swag_from_the_first_epoch_on_still_takes_an_optimizer():
    words = ["inference=swag", "inference.start_epoch=0", "optimizer.lr=0.1"]
    refuse_unused(compose("train", words), words)


@pytest.mark.parametrize("word", ["optimizer.lr=0.1", "optimizer=sgd", "seed=3", "data.name=iris"])
def test_words_that_set_what_the_method_uses_are_taken(word: str):
    refuse_unused(compose("train", [*SNAPSHOT, word]), [*SNAPSHOT, word])


def test_a_method_that_uses_all_groups_takes_them_and_the_log_is_silent(caplog: pytest.LogCaptureFixture):
    words = ["inference=deep_ensemble", "scheduler=cosine", "optimizer.lr=0.1"]
    with caplog.at_level("INFO", logger="bdl_train"):
        refuse_unused(compose("train", words), words)
        tell_unused(compose("train", words))
    assert caplog.text == ""


def test_what_was_not_asked_for_on_the_command_line_is_told(caplog: pytest.LogCaptureFixture):
    config = compose("train", [*SNAPSHOT, "scheduler=cosine"])  # as an experiment file would choose it
    with caplog.at_level("INFO", logger="bdl_train"):
        refuse_unused(config, SNAPSHOT)
        tell_unused(config)
    assert "inference=snapshot does not use scheduler" in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        ("train", "scheduler=cosine"),
        ("train", "-m", "seed=0,1", "scheduler=cosine"),
        ("submit", "scheduler=cosine"),
        ("sweep", "seed=0,1", "scheduler=cosine"),
        ("sweep", "scheduler=cosine,constant"),
        ("sweep", "inference.num_draws=1,2", "scheduler=cosine"),
    ],
    ids=" ".join,
)
def test_every_verb_refuses_it_before_any_work(words: tuple[str, ...], bdl, tmp_path):
    said = bdl(words[0], *SNAPSHOT, *words[1:])
    assert said.status == 2, said.out + said.err
    assert "would have no effect: inference=snapshot does not use the group 'scheduler'" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "runs").exists()


def test_a_sweep_over_methods_of_which_one_does_not_use_the_swept_key_is_refused(bdl, tmp_path):
    axes = ("inference=deep_ensemble,snapshot", "scheduler=cosine,constant")
    said = bdl("sweep", "trainer.max_epochs=12", *axes)
    assert said.status == 2, said.out + said.err
    assert "inference=snapshot does not use the group 'scheduler'" in said.err
    assert not (tmp_path / "runs").exists()


def test_an_experiment_file_that_sets_an_unused_group_trains(bdl, tmp_path):
    folder = tmp_path / "mine"
    (folder / "experiment").mkdir(parents=True)
    lines = [
        "# @package _global_",
        "defaults:",
        "  - override /scheduler: cosine",
        "scheduler:",
        "  final_factor: 0.5",
    ]
    (folder / "experiment" / "cool.yaml").write_text("\n".join(lines))
    tiny = ("num_members=1", "cluster=inline", "cluster.cpus_per_stack=1", "model.hidden=[3]")
    said = bdl("train", f"--config-dir={folder}", "experiment=cool", *SNAPSHOT, *tiny)
    assert said.status == 0, said.out + said.err
    assert "inference=snapshot does not use scheduler" in said.err

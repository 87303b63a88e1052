"""The command: dispatch, help, exit statuses, multiruns, quiet start."""

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import bdl_train.verbs
from bdl_train.build import allowed_packages
from bdl_train.cli import main
from bdl_train.errors import WORSE, Exit

TRAIN = '''"""Train something for the test.

Examples:
  bdl train seed=3
"""

import logging
import os
import warnings

from bdl_train.build import allowed_packages
from bdl_train.errors import Exit, RunFailedError, UsageError

MULTIRUN = True


def act(word):
    if word == "usage":
        raise UsageError(f"the test says no to {word}")
    if word == "failed":
        raise RunFailedError("no usable posterior")
    if word == "crash":
        raise KeyError("unexpected")
    if word == "interrupt":
        raise KeyboardInterrupt
    if word == "pipe":
        raise BrokenPipeError("a socket")
    if word == "warn":
        warnings.warn("library warning")
        logging.getLogger("some.library").warning("library log")
        logging.getLogger("some.library").error("library error")
        logging.getLogger("bdl_train.verbs.train").info("our log")
    return {"partial": Exit.PARTIAL, "stopped": Exit.STOPPED}.get(word, Exit.DONE)


def run(config, options):
    job = (options.multirun_index, len(options.jobs))
    print("ran", config["seed"], config["name"], *job, allowed_packages())
    return act(config["name"])
'''


@pytest.fixture(autouse=True)
def verbs(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """Verbs of this test only, in place of the shipped ones."""
    folder = tmp_path / "verbs"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "runs.py").write_text('"""List something."""\n\n\ndef run(config, options):\n    return 0\n')
    (folder / "_helper.py").write_text("raise RuntimeError('not a verb')\n")
    monkeypatch.setattr(bdl_train.verbs, "__path__", [str(folder)])
    monkeypatch.delenv("BDL_LOG", raising=False)
    monkeypatch.delenv("BDL_ALLOW", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shipped = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("bdl_train.verbs.")
    }
    yield folder
    for name in [name for name in sys.modules if name.startswith("bdl_train.verbs.")]:
        del sys.modules[name]
    sys.modules.update(shipped)


def run_bdl(
    folder: Path, *words: str, after: str = "", stdout=subprocess.PIPE, env: dict[str, str] | None = None
):
    """The command in a process of its own; `after` runs before its end."""
    code = (
        f"import sys, bdl_train.verbs\nbdl_train.verbs.__path__ = [{str(folder)!r}]\n"
        f"from bdl_train.cli import main\nstatus = main()\n{after}\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code, *words]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command, text=True, stdout=stdout, stderr=subprocess.PIPE, check=False, env=environment
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_bdl_alone_lists_the_verbs(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "  train  Train something for the test.\n" in out
    assert "  runs   List something.\n" in out
    assert "_helper" not in out
    for status in ("0 done", "1 failed", "2 wrong usage", "3 done, but", "75 stopped"):
        assert status in out


def test_help_of_a_verb_explains_groups_keys_and_examples(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("bdl train: Train something for the test.\n")
    (model,) = [line for line in out.splitlines() if line.startswith("  model ")]
    assert {"lenet", "*mlp"} <= set(model.split())
    (seed,) = [line for line in out.splitlines() if line.startswith("  seed=0 ")]
    assert "of the whole run" in seed
    assert "data.root=" in out
    assert out.endswith("Examples:\n  bdl train seed=3\n")
    assert "--multirun" in out


def test_help_of_a_verb_without_multirun_does_not_offer_it(capsys):
    assert main(["runs", "--help"]) == 0
    assert "--multirun" not in capsys.readouterr().out


def test_help_shows_own_choices(tmp_path, capsys):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("_target_: torch.nn.Linear\n")
    assert main(["train", "--help", "--config-dir", str(tmp_path / "own")]) == 0
    assert " mine" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bdl_train {bdl_train.__version__}\n"


def test_cfg_prints_the_composed_config(capsys):
    import yaml

    assert main(["train", "--cfg", "job", "model=lenet", "seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 5
    assert shown["model"]["_target_"].startswith("bdl_train.models.lenet.")
    assert main(["train", "--cfg", "job", "-m", "seed=5,6"]) == 0
    assert [one["seed"] for one in yaml.safe_load_all(capsys.readouterr().out)] == [5, 6]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "bdl: Unknown verb 'trian'. Did you mean 'train'? Choose one of: runs, train."),
        (["zzz", "--help"], "bdl: Unknown verb 'zzz'. Choose one of: runs, train."),
        (["_helper"], "bdl: Unknown verb '_helper'."),
        (["train", "--multirn"], "bdl train: Unknown flag '--multirn'. Did you mean '--multirun'?"),
        (
            ["train", "--num_members=3"],
            "bdl train: Unknown flag '--num_members=3'. Did you mean num_members=3?",
        ),
        (
            ["train", "--data.batch-size=3"],
            "bdl train: Unknown flag '--data.batch-size=3'. Did you mean data.batch_size=3?",
        ),
        (["train", "--seed", "=3"], "bdl train: Unknown flag '--seed'. Did you mean seed=3?"),
        (["train", "--seed", "=", "3"], "bdl train: Unknown flag '--seed'. Did you mean seed=3?"),
        (["train", "--cfg", "hydra"], "bdl train: argument --cfg: invalid choice: 'hydra'"),
        (["train", "--config-dir"], "bdl train: argument --config-dir"),
        (
            ["train", "--config-dir", "/no/where"],
            "bdl train: --config-dir is '/no/where', which is not a folder.",
        ),
        (["train", "seeed=3"], "bdl train: Unknown key 'seeed' (from 'seeed=3'). Did you mean 'seed'?"),
        (["train", "model=mpl"], "bdl train: Unknown model 'mpl'. Did you mean 'mlp'?"),
        (["train", "mlp"], "bdl train: 'mlp' is not an override"),
        (["train", "name=a(b"], "bdl train: Cannot read the value in 'name=a(b'"),
        (["train", "allow=os"], "bdl train: allow must be a list of packages, allow=[package], got 'os'."),
        (["train", "allow=[3]"], "bdl train: allow must be a list of packages, allow=[package], got [3]."),
        (["train", "allow=['a b']"], "bdl train: allow must list packages, such as my_package, got 'a b'."),
        (["train", "name=usage"], "bdl train: the test says no to usage"),
        (["runs", "-m", "limit=1,2"], "bdl runs: -m is not for this verb"),
        (
            ["-sc", "install=fish"],
            "bdl: -sc takes install=bash, uninstall=bash or query=bash, got 'install=fish'.",
        ),
    ],
)
def test_wrong_usage_is_one_message_and_status_2(words, said, capsys):
    assert main(words) == 2
    caught = capsys.readouterr()
    assert caught.err.startswith(said)
    assert caught.err.count("\n") == 1
    assert "Traceback" not in caught.err


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("fine", 0, ""),
        ("partial", 3, ""),
        ("stopped", 75, ""),
        ("failed", 1, "bdl train: no usable posterior\n"),
        ("interrupt", 75, "bdl train: interrupted.\n"),
    ],
)
def test_exit_statuses_without_a_traceback(name, status, said, capsys):
    assert main(["train", f"name={name}"]) == status
    assert capsys.readouterr().err == said


def test_unexpected_errors_keep_their_traceback(capsys):
    assert main(["train", "name=crash"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("KeyError: 'unexpected'\n")


def test_a_verb_that_returns_nothing_is_a_fault(verbs, capsys):
    (verbs / "runs.py").write_text('"""Forget the status."""\n\n\ndef run(config, options):\n    pass\n')
    assert main(["runs"]) == 1
    assert "None is not a valid Exit" in capsys.readouterr().err


def test_allowed_packages_hold_for_the_verb_only(capsys):
    assert main(["train", "allow=[my_package,other.part]"]) == 0
    assert capsys.readouterr().out == "ran 0 None 0 1 ('my_package', 'other.part')\n"
    assert allowed_packages() == ()


@pytest.mark.parametrize(("words", "env"), [([], ""), (["allow=[mine]"], ""), ([], "mine")])
def test_an_allowed_package_may_lie_in_the_current_folder(words, env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setenv("BDL_ALLOW", env)
    before = list(sys.path)
    assert main(["train", *words]) == main(["train", *words]) == 0
    assert sys.path == ([*before, str(tmp_path)] if words or env else before)


def test_multirun_runs_every_job_in_order(capsys):
    assert main(["train", "-m", "seed=4,5", "name=a,b"]) == 0
    caught = capsys.readouterr()
    assert caught.out.splitlines() == ["ran 4 a 0 4 ()", "ran 4 b 1 4 ()", "ran 5 a 2 4 ()", "ran 5 b 3 4 ()"]
    assert "bdl train [2/4] seed=4 name=b" in caught.err.splitlines()


@pytest.mark.parametrize(
    ("names", "status", "num_run"),
    [
        ("partial,fine", 3, 2),
        ("failed,partial", 1, 2),
        ("crash,usage,failed", 2, 3),
        ("usage,fine,stopped,fine", 75, 3),
        ("interrupt,fine", 75, 1),
    ],
)
def test_the_worst_status_of_a_multirun_wins(names, status, num_run, capsys):
    assert main(["train", "-m", f"name={names}"]) == status
    caught = capsys.readouterr()
    assert caught.out.count("ran ") == num_run
    if "usage" in names:
        assert "name=usage: the test says no to usage" in caught.err


def test_the_order_of_statuses_names_each_once():
    assert sorted(WORSE) == sorted(Exit)


def test_no_job_starts_when_one_cannot_be_composed(capsys):
    assert main(["train", "-m", "model=mlp,mpl"]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "Unknown model 'mpl'" in caught.err


def test_a_verb_may_run_all_jobs_itself(verbs, capsys):
    with (verbs / "train.py").open("a") as file:
        file.write(
            "\n\ndef run_many(configs, options):\n"
            "    seeds = [config['seed'] for config in configs]\n"
            "    print(seeds, options.jobs, options.overrides, allowed_packages())\n"
            "    return Exit.PARTIAL\n"
        )
    assert main(["train", "-m", "seed=1,2", "allow=[a]"]) == 3
    printed = "[1, 2] (('seed=1', 'allow=[a]'), ('seed=2', 'allow=[a]')) ('seed=1,2', 'allow=[a]') ('a',)\n"
    assert capsys.readouterr().out == printed
    assert main(["train", "seed=1"]) == 0
    assert capsys.readouterr().out.startswith("ran 1 ")


def test_libraries_are_quiet_and_our_lines_plain(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["train", "name=warn"]) == 0
    assert capsys.readouterr().err == "library error\nour log\n"


def test_the_environment_sets_the_level(monkeypatch, capsys):
    monkeypatch.setenv("BDL_LOG", "warning")
    assert main(["train", "name=warn"]) == 0
    assert capsys.readouterr().err == "library error\n"
    monkeypatch.setenv("BDL_LOG", "debug")
    with pytest.warns(UserWarning, match="library warning"):
        assert main(["train", "name=warn"]) == 0
    assert "library log\n" in capsys.readouterr().err
    monkeypatch.setenv("BDL_LOG", "loud")
    assert main(["train"]) == 2
    assert "BDL_LOG is 'LOUD', expected one of: DEBUG, INFO" in capsys.readouterr().err


def test_logging_is_left_as_it_was():
    before = (list(logging.getLogger().handlers), logging.getLogger("bdl_train").level)
    main(["train", "name=warn"])
    assert (list(logging.getLogger().handlers), logging.getLogger("bdl_train").level) == before


HEAVY = {"torch", "ray", "pytorch_lightning", "wandb", "pandas", "sklearn", "pydantic", "numpy"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--help"], ""),
        (["train", "--help"], ""),
        (["train", "--cfg", "job"], ""),
        (["train", "nosuch=1"], ""),
        (["-sc", "query=bash"], "bdl train model=ml"),
    ],
)
def test_short_answers_import_nothing_heavy(verbs, words, line):
    after = f"print({HEAVY} & set(sys.modules), file=sys.stderr)"
    done = run_bdl(verbs, *words, after=after, env={"COMP_LINE": line})
    assert done.stderr.splitlines()[-1] == "set()"
    assert line == "" or done.stdout == "model=mlp\n"


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_a_closed_pipe_is_silent(verbs, closed_pipe):
    done = run_bdl(verbs, "--help", stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_closed_while_a_verb_prints_is_silent(verbs, closed_pipe, unbuffered):
    source = '"""Print."""\n\n\ndef run(config, options):\n    while True:\n        print("line" * 1000)\n'
    (verbs / "runs.py").write_text(source)
    done = run_bdl(verbs, "runs", stdout=closed_pipe, env={"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (1, "")


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert main(["train", "name=pipe"]) == 1
    assert "BrokenPipeError: a socket" in sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]

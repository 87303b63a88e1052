"""Completion in bash, asked through bash itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bdl_train.completion import answer, complete
from bdl_train.errors import UsageError


@pytest.fixture(autouse=True)
def verbs(tmp_path, monkeypatch):
    folder = tmp_path / "verbs"
    folder.mkdir()
    for name in ("train", "predict"):
        (folder / f"{name}.py").write_text(f'"""Do {name}."""\n')
    monkeypatch.setattr("bdl_train.verbs.__path__", [str(folder)])
    return folder


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("bdl ", ["predict ", "train "]),
        ("bdl tr", ["train "]),
        ("bdl train mod", ["model=", "model."]),
        ("bdl train model=ml", ["model=mlp"]),
        ("bdl train seed=3 trainer.max_e", ["trainer.max_epochs="]),
        ("bdl train model=lenet model.dr", ["model.dropout="]),
        ("bdl train output_dir=a=(b model=ml", ["model=mlp"]),
        ("bdl train -m model=ml", ["model=mlp"]),
        ("bdl train +model=ml", ["+model=mlp"]),
        ("bdl train --c", ["--cfg job", "--config-dir "]),
    ],
)
def test_words_are_completed(line, some):
    assert sorted(complete(line)) == sorted(some)


@pytest.mark.parametrize(
    "line", ["bdl train run=/t", "bdl nosuch ", "bdl train hydra", "bdl train name=a( mod", "bdl predict mod"]
)
def test_nothing_to_offer(line):
    assert complete(line) == []


def test_own_choices_are_offered(tmp_path):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mlp_own.yaml").write_text("_target_: torch.nn.Linear\n")
    assert complete(f"bdl train --config-dir {tmp_path}/own model=mlp_") == ["model=mlp_own"]
    assert complete(f"bdl train --config-dir={tmp_path}/own model=mlp_") == ["model=mlp_own"]


def test_unknown_requests_are_refused():
    with pytest.raises(UsageError, match="got 'install=fish'"):
        answer("install=fish")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize("breaks", [" =:", " "])
def test_bash_receives_the_replies(tmp_path: Path, verbs, breaks):
    command = tmp_path / "bdl"
    command.write_text(
        f"#!{sys.executable}\nimport sys, bdl_train.verbs\nbdl_train.verbs.__path__ = [{str(verbs)!r}]\n"
        "from bdl_train.cli import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    script = f"""
eval "$(bdl -sc install=bash)"
COMP_WORDBREAKS={breaks!r}
for COMP_LINE in "bdl tr" "bdl train model=ml" "bdl train trainer.max_e"; do
    COMP_POINT=${{#COMP_LINE}}
    _bdl_complete bdl
    printf '<%s>' "${{COMPREPLY[@]}}"
done
complete -p bdl >&2
eval "$(bdl -sc uninstall=bash)"
! complete -p bdl 2>/dev/null
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    choice = "mlp" if "=" in breaks else "model=mlp"
    assert done.stdout == f"<train ><{choice}><trainer.max_epochs=>"
    assert "-F _bdl_complete bdl" in done.stderr

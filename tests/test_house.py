"""The house keeps its order: a test for every module, one name for one idea, nothing of one machine in the files."""

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from bdl_train.config import compose, expand_multirun
from bdl_train.manual import verb_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bdl_train"

# Config group to the package of its choices. An optimizer is a class of torch, an experiment sets keys of others.
GROUPS = {
    "data": "data",
    "model": "models",
    "likelihood": "likelihoods",
    "prior": "priors",
    "inference": "inference",
    "scheduler": "schedulers",
    "tracking": "tracking",
    "cluster": "distributed",
}
FOREIGN_GROUPS = {
    "optimizer": "torch.optim.",
    "trainer": "bdl_train.training.settings.",
    "budget": "bdl_train.distributed.budget.",
    "experiment": "",
    "analysis": "",
}

# Modules without a test file of their name, and the file that tests them.
TESTED_BY = {
    "errors": "test_cli.py",
    "evaluation/compare": "verbs/test_evaluate_runs_compare.py",
    "evaluation/predictions": "verbs/test_predict.py",
    "evaluation/asked": "evaluation/test_chapters.py",
    "evaluation/case": "evaluation/test_chapters.py",
    "evaluation/rows": "evaluation/test_metrics.py",
    "evaluation/uncertainty": "evaluation/test_calibration.py",
    "evaluation/data_summary": "evaluation/test_calibration.py",
    "posteriors/atoms": "posteriors/test_member_posteriors.py",
    "posteriors/ensemble": "posteriors/test_member_posteriors.py",
    "posteriors/low_rank_gaussian": "posteriors/test_member_posteriors.py",
    "predictive/predict": "predictive/test_predictor.py",
    "manual": "test_cli.py",
    "training/prepared": "training/test_train_stack.py",
    "verbs/submit": "distributed/test_slurm.py",
    "distributed/ray_address": "distributed/test_ray_cluster.py",
    "distributed/shared_folder": "distributed/test_ray_cluster.py",
    "schema": "test_config.py",
    "schedulers/constant": "schedulers/test_every_schedule.py",
}


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", *patterns], cwd=ROOT, text=True, capture_output=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def choices() -> list[tuple[str, str, str]]:
    """(group, choice, its `_target_`) of every config file of a group."""
    found = []
    for path in sorted((ROOT / "conf").glob("*/*.yaml")):
        target = (yaml.safe_load(path.read_text()) or {}).get("_target_", "")
        found.append((path.parent.name, path.stem, target))
    return found


# --- one idea: one module, one config, one test, one name ---------------------------------------------------------


def has_own_test(module: str) -> bool:
    """Whether `tests/` holds `test_<module>.py` at the module's place, words around the name allowed."""
    folder, _, stem = f"tests/{module}".rpartition("/")
    names = [path.stem for path in (ROOT / folder).glob("test_*.py")]
    return any(re.fullmatch(rf"test_(\w+_)?{stem}(_\w+)?", name) for name in names)


def public_modules() -> list[str]:
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return sorted(path.as_posix() for path in paths if not path.name.startswith("_"))


def test_every_module_has_a_test_file_of_its_name():
    assert [one for one in public_modules() if not has_own_test(one) and one not in TESTED_BY] == []


def test_exceptions_to_the_rule_are_real():
    assert set(TESTED_BY) <= set(public_modules())
    assert [module for module in TESTED_BY if has_own_test(module)] == []
    assert [file for file in TESTED_BY.values() if not (ROOT / "tests" / file).is_file()] == []


def test_every_config_group_belongs_to_a_package():
    assert {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"__pycache__"} == {
        *GROUPS,
        *FOREIGN_GROUPS,
    }


@pytest.mark.parametrize(("group", "choice", "target"), choices())
def test_a_choice_names_a_class_in_the_module_of_its_name(group: str, choice: str, target: str):
    if group in FOREIGN_GROUPS:
        assert target.startswith(FOREIGN_GROUPS[group])
    elif target == "???":  # the user names the class
        return
    else:
        assert target.startswith(f"bdl_train.{GROUPS[group]}.{choice}.")
    if target:
        module, _, name = target.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type)


def compared_texts(tree: ast.AST) -> set[str]:
    """Texts that a value is compared with: in `==`, `!=`, `in`, or a `case`."""
    operands: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands.append(node.value)
    operands += [
        item for one in operands if isinstance(one, ast.Tuple | ast.List | ast.Set) for item in one.elts
    ]
    return {one.value for one in operands if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def test_no_code_compares_with_the_name_of_a_choice():
    # A seam is in the wrong place when adding a choice means adding a branch.
    chain = "if name == 'swag': pass\nmatch name:\n  case 'sgd': pass\nname in ('mlp', row['step'])"
    assert compared_texts(ast.parse(chain)) == {"swag", "sgd", "mlp"}
    names = {choice for group, choice, _ in choices() if group not in ("tracking", "trainer", "cluster")}
    sources = {path: compared_texts(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert {str(path): texts & names for path, texts in sources.items() if texts & names} == {}


# --- files for everybody ------------------------------------------------------------------------------------------


def forbidden() -> dict[str, re.Pattern[str]]:
    # Put together here, so that this file does not hold them itself.
    later = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX"))
    return {
        "a path of one machine": re.compile(r"(?<![\w.*}])/(?:work|root|home|opt)/"),
        "the name of a folder outside the checkout": re.compile(
            r"\bshared" + r"/(?:data|recipes|hooks|\w+\.md)\b"
        ),
        "work put off": re.compile(rf"\b(?:{later})\b"),
        "a note to a tool": re.compile("type" + r": ignore(?!\[)|noq" + r"a(?!: ?[A-Z])"),
    }


@pytest.mark.parametrize("what", forbidden())
def test_no_tracked_file_holds(what: str):
    pattern, found = forbidden()[what], []
    for path in tracked():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{i}: {line}" for i, line in enumerate(lines, 1) if pattern.search(line)
        ]
    assert found == []


def test_no_large_or_generated_file_is_tracked():
    assert [str(path) for path in tracked() if path.stat().st_size > 1_000_000] == []
    generated = r"\.(pyc|whl|ckpt|safetensors|parquet|egg-info)$|^(runs|wandb|multirun|lightning_logs)/"
    names = [path.relative_to(ROOT).as_posix() for path in tracked()]
    assert [name for name in names if re.search(generated, name)] == []


# --- the README ---------------------------------------------------------------------------------------------------


def readme_commands(program: str) -> list[list[str]]:
    """The words after `program` in every command of a code block or between backticks."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, re.M | re.S)
    lines = [*"".join(blocks).splitlines(), *re.findall(r"`([^`\n]+)`", text)]
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"[\w./]+(?: |$)", line)]
    return [one[1:] for one in words if one[0].rpartition("/")[2] == program]


def test_make_targets_in_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for words in readme_commands("make") for word in words if "=" not in word}
    assert {"train", "test"} <= named <= targets


def test_bdl_commands_in_the_readme_compose():
    commands = [words for words in readme_commands("bdl") if words and not words[0].startswith("-")]
    assert {"train", "evaluate", "predict"} <= {verb for verb, *_ in commands}
    assert {verb for verb, *_ in commands} <= set(verb_names())
    for verb, *words in commands:
        overrides = [word for word in words if not word.startswith("-")]
        jobs = expand_multirun(overrides) if {"-m", "--multirun"} & set(words) else [overrides]
        for job in filter(None, jobs):  # a bare verb is a mention
            compose(verb, job)

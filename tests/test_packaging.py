"""What an installed package holds, what importing it costs, and that the tested versions fit together."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = {
    canonicalize_name(one.name): one
    for one in map(
        Requirement, PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    )
}


def run(*words: Any, cwd: Path, **env: str) -> str:
    """Output of a command; it must succeed."""
    command = [str(word) for word in words]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- contents ---------------------------------------------------------------------------------------------------


def test_every_package_folder_is_listed():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "bdl_train").rglob("*.py")}
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders |= {Path("bdl_train/conf"), *(Path("bdl_train/conf", group) for group in groups)}
    folders |= {Path("bdl_train/slurm")}
    assert PROJECT["tool"]["setuptools"]["packages"] == sorted(".".join(folder.parts) for folder in folders)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built from a copy: what an earlier build left in `build/` would slip in."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("bdl_train", "conf", "slurm"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=copy)
    (file,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_module_and_every_config_and_nothing_else(wheel: zipfile.ZipFile):
    modules = {path.relative_to(ROOT) for path in (ROOT / "bdl_train").rglob("*.py")}
    configs = {"bdl_train" / path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")}
    expected = {path.as_posix() for path in modules | configs}
    expected |= {"bdl_train/py.typed", "bdl_train/conf/__init__.py", "bdl_train/slurm/__init__.py"}
    expected |= {f"bdl_train/slurm/{path.name}" for path in (ROOT / "slurm").glob("*.sbatch")}
    expected |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("bdl_train/**/static/*")}
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == expected
    assert len(configs) > 30


def test_the_wheel_carries_the_licence_the_readme_and_the_command(wheel: zipfile.ZipFile):
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert (ROOT / "README.md").read_text() in wheel.read(f"{info}/METADATA").decode()
    assert "bdl = bdl_train.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_a_wheel_finds_its_configs_from_a_folder_with_blanks(wheel: zipfile.ZipFile, tmp_path: Path):
    home, elsewhere = tmp_path / "site of = mine", tmp_path / "another folder"
    wheel.extractall(home)
    elsewhere.mkdir()
    code = (
        "import sys; from bdl_train import cli, schema\n"
        "print(schema.shipped(), flush=True); sys.exit(cli.main())"
    )
    words = (sys.executable, "-c", code, "train", "--cfg", "job")
    shipped, _, shown = run(*words, cwd=elsewhere, PYTHONPATH=str(home)).partition("\n")
    assert Path(shipped) == home / "bdl_train" / "conf"
    assert yaml.safe_load(shown)["data"]["name"] == "breast_cancer"


def test_the_command_of_this_install_finds_its_configs_from_a_folder_with_blanks(tmp_path: Path):
    elsewhere = tmp_path / "another folder"
    elsewhere.mkdir()
    bdl = Path(sysconfig.get_path("scripts")) / "bdl"
    assert yaml.safe_load(run(bdl, "train", "--cfg", "job", cwd=elsewhere))["num_members"] == 8
    assert list(elsewhere.iterdir()) == []


# --- imports ----------------------------------------------------------------------------------------------------


def test_importing_the_package_takes_the_standard_library_only(tmp_path: Path):
    code = (
        "import sys, json; before = set(sys.modules); import bdl_train\n"
        "print(json.dumps([name.partition('.')[0] for name in set(sys.modules) - before]))"
    )
    loaded = set(json.loads(run(sys.executable, "-c", code, cwd=tmp_path)))
    assert loaded - set(sys.stdlib_module_names) == {"bdl_train"}


LOWER = (
    "training",
    "predictive",
    "inference",
    "posteriors",
    "data",
    "models",
    "likelihoods",
    "priors",
    "schedulers",
)
WITHOUT = """
import importlib.metadata, pkgutil, sys

MISSING = {"ray", "hydra", "omegaconf", "wandb"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def from_name(name, real=importlib.metadata.Distribution.from_name):
    if name.partition("-")[0] in MISSING:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

sys.meta_path.insert(0, Missing())
importlib.metadata.Distribution.from_name = from_name
import bdl_train
for room in sys.argv[1:]:
    package = importlib.import_module(f"bdl_train.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_training_and_all_below_it_import_without_ray_hydra_or_wandb(tmp_path: Path):
    imported = run(sys.executable, "-c", WITHOUT, *LOWER, cwd=tmp_path).split()
    files = [path for room in LOWER for path in (ROOT / "bdl_train" / room).glob("*.py")]
    expected = {f"bdl_train.{path.parent.name}.{path.stem}" for path in files if path.stem != "__init__"}
    assert set(imported) == expected
    assert "bdl_train.training.train_stack" in expected


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_every_import_is_a_declared_dependency():
    used = set().union(*(_imports(path) for path in (ROOT / "bdl_train").rglob("*.py")))
    provided = packages_distributions()
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [*PROJECT["project"]["dependencies"], *extras["sweep"], *extras["attacks"]]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    foreign = used - set(sys.stdlib_module_names) - {"bdl_train"}
    assert "torch" in foreign
    undeclared = {
        name for name in foreign if not declared & {canonicalize_name(one) for one in provided.get(name, [])}
    }
    assert undeclared == set()


# --- versions ---------------------------------------------------------------------------------------------------


def test_the_tested_versions_lie_in_the_declared_ranges():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    # No path, no host, no local version.
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    versions = dict(pin.split("==") for pin in pins)
    assert len(versions) == len(pins)
    assert list(versions) == sorted(versions)
    outside = {name for name, one in REQUIREMENTS.items() if not one.specifier.contains(versions[name])}
    assert outside == set()

"""The allow-list under attack, and the messages of wrong types, ranges and names."""

import threading
from abc import ABC
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from bdl_train.build import allowed_packages, allowing, build, resolve, settings_of
from bdl_train.errors import UsageError
from bdl_train.priors import Prior

ATTACKS = [
    "torch.load",
    "torch.hub.load",
    "torch.compile",
    "os.system",
    "posix.system",
    "builtins.open",
    "builtins.eval",
    "pandas.read_pickle",
    "numpy.load",
    "subprocess.Popen",
    "pathlib.Path",
    "multiprocessing.Process",
    "bdl_train_evil.X",
    "bdl_train",
    "torch.nn",
    "torch.nnx.Linear",
    "torch.optimizer.Adam",
    "tests.test_build.Plain",
    "",
    ".os.system",
    None,
    3,
]
SMUGGLED = [
    "bdl_train.build.importlib",
    "bdl_train.build.os",
    "bdl_train.build.os.system",
    "bdl_train.build.build",
    "bdl_train.build.Any",
    "bdl_train.errors.difflib.SequenceMatcher",
    "torch.nn.modules.module.functools.partial",
    "torch.nn.modules.module.OrderedDict",
    "torch.nn.init.xavier_uniform_",
    "torch.nn.functional.relu",
    "torch.nn.utils.clip_grad_norm_",
    "torch.nn.",
    "torch.nn..Linear",
    "torch.nn.NoSuchLayer",
    "torch.nn.no_such_module.X",
    "pytorch_lightning.Trainer",
]


@pytest.fixture(autouse=True)
def no_packages_from_outside(monkeypatch):
    monkeypatch.delenv("BDL_ALLOW", raising=False)


@pytest.mark.parametrize("target", ATTACKS)
def test_targets_outside_the_list_are_refused_before_any_import(target, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(
        UsageError, match=r"model\._target_ is '.*', which is outside the allowed packages"
    ) as caught:
        build({"_target_": target}, object, key="model")
    assert f"'{target}'" in str(caught.value)


@pytest.mark.parametrize("target", SMUGGLED)
def test_targets_inside_the_list_must_be_classes_of_the_group(target):
    with pytest.raises(UsageError, match=r"model\._target_ is"):
        build({"_target_": target}, nn.Module, key="model")


@pytest.mark.parametrize(
    "target", ["torch.nn.modules.module.OrderedDict", "bdl_train.build.Mapping", "torch.nn.Any"]
)
def test_a_re_exported_foreign_class_is_refused_even_without_a_base(target):
    with pytest.raises(UsageError, match=r"model\._target_ is"):
        resolve(target, object, key="model")


def test_a_class_of_another_group_is_refused():
    with pytest.raises(
        UsageError, match=r"expected a class that derives from torch\.optim\.optimizer\.Optimizer"
    ):
        resolve("torch.nn.Linear", Optimizer, key="optimizer")


def test_an_abstract_class_is_refused():
    with pytest.raises(UsageError, match=r"'bdl_train\.priors\.Prior', an abstract class"):
        resolve("bdl_train.priors.Prior", Prior, key="prior")


@pytest.mark.parametrize(
    "inner",
    [
        {"_target_": "os.system", "command": "false"},
        {"_target_": "pytorch_lightning.Trainer"},
        {"_target_": "torch.optim.SGD"},
        [{"_target_": "subprocess.Popen"}],
        {"deep": [{"er": {"_target_": "torch.load"}}]},
        {"_target_": "torch.nn.Identity", "x": {"_target_": "builtins.open"}},
    ],
)
@pytest.mark.parametrize("place", ["_args_", "named"])
def test_nested_targets_are_checked_before_anything_is_constructed(inner, place, monkeypatch):
    monkeypatch.setattr(nn.Identity, "__init__", lambda *a, **k: pytest.fail("constructed"))
    first = {"_target_": "torch.nn.Identity"}
    node = {"_args_": [first, inner]} if place == "_args_" else {"first": first, "second": inner}
    with pytest.raises(UsageError, match=r"model\.(_args_\[1\]|second).*_target_ is '"):
        build({"_target_": "torch.nn.Sequential", **node}, nn.Module, key="model")


def test_nested_networks_are_built():
    linear = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    net = build(
        {"_target_": "torch.nn.Sequential", "_args_": [linear, {"_target_": "torch.nn.ReLU"}]},
        nn.Module,
        key="m",
    )
    assert [type(layer) for layer in net.children()] == [nn.Linear, nn.ReLU]


def test_positional_arguments_must_be_a_list():
    with pytest.raises(UsageError, match=r"model\._args_ must be a list of positional arguments, got 3"):
        build({"_target_": "torch.nn.Sequential", "_args_": 3}, nn.Module, key="model")


@pytest.mark.parametrize("node", [None, "mlp", {"hidden": [3]}, []])
def test_a_node_needs_a_target(node):
    with pytest.raises(UsageError, match="model must be a mapping with a '_target_'"):
        build(node, nn.Module, key="model")


# --- packages that the user adds


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "bdl_users_own.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "class Net(nn.Module):\n    def __init__(self, scaler=None):\n"
        "        super().__init__()\n        self.scaler = scaler\n"
        "class Scaler:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "bdl_users_own"


def test_allowing_opens_a_package_within_the_block_only(package):
    node = {"_target_": f"{package}.Net", "scaler": {"_target_": f"{package}.Scaler"}}
    with allowing([package]):
        net = build(node, nn.Module, key="model")
        assert type(net.scaler).__name__ == "Scaler"
        with pytest.raises(UsageError, match="outside the allowed packages"):
            resolve(f"{package}x.Net", nn.Module, key="model")
        with pytest.raises(UsageError, match="lives in 'collections'"):
            resolve(f"{package}.OrderedDict", object, key="model")
        with pytest.raises(UsageError, match=r"derives from torch\.nn\.modules\.module\.Module"):
            resolve(f"{package}.Scaler", nn.Module, key="model")
    with pytest.raises(UsageError, match=r"add it on the command line: allow=\[package\]"):
        build(node, nn.Module, key="model")


def test_the_environment_opens_packages(package, monkeypatch):
    monkeypatch.setenv("BDL_ALLOW", f"other_package, {package}.")
    assert allowed_packages() == ("other_package", package)
    assert resolve(f"{package}.Net", nn.Module, key="model").__name__ == "Net"


def test_a_stored_config_cannot_open_packages(package):
    node = {"_target_": f"{package}.Net", "allow": [package], "_allow_": [package]}
    with pytest.raises(UsageError, match="outside the allowed packages"):
        build(node, nn.Module, key="model")
    assert allowed_packages() == ()


def test_allowing_nests_and_is_undone_after_an_error():
    with allowing(["a"]), allowing(["b.c"]):
        assert allowed_packages() == ("a", "b.c")
    with pytest.raises(KeyError), allowing(["a"]):
        raise KeyError
    assert allowed_packages() == ()


def test_other_threads_are_not_opened():
    seen: list[Any] = []
    with allowing(["a"]):
        thread = threading.Thread(target=lambda: seen.append(allowed_packages()))
        thread.start()
        thread.join()
    assert seen == [()]


@pytest.mark.parametrize("name", ["", ".", "a b", "a/b", "*", "os;x"])
def test_only_package_names_can_be_allowed(name, monkeypatch):
    with pytest.raises(UsageError, match="allow must list packages"), allowing([name]):
        pass
    if name:
        monkeypatch.setenv("BDL_ALLOW", name)
        with pytest.raises(UsageError, match="BDL_ALLOW must list packages"):
            allowed_packages()


# --- settings of dataclasses


class Norm(StrEnum):
    BATCH = "batch"
    GROUP = "group"


class Thing(ABC):  # noqa: B024
    pass


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Plain:
    width: Annotated[int, Field(ge=1)]
    scale: Annotated[float, Field(gt=0)]
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = ()
    rank: Annotated[int, Field(ge=2)] | None = None
    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    flag: bool = False
    activation: Literal["relu", "tanh"] = "relu"
    norm: Norm = Norm.GROUP
    inner: Inner | None = None
    thing: Thing | None = None
    patterns: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.width == 13:
            raise ValueError("width must not be 13, got 13")


def plain(**settings: Any) -> Plain:
    return settings_of(Plain, {"width": 1, "scale": 1.0, **settings}, key="model")


def test_values_of_the_right_kind_arrive():
    made = plain(
        hidden=[3, 4],
        scale=2,
        rank=5.0,
        batch=8,
        flag=True,
        norm="batch",
        inner={"rate": 0},
        patterns={"*": 1},
    )
    assert made == Plain(
        width=1, scale=2.0, hidden=(3, 4), rank=5, batch=8, flag=True, norm=Norm.BATCH, inner=Inner(rate=0.0),
        patterns={"*": 1.0},
    )  # fmt: skip
    assert isinstance(made.scale, float)
    assert isinstance(made.rank, int)


def test_objects_of_the_program_arrive_as_they_are():
    thing = Thing()
    assert settings_of(Plain, {"width": 1, "scale": 1}, key="model", thing=thing).thing is thing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, r"model\.width: input should be greater than or equal to 1, got 0\."),
        ({"width": 2.5}, r"model\.width: .*integer.*, got 2\.5\."),
        ({"width": True}, r"model\.width: input should be a valid integer, got True\."),
        ({"width": "3"}, r"model\.width: input should be a valid integer, got '3'\."),
        ({"width": None}, r"model\.width: .*integer, got None\."),
        ({"width": [1]}, r"model\.width: .*integer, got \[1\]\."),
        ({"scale": -1}, r"model\.scale: input should be greater than 0, got -1\."),
        ({"scale": True}, r"model\.scale: input should be a valid number, got True\."),
        ({"scale": "0.5"}, r"model\.scale: input should be a valid number, got '0\.5'\."),
        ({"scale": "wide"}, r"model\.scale: .*number.*, got 'wide'\."),
        ({"scale": float("nan")}, r"model\.scale: .*finite.*, got nan"),
        ({"scale": float("inf")}, r"model\.scale: .*finite.*, got inf"),
        ({"flag": 1}, r"model\.flag: input should be a valid boolean, true or false, got 1\."),
        ({"flag": "true"}, r"model\.flag: .*boolean.*, got 'true'\."),
        ({"hidden": [3, 0]}, r"model\.hidden\[1\]: .*greater than or equal to 1, got 0\."),
        ({"hidden": [3, True]}, r"model\.hidden\[1\]: .*integer, got True\."),
        ({"hidden": 50}, r"model\.hidden: .*tuple, got 50\."),
        ({"hidden": "50"}, r"model\.hidden: .*tuple, got '50'\."),
        ({"rank": 1}, r"model\.rank: .*greater than or equal to 2, got 1\."),
        ({"rank": False}, r"model\.rank: .*got False\."),
        ({"batch": "all"}, r"^model\.batch: .*integer.* or input should be 'auto', got 'all'\.$"),
        (
            {"activation": "rellu"},
            r"model\.activation: .*'relu' or 'tanh', got 'rellu'\. Did you mean 'relu'\?",
        ),
        ({"norm": "layer"}, r"model\.norm: input should be 'batch' or 'group', got 'layer'\."),
        ({"inner": {"rate": 1.0}}, r"model\.inner\.rate: .*less than 1, got 1\.0\."),
        ({"inner": {"rate": "0"}}, r"model\.inner\.rate: .*number, got '0'\."),
        ({"inner": {}}, r"model\.inner\.rate: is missing: give it a value"),
        ({"inner": {"rate": 0, "rat": 1}}, r"model\.inner\.rat: unknown key, got 1\."),
        ({"patterns": {"a": "1"}}, r"model\.patterns\.a: .*number, got '1'\."),
        ({"thing": {"_target_": "os.system"}}, r"model\.thing: .*instance of Thing"),
        ({"width": 13}, r"model: width must not be 13, got 13"),
        (
            {"hiden": [3]},
            r"Unknown key 'model\.hiden'\. Did you mean 'hidden'\? Plain has: width, scale, hidden",
        ),
    ],
)
def test_wrong_settings_name_the_key_and_the_value(settings, message):
    with pytest.raises(UsageError, match=message):
        plain(**settings)


def test_every_fault_has_its_line():
    with pytest.raises(UsageError) as caught:
        settings_of(Plain, {"width": 0, "hidden": [0, 0]}, key="model")
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "model.width", "model.scale", "model.hidden[0]", "model.hidden[1]",
    ]  # fmt: skip


def test_root_keys_have_no_prefix():
    with pytest.raises(UsageError, match=r"^width: .*got 0\."):
        settings_of(Plain, {"width": 0, "scale": 1}, key="")
    with pytest.raises(UsageError, match=r"^Unknown key 'widht'\. Did you mean 'width'"):
        settings_of(Plain, {"widht": 0, "scale": 1}, key="")


def test_the_config_cannot_set_what_the_program_gives():
    with pytest.raises(UsageError, match=r"Unknown key 'model\.thing'"):
        settings_of(Plain, {"width": 1, "scale": 1, "thing": None}, key="model", thing=Thing())


def test_shipped_dataclasses_are_checked_through_build():
    node = {"_target_": "bdl_train.priors.gaussian.Gaussian", "scale": -1.0, "fan_in": False}
    with pytest.raises(UsageError, match=r"prior\.scale: .*greater than 0, got -1\.0"):
        build(node, Prior, key="prior")


# --- settings of other classes


def test_arguments_of_other_classes_are_named():
    parameters = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(UsageError, match=r"Unknown key 'optimizer\.momentun'\. Did you mean 'momentum'\?"):
        build(
            {"_target_": "torch.optim.SGD", "lr": 0.1, "momentun": 0.9},
            Optimizer,
            key="optimizer",
            params=parameters,
        )
    with pytest.raises(UsageError, match=r"Unknown key 'optimizer\.params'"):
        build(
            {"_target_": "torch.optim.SGD", "lr": 0.1, "params": []},
            Optimizer,
            key="optimizer",
            params=parameters,
        )
    with pytest.raises(UsageError, match=r"optimizer: SGD refused its settings \{'lr': -1\}"):
        build({"_target_": "torch.optim.SGD", "lr": -1}, Optimizer, key="optimizer", params=parameters)
    with pytest.raises(UsageError, match=r"model\.out_features is missing: Linear needs it"):
        build({"_target_": "torch.nn.Linear", "in_features": 3}, nn.Module, key="model")
    with pytest.raises(UsageError, match=r"model\.out_features is missing"):
        build({"_target_": "torch.nn.Linear", "_args_": [3]}, nn.Module, key="model")


def test_other_classes_are_built():
    made = build(
        {"_target_": "torch.nn.Linear", "_args_": [3], "out_features": 2, "bias": False},
        nn.Module,
        key="model",
    )
    assert made.weight.shape == (2, 3)  # pyright: ignore[reportAttributeAccessIssue]
    assert made.bias is None

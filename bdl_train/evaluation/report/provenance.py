"""What it takes to make a run again: its settings, its versions and machine, its cost, and the commands."""

import shlex
from collections.abc import Iterator
from typing import Any

import pandas as pd
import yaml

from bdl_train.config import MASK, compose, leaves, mask_secrets, to_yaml
from bdl_train.errors import UsageError
from bdl_train.evaluation.report.headline import data_name, kind_of
from bdl_train.evaluation.report.html import Html, facts, folded, number, seconds, table_of, tag
from bdl_train.evaluation.report.material import Material

GROUPS = (
    "data",
    "model",
    "likelihood",
    "prior",
    "inference",
    "optimizer",
    "scheduler",
    "trainer",
    "cluster",
    "tracking",
)


def configuration(material: Material) -> Html:
    """Key choices, and the resolved config in a fold."""
    config = material.config
    pairs: list[tuple[str, Any]] = [("data", data_name(material))]
    pairs += [(group, kind_of(material, group)) for group in ("model", "likelihood", "prior", "inference")]
    for label, path in {
        "members": ("num_members",), "epochs, at most": ("trainer", "max_epochs"), "learning rate": ("optimizer", "lr"),
        "batch size": ("data", "batch_size"), "seed": ("seed",), "split": ("data", "split"),
        "precision": ("trainer", "precision"),
    }.items():  # fmt: skip
        value: Any = config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            pairs.append((label, number(value) if isinstance(value, int | float) else value))
    text = yaml.safe_dump(mask_secrets(dict(config)), sort_keys=False, allow_unicode=True, width=100)
    resolved = folded("The resolved config", tag("pre", text))
    return tag("section", tag("h2", "Configuration"), facts(pairs), resolved, id="configuration")


def provenance(material: Material) -> Html:
    """Versions, machine, cost, hashes, and commands."""
    manifest = material.manifest
    code, hardware = _mapping(manifest.get("code")), _mapping(manifest.get("hardware"))
    pairs: list[tuple[str, Any]] = [("run", material.run.path.name), ("status", material.status)]
    pairs += [(label, manifest[key]) for label, key in (("finished", "finished"),) if key in manifest]
    for label, key in (("wall time", "wall_time_s"), ("device time", "device_time_s")):
        if isinstance(manifest.get(key), int | float):
            pairs.append((label, seconds(float(manifest[key]))))
    gpus = hardware.get("gpus")
    pairs.append(("GPUs", ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else "none"))
    pairs += [
        (label, hardware[key])
        for label, key in (("CPU cores", "cpus"), ("machine", "machine"))
        if key in hardware
    ]
    if code:
        commit = str(code.get("commit") or "unknown")[:12]
        states = {"True": "clean", "False": "with changes that are not committed"}
        state = states.get(str(code.get("clean")), "state unknown")
        pairs += [("bdl_train", code.get("version")), ("commit", f"{commit}, {state}")]
    data = _mapping(manifest.get("data"))
    if data.get("fingerprint"):
        pairs.append(("fingerprint of the data", str(data["fingerprint"])[:16]))
    packages = [(name, version) for name, version in _mapping(manifest.get("packages")).items()]
    hashes = [("run", file, value) for file, value in _mapping(manifest.get("hashes")).items()]
    hashes += [(f"evaluation/{material.name}", file, value) for file, value in material.hashes.items()]
    executors = [
        {"stack": stack, "members": len(value.get("members", []))}
        | {name: value.get(name) for name in ("device", "host", "executor")}
        for stack, value in material.history.executors.items()
    ]  # fmt: skip
    parts: list[Any] = [tag("h2", "Provenance"), facts(pairs)]
    if packages:
        parts.append(
            folded("Versions of packages", table_of(pd.DataFrame(packages, columns=["package", "version"])))
        )
    if executors:
        parts.append(folded("Where stacks ran", table_of(pd.DataFrame(executors))))
    if hashes:
        table = pd.DataFrame(hashes, columns=["of", "file", "sha256"])
        parts.append(folded("Hashes of files", table_of(table)))
    return tag("section", *parts, *_commands(material), id="provenance")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _commands(material: Material) -> Iterator[Html]:
    run = shlex.quote(str(material.run.path))
    words = command_of(material.config)
    lines = [] if words is None else [f"bdl train {' '.join(map(shlex.quote, words))}"]
    named = [] if material.name == "test" else [f"part={material.part}", f"name={material.name}"]
    asked = material.asked or [f"run={material.run.path}", *named]
    lines += [
        " ".join(["bdl evaluate", *map(shlex.quote, asked)]),
        f"bdl report run={run} name={shlex.quote(material.name)}",
    ]
    yield tag("h4", "How to make it again")
    yield tag("pre", "\n".join(lines))
    if not material.asked:
        text = "What was asked of the evaluation (slices, costs, attacks ...) was not kept: add it to bdl evaluate."
        yield tag("p", text, class_="dim")
    if words is None:
        text = "The settings are not those of shipped configs alone, so training has no short command."
        yield tag("p", text, class_="dim")


def command_of(config: Any) -> list[str] | None:
    """Overrides of `bdl train` that compose this config; None if there are none, such as for a class of one's own.

    They are composed again and compared, so that what is shown is true.
    """
    try:
        choices = [
            f"{group}={str(config[group]['_target_']).split('.')[-2]}"
            for group in GROUPS
            if group not in ("optimizer", "trainer")
            and str(config[group]["_target_"]).startswith("bdl_train.")
        ]
        wanted = {key: value for key, value in leaves(config) if key not in _NOT_SETTINGS}
        if MASK in wanted.values():
            return None
        default = dict(leaves(compose("train", [*choices, *_given(wanted, choices)])))
        changed = [
            f"{key}={_plain(value)}" for key, value in wanted.items() if default.get(key, _ABSENT) != value
        ]
        needed = [word for word in _given(wanted, choices) if word not in changed]
        words = [*choices, *needed, *changed]
        again = dict(leaves(compose("train", words)))
    except (UsageError, KeyError, TypeError, IndexError, AttributeError, ValueError):
        return None
    return words if {key: again[key] for key in again if key not in _NOT_SETTINGS} == wanted else None


_ABSENT = object()
_NOT_SETTINGS = frozenset({"resume", "allow", "plan_only"})


def _given(wanted: dict[str, Any], choices: list[str]) -> list[str]:
    """Overrides for the keys that shipped configs leave open."""
    open_ = [key for key, value in leaves(yaml.safe_load(to_yaml("train", choices))) if value == "???"]
    return [f"{key}={_plain(wanted[key])}" for key in open_ if key in wanted]


def _plain(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    text = str(value)
    if (
        text.replace("_", "").replace("/", "").replace(".", "").replace("-", "").isalnum()
        and not text[0].isdigit()
    ):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

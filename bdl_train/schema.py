"""What a verb can be given: root keys, groups and their choices, read from the YAML files without Hydra."""

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdl_train.errors import UsageError, nearest

_SETTING = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value>[^#]*)(?:# *(?P<comment>.*))?$")
_CONTINUED = re.compile(r"^ +# *(?P<comment>.+)$")

SWEEPING = frozenset({"sweep"})


@functools.cache
def shipped() -> Path:
    """The folder of the configs that come with the package (in a checkout, the top-level `conf/`)."""
    spec = importlib.util.find_spec("bdl_train.conf")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Key:
    """A key of a verb's root config: dotted name, default as written in the YAML, and its comment."""

    name: str
    default: str
    comment: str


@dataclass(frozen=True)
class Schema:
    """The root config of one verb.

    Attributes:
        verb: Its name.
        keys: Root keys in the order of the file.
        groups: Group to its default choice (None: nothing is chosen), in the order of the file.
        config_dir: A user's config folder, beside the shipped one.
    """

    verb: str
    keys: tuple[Key, ...]
    groups: Mapping[str, str | None]
    config_dir: Path | None = None

    @classmethod
    def of(cls, verb: str, config_dir: Path | None = None) -> "Schema":
        """Read `conf/<verb>.yaml`, and the root configs that it builds on."""
        groups: dict[str, str | None] = {}
        keys: dict[str, Key] = {}
        for path in _roots_of(verb):
            for entry in _load(path).get("defaults", ()):
                if isinstance(entry, dict):
                    groups.update({name.rpartition(" ")[2]: choice for name, choice in entry.items()})
            keys |= {key.name: key for key in _root_keys(path.read_text())}
        return cls(verb, tuple(keys.values()), groups, config_dir)

    @property
    def sweeps(self) -> bool:
        """Whether the verb takes several values of an override, without `-m`."""
        return self.verb in SWEEPING

    def choices(self, group: str) -> list[str]:
        """The choices of a group, shipped ones and the user's."""
        return choices(group, self.config_dir)

    def roots(self) -> set[str]:
        """First parts of every key that the verb knows."""
        return {key.name.partition(".")[0] for key in self.keys} | set(self.groups)

    def required(self) -> set[str]:
        """First parts of the keys that the verb reads in every run."""
        absent = {group for group, choice in self.groups.items() if choice is None}
        return self.roots() - absent

    def known(self) -> dict[str, bool]:
        """Every dotted key of the root config and of the shipped choices of its groups.

        Returns:
            Key to whether it holds further known keys; where it does not, anything may stand below it.
        """
        known = {key: nested for path in _roots_of(self.verb) for key, nested in _dotted(_load(path))}
        for group in self.groups:
            known[group] = True
            for choice in choices(group):
                known.update(self._keys_of(shipped(), group, choice))
        known.pop("defaults", None)
        return known

    def having(self, key: str) -> list[str]:
        """The choices, as `group=choice`, that have this dotted key and whose code reads it."""
        group = key.partition(".")[0]
        if group not in self.groups:
            return []
        found = []
        for folder in filter(None, (shipped(), self.config_dir)):
            names = _names(folder / group)
            if folder == self.config_dir:
                names = [name for name in names if "_target_" in _load(folder / group / f"{name}.yaml")]
            found += [f"{group}={name}" for name in names if key in dict(self._keys_of(folder, group, name))]
        return sorted(found)

    def unknown(self, config: Mapping[str, Any]) -> list[str]:
        """Dotted keys of a composed config that no code reads.

        Below a `_target_` the class decides, so nothing there is judged.
        """
        known = self.known()

        def walk(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
            for name, value in node.items():
                key = f"{prefix}{name}"
                if key not in known:
                    yield key
                elif isinstance(value, Mapping) and "_target_" not in value and known[key]:
                    yield from walk(value, f"{key}.")

        return list(walk(config, ""))

    def unknown_key(self, key: str, given: str) -> UsageError:
        """The error for a key that the chosen config does not have.

        Args:
            key: The dotted key.
            given: Where it came from: the override in quotes, or words for a file.
        """
        start = f"Unknown key '{key}' (from {given})."
        if elsewhere := self.having(key):
            return UsageError(
                f"{start} The chosen {key.partition('.')[0]} has no such setting; {' and '.join(elsewhere)} "
                f"{'has' if len(elsewhere) == 1 else 'have'} it."
            )
        known = self.known()
        guess = nearest_key(key, list(known))
        if not guess and self._is_open(key.partition(".")[0]):
            guess = f" For a setting that only the class itself lists, write +{key}=..."
        return UsageError(
            f"{start}{guess} `bdl {self.verb} --help` lists the keys, "
            f"`bdl {self.verb} --cfg job` those of the chosen groups too."
        )

    def _is_open(self, group: str) -> bool:
        """Whether a choice of this group names a foreign class, which may take more than its YAML lists."""
        folders = filter(None, (shipped(), self.config_dir))
        files = [path for folder in folders for path in (folder / group).rglob("*.yaml")]
        ours = "bdl_train."
        return group in self.groups and not all(
            _load(path).get("_target_", ours).startswith(ours) for path in files
        )

    @staticmethod
    def _keys_of(folder: Path, group: str, choice: str) -> list[tuple[str, bool]]:
        path = folder / group / f"{choice}.yaml"
        # A choice of package _global_ (an experiment) only sets keys of others.
        if path.read_text().lstrip().startswith("# @package _global_"):
            return []
        return list(_dotted(_load(path), f"{group}."))


def _roots_of(verb: str) -> list[Path]:
    """The root config of a verb, after those of other verbs that its defaults name."""
    path = shipped() / f"{verb}.yaml"
    named = [one for one in _load(path).get("defaults", ()) if isinstance(one, str) and one != "_self_"]
    return [*(shipped() / f"{one}.yaml" for one in named), path]


def choices(group: str, config_dir: Path | None = None) -> list[str]:
    """The choices of a config group: the shipped files and those of the user's folder."""
    return sorted(
        {name for folder in filter(None, (shipped(), config_dir)) for name in _names(folder / group)}
    )


def check_config_dir(config_dir: Path) -> None:
    """Refuse a user's config folder that is missing, or whose files would never be read.

    Raises:
        UsageError: no such folder, or a file with the name of a shipped one, which Hydra would prefer.
    """
    if not config_dir.is_dir():
        raise UsageError(f"--config-dir is '{config_dir}', which is not a folder.")
    for path in sorted(config_dir.rglob("*.yaml")):
        relative = path.relative_to(config_dir)
        if (shipped() / relative).exists():
            raise UsageError(
                f"'{relative}' in --config-dir '{config_dir}' has the name of a shipped config, "
                "which would be read in its place: rename it."
            )


def nearest_key(word: str, keys: list[str]) -> str:
    """`" Did you mean 'x'?"`: the same last part elsewhere (`lr`: `optimizer.lr`, `inference.lr`), then the nearest
    spelling.

    Dotted words are compared by last part within their group: the group's own letters would make all alike.
    """
    parent, _, leaf = word.rpartition(".")
    same = sorted(
        (key for key in set(keys) if "." in key and key.rpartition(".")[2] == leaf), key=lambda k: (len(k), k)
    )
    if same and parent:
        same = difflib.get_close_matches(word, same, 1, 0.0)
    if same:
        return f" Did you mean {' or '.join(repr(key) for key in same[:2])}?"
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    others = {key.rpartition(".")[2]: key for key in sorted(keys, reverse=True)}
    leaves = siblings if parent and siblings else others
    if guess := re.search("'(.+)'", nearest(leaf, leaves)):
        return f" Did you mean '{leaves[guess.group(1)]}'?"
    return ""


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]


@functools.cache
def _load(path: Path) -> Mapping[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        loaded = yaml.load(path.read_text(), loader)
    except yaml.YAMLError as error:
        raise UsageError(f"'{path}' is not valid YAML: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def _dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    for name, value in node.items():
        nested = isinstance(value, Mapping) and bool(value) and "_target_" not in value
        yield f"{prefix}{name}", nested
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")


def _root_keys(text: str) -> Iterator[Key]:
    """Keys with their comments; a comment may go on in the lines below, one nested level is named by dots."""
    found: list[Key] = []
    parent = ""
    for line in text.splitlines():
        setting, more = _SETTING.match(line), _CONTINUED.match(line)
        if setting is not None:
            name, value = setting["key"], setting["value"].strip()
            if not setting["indent"]:
                parent = "" if value else name
            if value and parent != "defaults":
                full = f"{parent}.{name}" if setting["indent"] else name
                found.append(Key(full, value, (setting["comment"] or "").strip()))
        elif more is not None and found:
            last = found[-1]
            found[-1] = Key(last.name, last.default, f"{last.comment} {more['comment'].strip()}")
    return iter(found)

"""From a verb and its overrides to a plain config: composed by Hydra, checked, one clear message an error."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdl_train.errors import UsageError, unknown_choice
from bdl_train.overrides import expand_multirun, first_values, override_key, parse, split_axes
from bdl_train.schema import Schema, check_config_dir

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    Given = list[tuple[str, Override]]  # each word as typed, and as Hydra reads it

__all__ = ["Options", "compose", "expand_multirun", "mask_secrets", "override_key", "to_yaml"]

MASK = "***"
_SECRETS = frozenset({"token", "key", "password", "passwd", "secret", "credential", "apikey"})


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a verb was called, beside its config.

    Attributes:
        verb: Its name.
        overrides: The overrides of this job, as typed; in a multirun, with one value each.
        config_dir: The user's config folder.
        multirun: Whether `-m` was given.
        multirun_index: Which job of the multirun this is, from 0.
        jobs: The overrides of every job; one entry without `-m`.
    """

    verb: str
    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None
    multirun: bool = False
    multirun_index: int = 0
    jobs: tuple[tuple[str, ...], ...] = ((),)


def compose(verb: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> dict[str, Any]:
    """The config of one run of a verb, in plain containers, interpolations resolved.

    Args:
        verb: Names the root config, `conf/<verb>.yaml`.
        overrides: Words of the command line: `group=choice`, `key=value`, `+key=value`, `~key`. Of a verb that runs
            another one for each value of a word, the first value counts.
        config_dir: A user's config folder, searched beside the shipped one.

    Raises:
        UsageError: an unknown key or choice, a value that cannot be read, a mandatory key without a value, a
            key that no code reads, `allow` set anywhere but on the command line.
    """
    config = _compose(verb, overrides, config_dir)
    missing = [key for key, value in leaves(config) if value == "???"]
    if missing:
        needed = " ".join(f"{key}=..." for key in missing)
        raise UsageError(f"{' and '.join(missing)} must be given: bdl {verb} {needed}")
    return config


def to_yaml(verb: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """The composed config as YAML, secrets masked; mandatory keys without a value show as `???`."""
    import yaml

    config = mask_secrets(_compose(verb, overrides, config_dir))
    axes = split_axes(overrides, config_dir)[1] if Schema.of(verb).sweeps else []
    told = "".join(f"# several values: {axis.word}\n" for axis in axes)
    return told + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)


def mask_secrets(config: dict[str, Any]) -> dict[str, Any]:
    """A copy with `***` for every value whose key is named like a secret.

    The last word of a key decides: `api_key`, `apiKey` and `token` are masked, `monkey`, `token_dim` and
    `key_file` are not. Of plural names (`api_keys`) only texts are masked: counts (`num_tokens`) survive.
    """

    def masked(value: Any, secret: str) -> Any:
        if isinstance(value, dict):
            return {name: masked(one, _secrecy(str(name)) or secret) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [masked(one, secret) for one in value]
        hide = isinstance(value, str) or (
            secret == "one" and not isinstance(value, bool) and value is not None
        )
        return MASK if secret and hide else value

    return masked(config, "")


def _secrecy(name: str) -> str:
    """`one` for a secret's name, `many` for its plural, else an empty text."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    last = words[-1].lower() if words else ""
    if last in _SECRETS:
        return "one"
    return "many" if last.removesuffix("s") in _SECRETS else ""


def _compose(verb: str, overrides: Sequence[str], config_dir: Path | None) -> dict[str, Any]:
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if config_dir is not None:
        check_config_dir(config_dir)
    schema = Schema.of(verb, config_dir)
    if schema.sweeps:
        overrides = first_values(overrides, config_dir)
    given = list(zip(overrides, parse(overrides, config_dir=config_dir), strict=True))
    words = [word for text, override in given for word in _words(text, override, schema)]
    try:
        with initialize_config_module("bdl_train.conf", version_base="1.3"):
            node = hydra_compose(verb, [*search_path(config_dir), *words])
        config = OmegaConf.to_container(node, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise _explain(error, given, schema) from error
    assert isinstance(config, dict)
    plain = {str(key): value for key, value in config.items()}
    _check(plain, given, schema)
    return plain


def search_path(config_dir: Path | None) -> list[str]:
    """The override that makes Hydra search a user's config folder too."""
    if config_dir is None:
        return []
    from hydra.core.override_parser.types import Quote, QuotedString

    quoted = QuotedString(f"file://{config_dir.absolute()}", Quote.single).with_quotes()
    return [f"hydra.searchpath=[{quoted}]"]


def _words(text: str, override: "Override", schema: Schema) -> list[str]:
    """What Hydra is given for one override."""
    key, value = override.key_or_group, override.value()
    if override.is_sweep_override():
        raise UsageError(
            f"'{text}' names several values. For a list write [...] around them, for text with a comma "
            f"\"{key}='...'\"; train and evaluate run once for each value with -m."
        )
    if key in schema.groups and override.package is None and not override.is_delete():
        if isinstance(value, dict) and "_target_" in value:
            # Hydra would merge the mapping into the default choice and keep the settings of another class.
            return [f"~{key}", f"++{key}={override.get_value_element_as_str()}"]
        if not isinstance(value, str | dict | list):
            raise UsageError(unknown_choice(key, text.partition("=")[2], schema.choices(key)))
        if override.is_add() and not isinstance(value, dict):
            # Every group of a verb is in its defaults, so there is nothing to add to.
            return [str(override.input_line).removeprefix("+")]
    if isinstance(value, dict):
        # An open mapping such as prior.patterns takes any key; the class judges the others.
        return [f"++{str(override.input_line).lstrip('+')}"]
    return [str(override.input_line)]


def _explain(error: Exception, given: "Given", schema: Schema) -> UsageError:
    from hydra.errors import MissingConfigException

    message = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        for group in schema.groups:
            if error.missing_cfg_file.startswith(f"{group}/"):
                choice = error.missing_cfg_file.removeprefix(f"{group}/")
                return UsageError(unknown_choice(group, choice, schema.choices(group)))
    if message.startswith(("Could not override", "Could not delete")):
        for text, override in given:
            if f"'{override.key_or_group}'" in message:
                return schema.unknown_key(override.key_or_group, f"'{text}'")
    key = getattr(error, "full_key", None)
    where = f"{key}: " if key else f"Cannot compose the config from '{' '.join(text for text, _ in given)}': "
    return UsageError(f"{where}{message.splitlines()[0]}")


def _check(config: dict[str, Any], given: "Given", schema: Schema) -> None:
    for key in schema.unknown(config):
        setters = [f"'{text}'" for text, one in given if _overlap(key, one.key_or_group)]
        raise schema.unknown_key(key, setters[-1] if setters else "a chosen config file")
    for key in sorted(schema.required() - set(config)):
        raise UsageError(f"'{key}' was removed, but bdl {schema.verb} needs it: leave out '~{key}'.")
    if config.get("allow") and not any(one.key_or_group == "allow" for _, one in given):
        raise UsageError(
            f"allow={config['allow']} stands in a config file. Packages whose code may run are named on the "
            "command line, allow=[package], or in the environment variable BDL_ALLOW."
        )


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of a config; lists are values."""
    if isinstance(node, dict):
        return [
            leaf
            for name, value in node.items()
            for leaf in leaves(value, f"{prefix}.{name}" if prefix else name)
        ]
    return [(prefix, node)]

"""Settings that the chosen method has no use for: refused where they are asked for, else told where they stand."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from bdl_train.build import resolve
from bdl_train.config import override_key
from bdl_train.distributed.waves import AUTO
from bdl_train.errors import UsageError
from bdl_train.inference import Method

log = logging.getLogger(__name__)


def refuse_unused(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse words of the command line that set a group which the method, or a fixed num_members, does not use.

    What an experiment file or a default says of such a group is no wish of this command: see `tell_unused`.

    Args:
        config: Composed, of one training.
        overrides: Its words, as typed.

    Raises:
        UsageError: names the key, the method, and what can be set instead.
    """
    method, settings = _method(config)
    for word in overrides:
        key = override_key(word)
        group = key.replace("/", ".").partition(".")[0].partition("@")[0]
        if group == "budget" and config["num_members"] != AUTO:
            raise UsageError(no_budget(word, config["num_members"]))
        if group in method.unused_with(settings):
            own = ", ".join(f"inference.{field.name}" for field in dataclasses.fields(method))
            raise UsageError(
                f"'{word}' would have no effect: {_name(method, settings)} does not use the group '{group}'. Leave "
                f"{key} out, or choose another method; this one can be told {own}."
            )


def no_budget(word: str, num_members: Any) -> str:
    """What to say of a setting of the budget beside a fixed number of members."""
    return (
        f"{word} has no effect beside num_members={num_members}: the budget ends an ensemble whose size it chooses. "
        "Leave it out, or set num_members=auto."
    )


def tell_unused(config: Mapping[str, Any]) -> None:
    """Log the groups of the config that the method does not use."""
    method, settings = _method(config)
    unused = method.unused_with(settings)
    if unused:
        log.info(
            "%s does not use %s: what the config says there has no effect",
            _name(method, settings),
            " and ".join(unused),
        )


def _method(config: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The class and its settings, which may still be wrong: they are judged where it is built."""
    return resolve(config["inference"].get("_target_", ""), Method, key="inference"), config["inference"]


def _name(method: Any, settings: Mapping[str, Any]) -> str:
    name = f"inference={method.__module__.rpartition('.')[2]}"
    return name if method.unused_with(settings) == method.unused_groups else f"{name} with these settings"

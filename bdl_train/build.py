"""From a config node with a `_target_` to an object: allow-list first, then types and ranges, then construct.

A config may come from a run directory that somebody else wrote, so it is untrusted: a `_target_` must match
an allowed prefix *and* resolve to a class that derives from the base of its group. Nested targets are
checked the same way, before anything is constructed.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from bdl_train.errors import UsageError, nearest

T = TypeVar("T")

SHIPPED_PREFIXES = ("bdl_train.", "torch.nn.", "torch.optim.", "pytorch_lightning.")
ALLOW_ENV = "BDL_ALLOW"
_extra = threading.local()


@contextmanager
def allowing(packages: Iterable[str]) -> Iterator[None]:
    """Allow `_target_`s inside `packages` too, within this block and this thread.

    The packages come from the command line (`allow=[pkg]`) or the environment, never from a stored config.

    Raises:
        UsageError: an entry that is no package name.
    """
    before = getattr(_extra, "packages", ())
    _extra.packages = (*before, *(_package(name, "allow") for name in packages))
    try:
        yield
    finally:
        _extra.packages = before


def allowed_packages() -> tuple[str, ...]:
    """Packages that the user added, from `allowing` and from the environment variable BDL_ALLOW."""
    from_env = [
        _package(name, ALLOW_ENV) for name in os.environ.get(ALLOW_ENV, "").split(",") if name.strip()
    ]
    return (*getattr(_extra, "packages", ()), *from_env)


def resolve(target: str, base: type[T] | tuple[type, ...], *, key: str) -> type[T]:
    """The class that `target` names.

    Args:
        target: A dotted path, `package.module.Class`.
        base: The class, or classes, that it must derive from.
        key: The config key to name in an error.

    Raises:
        UsageError: outside the allow-list, not found, abstract, or not a subclass of `base`.
    """
    bases = base if isinstance(base, tuple) else (base,)
    prefixes = (*SHIPPED_PREFIXES, *_user_prefixes())
    if not isinstance(target, str) or not target.startswith(prefixes):
        raise UsageError(
            f"{key}._target_ is '{target}', which is outside the allowed packages "
            f"({', '.join(prefix.rstrip('.') for prefix in prefixes)}). "
            "If you trust that package, add it on the command line: allow=[package]."
        )
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{key}._target_ is '{target}', which cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, bases)):
        wanted = " or ".join(f"{one.__module__}.{one.__qualname__}" for one in bases)
        raise UsageError(f"{key}._target_ is '{target}', expected a class that derives from {wanted}.")
    # A re-export inside an allowed package must not smuggle in a class of another one.
    if not f"{found.__module__}.".startswith(prefixes):
        raise UsageError(
            f"{key}._target_ is '{target}', which lives in '{found.__module__}', not allowed here."
        )
    if inspect.isabstract(found):
        raise UsageError(f"{key}._target_ is '{target}', an abstract class: name one that derives from it.")
    return found


def build(node: Mapping[str, Any], base: type[T] | tuple[type, ...], *, key: str, **given: Any) -> T:
    """Construct the object that a config node describes.

    Args:
        node: A mapping with `_target_` and the class's settings. Dataclasses take the rest of the node as it
            is; for other classes (networks, data modules) nested nodes with a `_target_` are built first, and
            `_args_` lists positional arguments.
        base: The class, or classes, that the target must derive from.
        key: The config key of the node, for errors.
        given: Arguments that come from the program, not from the config.

    Raises:
        UsageError: a target outside the allow-list, an unknown or missing setting, a value of the wrong
            type or out of range; the message names the config key.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UsageError(f"{key} must be a mapping with a '_target_', got {node!r}.")
    cls = resolve(node["_target_"], base, key=key)
    settings = {name: value for name, value in node.items() if name != "_target_"}
    if dataclasses.is_dataclass(cls):
        return settings_of(cls, settings, key=key, **given)
    bases = base if isinstance(base, tuple) else (base,)
    _check_nested(settings, bases, key)
    args = _nested(settings.pop("_args_", []), f"{key}._args_")
    if not isinstance(args, list):
        raise UsageError(f"{key}._args_ must be a list of positional arguments, got {args!r}.")
    kwargs = {name: _nested(value, _join(key, name)) for name, value in settings.items()}
    _check_arguments(cls, len(args), kwargs, given, key)
    try:
        return cls(*args, **kwargs, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{key}: {cls.__name__} refused its settings {settings}: {error}") from error


def settings_of(cls: type[T], settings: Mapping[str, Any], *, key: str, **given: Any) -> T:
    """A dataclass from its settings, types and ranges checked.

    A whole float may stand for an int and an int for a float; a text is never read as a number or a truth
    value, nor a truth value as a number. NaN and infinity are no settings.

    Args:
        cls: A dataclass whose annotations are the schema.
        settings: Field name to plain value.
        key: The config key of the settings, for errors; empty for root keys.
        given: Fields that come from the program; the config must not set them.

    Raises:
        UsageError: a line for each unknown or missing field and each value of the wrong type or out of range.
    """
    from pydantic import ValidationError

    fields = [field.name for field in dataclasses.fields(cls) if field.init]  # pyright: ignore[reportArgumentType]
    for name in settings:
        if name not in fields or name in given:
            raise _unknown(name, [field for field in fields if field not in given], cls, key)
    try:
        # The config of a dataclass reaches pydantic only through a type around it, hence the lists.
        (built,) = _adapter(cls).validate_python([{**settings, **given}])
    except ValidationError as error:
        raise UsageError(_explain(error.errors(), settings, key)) from error
    for where, kind, value in _converted(settings, built, key):
        raise UsageError(f"{where}: input should be a valid {kind}, got {value!r}.")
    return built


@functools.cache
def _adapter(cls: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", allow_inf_nan=False)
    return TypeAdapter(list[cls], config=config)  # pyright: ignore[reportInvalidTypeForm]


def _converted(given: Any, kept: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """Values that pydantic converted although they are of another kind: (key, kind expected, value)."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            now = kept.get(name) if isinstance(kept, Mapping) else getattr(kept, str(name), None)
            yield from _converted(value, now, _join(where, name))
    elif isinstance(given, list | tuple) and isinstance(kept, list | tuple):
        for i, (value, now) in enumerate(zip(given, kept, strict=False)):
            yield from _converted(value, now, f"{where}[{i}]")
    elif isinstance(kept, bool):
        if not isinstance(given, bool):
            yield where, "boolean, true or false", given
    elif isinstance(kept, int | float) and isinstance(given, bool | str):
        yield where, "integer" if isinstance(kept, int) else "number", given


def _explain(errors: Sequence[Any], settings: Mapping[str, Any], key: str) -> str:
    said: dict[str, tuple[list[str], str]] = {}
    for error in errors:
        kind, (_, *loc) = error["type"], error["loc"]
        where = _where(loc, settings, key, missing=kind == "missing")
        got = f", got {error['input']!r}."
        text = f"{error['msg'][0].lower()}{error['msg'][1:]}"
        if kind == "missing":
            text, got = "is missing", ": give it a value."
        elif kind == "unexpected_keyword_argument":
            text = "unknown key"
        elif kind == "value_error":
            text, got = str(error["ctx"]["error"]), ""
        elif kind == "literal_error":
            choices = error["ctx"]["expected"].replace(" or ", ", ").split(", ")
            got += nearest(str(error["input"]), [choice.strip("'") for choice in choices])
        said.setdefault(where, ([], got))[0].append(text)
    # The members of a union each have their say about one value.
    return "\n".join(f"{where}: {' or '.join(texts)}{got}" for where, (texts, got) in said.items())


def _where(loc: Sequence[str | int], settings: Any, key: str, *, missing: bool) -> str:
    """The config key of an error; names of union members in pydantic's location are left out."""
    where, node = key, settings
    for depth, part in enumerate(loc):
        if isinstance(node, Mapping) and part in node:
            where, node = _join(where, part), node[part]
        elif isinstance(node, list | tuple) and isinstance(part, int):
            where, node = f"{where}[{part}]", node[part]
        elif missing and depth == len(loc) - 1:
            where = _join(where, part)
    return where


def _check_arguments(
    cls: type, num_args: int, kwargs: Mapping[str, Any], given: Mapping[str, Any], key: str
) -> None:
    try:
        parameters = list(inspect.signature(cls).parameters.values())
    except (ValueError, TypeError):  # a class written in C may not tell
        return
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    free = [one.name for one in named if one.name not in given]
    for name in kwargs:
        if name in given or (name not in free and not takes_any):
            raise _unknown(name, free, cls, key)
    positional = [one for one in named if one.kind is one.POSITIONAL_OR_KEYWORD]
    filled = {one.name for one in positional[:num_args]} | set(kwargs) | set(given)
    for one in named:
        if one.default is one.empty and one.name not in filled:
            raise UsageError(f"{_join(key, one.name)} is missing: {cls.__name__} needs it, give it a value.")


def _check_nested(value: Any, bases: tuple[type, ...], key: str) -> None:
    """Refuse nested targets before anything is constructed.

    They must derive from the outer base or be networks, unless they live in a package that the user added.
    """
    from torch import nn

    if isinstance(value, Mapping):
        if "_target_" in value:
            found: type = resolve(value["_target_"], object, key=key)
            if not f"{found.__module__}.".startswith(_user_prefixes()):
                resolve(value["_target_"], (*bases, nn.Module), key=key)
        for name, one in value.items():
            _check_nested(one, bases, _join(key, name))
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            _check_nested(one, bases, f"{key}[{i}]")


def _nested(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, object, key=key)
        return {name: _nested(one, _join(key, name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_nested(one, f"{key}[{i}]") for i, one in enumerate(value)]
    return value


def _unknown(name: str, known: list[str], cls: type, key: str) -> UsageError:
    listed = ", ".join(known) or "no settings"
    return UsageError(
        f"Unknown key '{_join(key, name)}'.{nearest(name, known)} {cls.__name__} has: {listed}."
    )


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _user_prefixes() -> tuple[str, ...]:
    return tuple(f"{name}." for name in allowed_packages())


def _package(name: str, source: str) -> str:
    name = name.strip().rstrip(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{source} must list packages, such as my_package, got '{name}'.")
    return name

"""From a config node with a `_target_` to an object: allow-list first, then types and ranges, then construct.

A config may come from a run directory that somebody else wrote, so it is untrusted: a `_target_` must match
an allowed prefix *and* resolve to a class that derives from the base of its group. Nested targets are
checked the same way, before anything is constructed.
"""

import dataclasses
import importlib
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
    """
    before = getattr(_extra, "packages", ())
    _extra.packages = (*before, *packages)
    try:
        yield
    finally:
        _extra.packages = before


def allowed_packages() -> tuple[str, ...]:
    """Packages that the user added, from `allowing` and from the environment variable BDL_ALLOW."""
    from_env = [name for name in os.environ.get(ALLOW_ENV, "").split(",") if name]
    return (*getattr(_extra, "packages", ()), *from_env)


def resolve(target: str, base: type[T] | tuple[type, ...], *, key: str) -> type[T]:
    """The class that `target` names.

    Args:
        target: A dotted path, `package.module.Class`.
        base: The class, or classes, that it must derive from.
        key: The config key to name in an error.

    Raises:
        UsageError: outside the allow-list, not found, or not a subclass of `base`.
    """
    bases = base if isinstance(base, tuple) else (base,)
    prefixes = (*SHIPPED_PREFIXES, *(f"{name.rstrip('.')}." for name in allowed_packages()))
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
    home = f"{found.__module__}."
    if not home.startswith(prefixes):
        raise UsageError(f"{key}._target_ is '{target}', which lives in '{found.__module__}', not allowed here.")
    return found


def build(node: Mapping[str, Any], base: type[T] | tuple[type, ...], *, key: str, **given: Any) -> T:
    """Construct the object that a config node describes.

    Args:
        node: A mapping with `_target_` and the class's settings; nested nodes may have `_target_`s.
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
    settings = {name: value for name, value in node.items() if name not in ("_target_", "_args_")}
    if dataclasses.is_dataclass(cls):
        return _build_dataclass(cls, {**settings, **given}, key)
    args = [_nested(value, f"{key}._args_") for value in node.get("_args_", ())]
    kwargs = {name: _nested(value, f"{key}.{name}") for name, value in settings.items()}
    try:
        return cls(*args, **kwargs, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{key}: {cls.__name__} refused its settings: {error}") from error


def _nested(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, object, key=key)
        return {name: _nested(one, f"{key}.{name}") for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_nested(one, f"{key}[{i}]") for i, one in enumerate(value)]
    return value


def _build_dataclass(cls: type[T], settings: dict[str, Any], key: str) -> T:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    fields = [field.name for field in dataclasses.fields(cls) if field.init]  # pyright: ignore[reportArgumentType]
    for name in settings:
        if name not in fields:
            raise UsageError(
                f"Unknown key '{key}.{name}'.{nearest(name, fields)} "
                f"{cls.__name__} has: {', '.join(fields)}."
            )
    try:
        adapter = TypeAdapter(cls, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # a class that carries its own pydantic config refuses a second one
        adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(settings)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(one, key) for one in error.errors())) from error


def _explain(error: Any, key: str) -> str:
    where = ".".join([key, *(str(part) for part in error["loc"])])
    if error["type"] == "missing":
        return f"{where} is missing: give it a value."
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}."

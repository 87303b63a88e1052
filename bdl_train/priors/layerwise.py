"""Layerwise prior: parameters choose their prior by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.priors import BoundPrior, Prior, join
from bdl_train.stack import Layout


@dataclass(frozen=True, kw_only=True)
class Layerwise(Prior):
    """Independent blocks: log p(θ) is the sum of the blocks' log densities.

    Attributes:
        patterns: Parameter-name patterns (`fnmatch`: `*`, `?`, `[abc]`, case matters) to nodes of priors,
            each with a `_target_`. A parameter belongs to the first pattern that matches it.
        default: The node for parameters that no pattern matches.
    """

    patterns: dict[str, dict[str, Any]]
    default: dict[str, Any]

    def __post_init__(self) -> None:
        _ = self._by_pattern, self._default  # wrong nodes are refused here, not on a worker

    def bind(self, layout: Layout, members: Sequence[int]) -> BoundPrior:
        """See `Prior.bind`.

        Raises:
            UsageError: a pattern that no parameter belongs to.
        """
        names_by_pattern: dict[str, list[str]] = {pattern: [] for pattern in self.patterns}
        rest: list[str] = []
        for name in layout.names:
            first = next((pattern for pattern in self.patterns if fnmatchcase(name, pattern)), None)
            (rest if first is None else names_by_pattern[first]).append(name)
        for pattern, names in names_by_pattern.items():
            if not names:
                raise UsageError(_unused(pattern, layout.names))
        blocks = [(self._by_pattern[pattern], names) for pattern, names in names_by_pattern.items()]
        if rest:
            blocks.append((self._default, rest))
        return join(
            [(prior.bind(layout.select(names), members), layout.columns(names)) for prior, names in blocks]
        )

    @cached_property
    def _by_pattern(self) -> dict[str, Prior]:
        return {pattern: _nested(node, f"patterns.{pattern}") for pattern, node in self.patterns.items()}

    @cached_property
    def _default(self) -> Prior:
        return _nested(self.default, "default")


def _nested(node: Mapping[str, Any], key: str) -> Prior:
    prior = build(node, Prior, key=key)
    if prior.starts_members:
        raise UsageError(
            f"{key}._target_ is '{node['_target_']}', which speaks for all parameters of a network at once: "
            "use it alone, as the whole prior."
        )
    return prior


def _unused(pattern: str, names: Sequence[str]) -> str:
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if matched:
        return (
            f"prior.patterns: '{pattern}' has no parameter left, earlier patterns match all of its "
            f"({', '.join(matched)}). The first match wins: move it up or remove it."
        )
    return f"prior.patterns: '{pattern}' matches no parameter. The network has: {', '.join(names)}."

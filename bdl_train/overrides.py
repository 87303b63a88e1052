"""The words of the command line that set keys: Hydra's grammar, with paths taken as they are.

Hydra 1.3 cannot read `run=a=b`, `run=a(1)`, `input=a,b.csv` or `slices=[age>65]`; the values of keys that name files,
and the items of lists of expressions, are therefore quoted before Hydra sees them.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bdl_train.errors import UsageError
from bdl_train.schema import choices

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FILE_KEYS = frozenset({"run", "runs", "input", "output", "resume", "output_dir", "path", "root"})
EXPRESSION_KEYS = frozenset({"slices"})
_KEY = re.compile(r"(?:\+{0,2}|~)[A-Za-z_$][\w$-]*(?:[./@:][\w$-]+)*")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ITEM = re.compile(rf"(?:{_QUOTED.pattern}|[^,])+", re.DOTALL)


def override_key(text: str) -> str:
    """The key that an override sets: `++model.hidden=[3]` sets `model.hidden`."""
    return text.partition("=")[0].lstrip("+~").strip()


def names_file(key: str) -> bool:
    """Whether the values of this dotted key are paths: `run`, `output_dir`, `data.path`, `prior.run` ..."""
    return key.rpartition(".")[2] in FILE_KEYS


def quote_expressions(text: str) -> str:
    """An override of a list of expressions with every item quoted for Hydra; any other override as it is."""
    key, _, value = text.partition("=")
    items = value.strip()
    if override_key(text) not in EXPRESSION_KEYS or not (items.startswith("[") and items.endswith("]")):
        return text
    pieces = [item.strip() for item in _ITEM.findall(items[1:-1])]
    return f"{key}=[{', '.join(one if _QUOTED.fullmatch(one) else _quoted(one) for one in pieces if one)}]"


def quote_path(text: str, *, sweep: bool = False) -> str:
    """An override whose value is a path, with that value quoted for Hydra; any other override as it is.

    `null`, an empty value and a value already in quotes stay; `${...}` still means interpolation.

    Args:
        text: One override.
        sweep: Whether `choice(a,b)` means several values.
    """
    key, equals, value = text.partition("=")
    if not equals or text.startswith("~") or not names_file(override_key(text)):
        return text
    if value in ("", "null", "???") or _QUOTED.fullmatch(value) or (sweep and value.startswith("choice(")):
        return text
    return f"{key}={_quoted(value)}"


def parse(
    overrides: Sequence[str], *, sweep: bool = False, config_dir: Path | None = None
) -> list["Override"]:
    """Overrides as Hydra reads them, paths quoted.

    Raises:
        UsageError: a word that is no override, or whose value Hydra's grammar cannot read.
    """
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create(cast(ConfigLoader, _Choices(config_dir)))
    parsed = []
    for text in overrides:
        word, _, value = text.partition("=")
        if ("=" not in text and not text.startswith("~")) or not _KEY.fullmatch(word):
            raise UsageError(
                f"'{text}' is not an override: write key=value, group=choice, +key=value or ~key."
            )
        if override_key(text).startswith(("hydra.", "hydra/")):
            raise UsageError(
                f"'{text}': bdl has no hydra.* settings. Use output_dir=... for the place of runs, "
                "--config-dir for a folder of your own configs."
            )
        try:
            parsed += parser.parse_overrides([quote_expressions(quote_path(text, sweep=sweep))])
        except HydraException as error:
            lines = str(error).splitlines()
            reason = f": {lines[1]}" if lines[0].startswith("Error parsing") else ""
            raise UsageError(
                f"Cannot read the value in '{text}'{reason}. Text with special characters needs "
                f'quotes of its own inside those of the shell: "{word}={_quoted(value)}".'
            ) from error
    return parsed


@dataclass(frozen=True)
class Axis:
    """One override with several values.

    Attributes:
        key: As typed, with its `+`.
        word: The whole override, as Hydra was given it.
        words: An override for each value; empty for an interval.
        ordered: Whether the values are a `range`, so that neighbours are alike.
        low, high: Ends of an interval, both included; ints for `int(interval(...))`.
        log: Whether equal ratios count as equal distances: `tag(log, interval(...))`.
    """

    key: str
    word: str
    words: tuple[str, ...] = ()
    ordered: bool = False
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def first(self) -> str:
        """The override with the first of its values; of an interval, the lower end."""
        return self.words[0] if self.words else f"{self.key}={self.low!r}"


def split_axes(overrides: Sequence[str], config_dir: Path | None = None) -> tuple[list[str], list[Axis]]:
    """Overrides with one value, and those with several, each in the order of the words.

    A key that is given twice counts once, with its last value. Paths are not split at commas: `run=choice(a,b)`
    names two.

    Raises:
        UsageError: a word that cannot be read, a shuffled sweep, an interval that is empty or has an unknown tag.
    """
    found = _by_key(overrides, config_dir)
    fixed = [one for one in found.values() if isinstance(one, str)]
    return fixed, [one for one in found.values() if isinstance(one, Axis)]


def first_values(overrides: Sequence[str], config_dir: Path | None = None) -> list[str]:
    """The same overrides, with one value each: the first."""
    return [one.first if isinstance(one, Axis) else one for one in _by_key(overrides, config_dir).values()]


def expand_multirun(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """The jobs of a multirun: the Cartesian product of every override with several values.

    The order is that of the words, the last one fastest; otherwise as `split_axes`.

    Raises:
        UsageError: also an interval (a grid needs values).
    """
    choices: list[tuple[str, ...]] = []
    for one in _by_key(overrides, config_dir).values():
        if isinstance(one, Axis) and not one.words:
            raise UsageError(
                f"'{one.word}' is an interval: -m runs a grid, list its values: {one.key}=1,2,3."
            )
        choices.append(one.words if isinstance(one, Axis) else (one,))
    return [list(job) for job in itertools.product(*choices)]


def _by_key(overrides: Sequence[str], config_dir: Path | None) -> dict[str, str | Axis]:
    found: dict[str, str | Axis] = {}
    for override in parse(overrides, sweep=True, config_dir=config_dir):
        several = override.is_sweep_override()
        found[override.get_key_element()] = _axis(override) if several else str(override.input_line)
    return found


def _axis(override: "Override") -> Axis:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep

    key, word, value = override.get_key_element(), str(override.input_line), override.value()
    if isinstance(value, IntervalSweep):
        return _interval(key, word, value)
    if getattr(value, "shuffle", False):
        raise UsageError(f"'{word}' is shuffled: jobs run in a fixed order.")
    words = [f"{key}={one}" for one in override.sweep_string_iterator()]
    if not words:
        raise UsageError(f"'{word}' matches no value.")
    if names_file(override.key_or_group):
        words = [f"{key}={_quoted(str(one.value()))}" for one in _reparse(words)]
    return Axis(key, word, tuple(words), ordered=isinstance(value, RangeSweep))


def _interval(key: str, word: str, value: Any) -> Axis:
    if value.tags - {"log"}:
        raise UsageError(
            f"'{word}' has the tag {', '.join(sorted(value.tags - {'log'}))}: intervals know log."
        )
    low, high, log = value.start, value.end, "log" in value.tags
    ends = f"got {low} to {high}"
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high)) or low >= high:
        raise UsageError(f"'{word}': an interval goes from a number up to a larger one, {ends}.")
    if log and low <= 0:
        raise UsageError(f"'{word}': an interval with the tag log begins above 0, {ends}.")
    return Axis(key, word, low=low, high=high, log=log)


def _reparse(texts: list[str]) -> list["Override"]:
    # Not `parse`: these are already in Hydra's grammar, escapes included.
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides(texts)


def _quoted(value: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single).with_quotes()


class _Choices:
    """What Hydra's parser asks of its config loader: the choices that `group=glob(*)` is matched against."""

    def __init__(self, config_dir: Path | None) -> None:
        self.config_dir = config_dir

    def get_group_options(self, group_name: str, results_filter: Any = None) -> list[str]:
        return choices(group_name, self.config_dir)

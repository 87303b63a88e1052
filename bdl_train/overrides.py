"""The words of the command line that set keys: Hydra's grammar, with paths taken as they are.

Hydra 1.3 cannot read `run=a=b`, `run=a(1)` or `input=a,b.csv`; the values of keys that name files are
therefore quoted before Hydra sees them.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bdl_train.errors import UsageError
from bdl_train.schema import choices

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FILE_KEYS = frozenset({"run", "runs", "input", "output", "resume", "output_dir", "path", "root"})
_KEY = re.compile(r"(?:\+{0,2}|~)[A-Za-z_$][\w$-]*(?:[./@:][\w$-]+)*")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def override_key(text: str) -> str:
    """The key that an override sets: `++model.hidden=[3]` sets `model.hidden`."""
    return text.partition("=")[0].lstrip("+~").strip()


def names_file(key: str) -> bool:
    """Whether the values of this dotted key are paths: `run`, `output_dir`, `data.path`, `prior.run` ..."""
    return key.rpartition(".")[2] in FILE_KEYS


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
            parsed += parser.parse_overrides([quote_path(text, sweep=sweep)])
        except HydraException as error:
            lines = str(error).splitlines()
            reason = f": {lines[1]}" if lines[0].startswith("Error parsing") else ""
            raise UsageError(
                f"Cannot read the value in '{text}'{reason}. Text with special characters needs "
                f'quotes of its own inside those of the shell: "{word}={_quoted(value)}".'
            ) from error
    return parsed


def expand_multirun(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """The jobs of a multirun: the Cartesian product of every override with several values.

    The order is that of the words, the last one fastest; a key that is given twice counts once, with its last
    value. Paths are not split at commas: `run=choice(a,b)` names two.

    Raises:
        UsageError: a word that cannot be read, an interval (a grid needs values), a shuffled sweep.
    """
    axes: dict[str, list[str]] = {}
    for override in parse(overrides, sweep=True, config_dir=config_dir):
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [str(override.input_line)]
            continue
        if not override.is_discrete_sweep():
            raise UsageError(
                f"'{override.input_line}' is an interval: -m runs a grid, list its values: {key}=1,2,3."
            )
        if getattr(override.value(), "shuffle", False):
            raise UsageError(f"'{override.input_line}' is shuffled: -m runs its jobs in a fixed order.")
        axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        if not axes[key]:
            raise UsageError(f"'{override.input_line}' matches no value.")
        if names_file(override.key_or_group):
            axes[key] = [f"{key}={_quoted(str(one.value()))}" for one in _reparse(axes[key])]
    return [list(job) for job in itertools.product(*axes.values())]


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

"""Completion in bash: the verb first, then Hydra's own completion of groups, choices and keys."""

import os
import re
from pathlib import Path

from bdl_train.errors import UsageError
from bdl_train.manual import verb_names
from bdl_train.overrides import names_file, override_key, quote_path
from bdl_train.schema import Schema

# bash splits words at "=" and ":" as well, so what stands before the last of them is cut from each reply.
SCRIPT = """\
_bdl_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" reply word
    word="${line##*[[:space:]]}"
    COMPREPLY=()
    while IFS= read -r reply; do
        [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && reply="${reply#"${word%=*}="}"
        COMPREPLY+=("$reply")
    done < <(COMP_LINE="$line" "$1" -sc query=bash 2>/dev/null)
}
complete -o nospace -o default -F _bdl_complete bdl
"""

_FLAGS = ("--help", "--cfg job", "--config-dir ", "--multirun")


def answer(request: str) -> str:
    """What `bdl -sc REQUEST` prints.

    Args:
        request: `install=bash`, `uninstall=bash`, or `query=bash`, which completes the line in COMP_LINE.
    """
    if request == "install=bash":
        return SCRIPT
    if request == "uninstall=bash":
        return "complete -r bdl; unset -f _bdl_complete\n"
    if request == "query=bash":
        return "".join(f"{word}\n" for word in complete(os.environ.get("COMP_LINE", "")))
    raise UsageError(f"-sc takes install=bash, uninstall=bash or query=bash, got '{request}'.")


def complete(line: str) -> list[str]:
    """Completions of the last word of a command line, `bdl` included.

    Values that name files yield none: bash then completes file names.
    """
    words = line.split()[1:]
    current = "" if not words or line[-1].isspace() else words.pop()
    config_dir, words = _without_flags(words)
    if current.startswith("-"):
        return [flag for flag in _FLAGS if flag.startswith(current)]
    if not words:
        return [f"{verb} " for verb in verb_names() if verb.startswith(current)]
    verb, *overrides = words
    if verb not in verb_names() or ("=" in current and names_file(override_key(current))):
        return []
    return _query(verb, overrides, current, config_dir)


def _without_flags(words: list[str]) -> tuple[Path | None, list[str]]:
    config_dir, kept, flag = None, [], ""
    for word in words:
        if flag == "--config-dir":
            config_dir = Path(word)
        elif word.startswith("--config-dir="):
            config_dir = Path(word.partition("=")[2])
        elif not word.startswith("-") and flag != "--cfg":
            kept.append(word)
        flag = word
    return config_dir, kept


def _query(verb: str, overrides: list[str], current: str, config_dir: Path | None) -> list[str]:
    from hydra import initialize_config_module
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    from bdl_train.config import search_path

    given = [*search_path(config_dir), *(quote_path(word) for word in overrides)]
    with initialize_config_module("bdl_train.conf", version_base="1.3"):
        plugin = BashCompletion(GlobalHydra.instance().config_loader())
        try:
            found = plugin._query(config_name=verb, line=" ".join([*given, current]))
        except HydraException:  # a word before the cursor that cannot be read yet
            return []
    # Hydra offers its own settings, and the groups of every verb.
    roots = Schema.of(verb, config_dir).roots()
    return [word for word in found if re.split("[=./@]", word.lstrip("+~"))[0] in roots]

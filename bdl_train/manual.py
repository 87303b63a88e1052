"""What `bdl --help` and `bdl <verb> --help` say, read from the verbs' docstrings and the YAML comments."""

import ast
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent

import bdl_train.verbs
from bdl_train.errors import Exit
from bdl_train.schema import Schema

EXIT_MEANINGS = {
    Exit.DONE: "done",
    Exit.FAILED: "failed",
    Exit.USAGE: "wrong usage",
    Exit.PARTIAL: "done, but some members were lost",
    Exit.STOPPED: "stopped on request, resume it",
}

FLAGS = {
    "-h, --help": "explain bdl, or the verb",
    "--cfg job": "print the composed config and stop",
    "--config-dir DIR": "a folder of your own configs, laid out like conf/",
    "-m, --multirun": "one run for each value of key=a,b,c (train and evaluate)",
    "--version": "print the version and stop",
}


@dataclass(frozen=True)
class Verb:
    """A verb as its module's source tells it; the module is not imported.

    Attributes:
        name: Of the module.
        summary: First line of its docstring.
        details: The rest of its docstring.
        multirun: Whether the module sets `MULTIRUN = True`.
    """

    name: str
    summary: str
    details: str
    multirun: bool

    @classmethod
    def read(cls, path: Path) -> "Verb":
        tree = ast.parse(path.read_text())
        summary, _, details = (ast.get_docstring(tree) or "").partition("\n")
        multirun = any(
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == "MULTIRUN" for target in node.targets)
            and isinstance(node.value, ast.Constant)
            and node.value.value is True
            for node in tree.body
        )
        return cls(path.stem, summary, details.strip("\n"), multirun)


def verb_names() -> list[str]:
    """The verbs: the modules of `bdl_train.verbs`, none of them imported."""
    return sorted(_sources())


def verb(name: str) -> Verb:
    """What the source of a verb says about it."""
    return Verb.read(_sources()[name])


def overview() -> str:
    """The verbs, a line each, and what holds for all of them."""
    lines = [(name, verb(name).summary) for name in verb_names()]
    status = ", ".join(f"{int(code)} {meaning}" for code, meaning in EXIT_MEANINGS.items())
    return "\n".join(
        [
            "Usage: bdl <verb> [flags] [group=choice] [key=value] ...",
            "",
            "Verbs:",
            _table(lines),
            "",
            "Flags:",
            _table(list(FLAGS.items())),
            "",
            "bdl <verb> --help explains a verb.",
            'Completion in bash: eval "$(bdl -sc install=bash)"',
            f"Exit status: {status}.",
        ]
    )


def explain(name: str, config_dir: Path | None = None) -> str:
    """One verb: what it does, its groups with their choices, its keys with their meaning, examples."""
    told, schema = verb(name), Schema.of(name, config_dir)
    parts = [f"bdl {name}: {told.summary}", f"Usage: bdl {name} [flags] [group=choice] [key=value] ..."]
    groups = []
    for group, default in schema.groups.items():
        listed = [f"*{choice}" if choice == default else choice for choice in schema.choices(group)]
        if listed:
            groups.append((group, "  ".join(listed)))
    if groups:
        parts.append(f"Groups, group=choice (* is the default):\n{_table(groups)}")
    keys = [(f"{key.name}={key.default}", key.comment) for key in schema.keys]
    parts.append(f"Keys, key=value (with their defaults; ??? must be given):\n{_table(keys)}")
    if groups:
        parts.append(f"The keys of the chosen groups: bdl {name} --cfg job")
    flags = [(flag, text) for flag, text in FLAGS.items() if told.multirun or "multirun" not in flag]
    parts.append(f"Flags:\n{_table(flags)}")
    if told.details:
        parts.append(dedent(told.details))
    return "\n\n".join(parts)


def _sources() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in bdl_train.verbs.__path__:
        for path in Path(folder).glob("*.py"):
            if not path.stem.startswith("_"):
                found.setdefault(path.stem, path)
    return found


def _table(rows: list[tuple[str, str]]) -> str:
    width = max((len(left) for left, _ in rows), default=0)
    return indent("\n".join(f"{left:<{width}}  {right}".rstrip() for left, right in rows), "  ")

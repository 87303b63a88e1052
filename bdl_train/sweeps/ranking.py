"""The result of a sweep: trials with the best validation objective first, as a table and as files."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from bdl_train.files import write_bytes, write_json
from bdl_train.overrides import override_key
from bdl_train.sweeps.record import Definition, SweepDir, Trial

EMPTY = "–"
NOT_USED = "not used for selection"


def ranked(trials: Iterable[Trial], direction: str) -> list[Trial]:
    """Best first; those without an objective come last, in the order of their numbers."""
    sign = -1.0 if direction == "maximize" else 1.0

    def place(trial: Trial) -> tuple[bool, float, int]:
        value = trial.objective if trial.is_ranked else None
        return value is None, sign * (value or 0.0), trial.number

    return sorted(trials, key=place)


def table(definition: Definition, trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Header and rows. Metrics of the test part carry a star: nothing was chosen by them."""
    names = [override_key(word) for word in definition.axes]
    test = definition.objective.replace("val/", "test/", 1)
    header = ["trial", *names, definition.objective, "status", f"{test} *", "run"]
    rows = [
        [
            str(one.number),
            *(_short(word.partition("=")[2]) for word in one.words),
            _number(one.objective),
            one.status,
            _number((one.metrics or {}).get(test)),
            one.run,
        ]
        for one in trials
    ]
    return header, rows


def _short(text: str) -> str:
    """A drawn number in four digits, anything else as it is; `results.json` holds all digits."""
    try:
        return text if len(text) <= 6 else f"{float(text):.4g}"
    except ValueError:
        return text


def _number(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.4g}"


def write_report(folder: SweepDir, definition: Definition, trials: Sequence[Trial]) -> None:
    """Write `sweep.md` and `results.json`, best first."""
    header, rows = table(definition, trials)
    lines = [
        f"# Sweep {folder.path.name}",
        "",
        f"Sampler `{definition.sampler}`, pruning `{definition.prune}`; chosen by `{definition.objective}` "
        f"({definition.direction}d, validation part).",
        "",
        *_markdown(header, rows),
        "",
        f"\\* metrics of the test part: {NOT_USED}. Of many trials the best validation score is too good to be true; "
        "the test part tells what it is worth, once.",
        "",
    ]
    if problems := [one for one in trials if one.reason]:
        lines += [*(f"- trial {one.number} {one.status}: {one.reason}" for one in problems), ""]
    write_bytes(folder.report, "\n".join(lines).encode())
    write_json(folder.results, {"definition": asdict(definition), "trials": [_result(one) for one in trials]})


def _result(trial: Trial) -> dict[str, Any]:
    keep = ("number", "status", "objective", "reason", "run", "words")
    metrics = trial.metrics or {}
    return {
        **{name: value for name, value in asdict(trial).items() if name in keep},
        "val": {key: value for key, value in metrics.items() if key.startswith("val/")},
        f"test ({NOT_USED})": {key: value for key, value in metrics.items() if key.startswith("test/")},
    }


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + " --- |" * len(header), *body]


def show(definition: Definition, trials: Sequence[Trial], title: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    header, rows = table(definition, trials)
    header, rows = header[:-1], [row[:-1] for row in rows]  # runs are long: `sweep.md` names them
    grid = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in header:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console(highlight=False)
    console.print(grid, markup=False)
    console.print(f"* of the test part, {NOT_USED}", markup=False)

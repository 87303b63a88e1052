# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pandas types a selection as any of its classes.
"""The tables of results in the README, from the rows that the benchmarks kept in `docs/results/`.

    python scripts/results.py            # prints them and writes them between their marks in README.md
    python scripts/results.py --check    # fails if the README says something else

A method is chosen for each set by its mean validation NLL; test figures are shown beside it and never used. Tables with
published figures need `$BDL_DATA_ROOT/reference/`; without it they stay as they are.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "docs" / "results", ROOT / "README.md"
OTHER_PROTOCOL = ("quoted in", "Izmailov 2019 UAI supplement Table 3", "Izmailov 2019 UAI supplement Table 4")
"""Sources of rows that are no neural network on the standard splits, or not said to be."""


def pm(values: pd.Series, digits: int = 3) -> str:
    """Mean ± standard error over splits."""
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.sem():.{digits}f}"


def table(frame: pd.DataFrame) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(frame.columns) + " |", "| " + " | ".join("---" for _ in frame.columns) + " |"]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


def runs(protocol: str) -> pd.DataFrame:
    rows = pd.read_csv(RESULTS / "uci.csv")
    return rows[rows.protocol == protocol].drop_duplicates(["set", "split", "method"], keep="last")


def uci_by_method(metric: str, protocol: str = "standard") -> str:
    """One line a method, one column a set: mean ± standard error of a test metric; * chosen by validation NLL.

    A method that has not all splits says how many it has, in brackets.
    """
    rows, lines = runs(protocol), []
    sets = list(rows["set"].unique())
    chosen = {name: chosen_method(rows, name) for name in sets}
    for method in rows.method.unique():
        line = {"inference": f"`{method}`"}
        for name in sets:
            own = rows[(rows["set"] == name) & (rows.method == method)]
            star = "*" if chosen[name] == method else ""
            fewer = "" if len(own) == rows[rows["set"] == name].split.nunique() else f" ({len(own)})"
            line[name] = f"{pm(own[f'test_{metric}'])}{star}{fewer}" if len(own) else ""
        lines.append(line)
    splits = {"inference": "splits"} | {name: str(rows[rows["set"] == name].split.nunique()) for name in sets}
    return table(pd.DataFrame([*lines, splits]))


def chosen_method(rows: pd.DataFrame, name: str) -> str | None:
    """Of the methods that have every split of the set, the one of least mean validation NLL; None has them all."""
    own = rows[rows["set"] == name]
    whole = own.groupby("method").filter(lambda group: len(group) == own.split.nunique())
    return None if whole.empty else str(whole.groupby("method").val_nll.mean().idxmin())


def sets_with_choice(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Each set of which a method has every split, and the chosen one."""
    chosen = ((name, chosen_method(rows, name)) for name in rows["set"].unique())
    return [(name, method) for name, method in chosen if method is not None]


def uci_against_published() -> str:
    """The method chosen on the validation parts beside the best published row and published deep ensembles."""
    rows, published, lines = runs("standard"), pd.read_csv(reference("published_uci.csv")), []
    known = published[(published.metric == "nll") & ~published.source.str.startswith(OTHER_PROTOCOL)]
    for name, method in sets_with_choice(rows):
        own = rows[(rows["set"] == name) & (rows.method == method)]
        best = known[known.dataset == name].nsmallest(1, "value").iloc[0]
        ensembles = known[(known.dataset == name) & known.method.str.startswith("Deep Ensembles")].value.iloc[
            0
        ]
        nll = own.test_nll.mean()
        lines.append(
            {
                "set": name,
                "chosen by validation NLL": f"`{method}`",
                "test NLL": pm(own.test_nll),
                "RMSE": pm(own.test_rmse),
                "95 % coverage": pm(own.test_coverage_95),
                "best published NLL": f"{best.value:.2f} ({best.method})",
                "deep ensembles, published": f"{ensembles:.2f}",
                "better than": ", ".join(
                    word for word, value in (("best", best.value), ("ensembles", ensembles)) if nll < value
                )
                or "neither",
            }
        )
    return table(pd.DataFrame(lines))


def uci_paired() -> str:
    """Paired differences in NLL to the per-split figures of MC dropout, on the same splits."""
    rows, lines = runs("standard"), []
    other = pd.read_csv(reference("mc_dropout_per_split.csv"))
    for name, method in sets_with_choice(rows):
        own = rows[(rows["set"] == name) & (rows.method == method)].set_index("split")
        for baseline, group in other[other.dataset == name].groupby("method"):
            theirs = -group.set_index("split").test_ll_per_point
            both = own.index.intersection(theirs.index)
            difference = own.test_nll[both] - theirs[both]
            lines.append(
                {
                    "set": name,
                    "method": f"`{method}`",
                    "against": baseline,
                    "splits": len(both),
                    "NLL, difference": pm(difference),
                    "better on": f"{int((difference < 0).sum())} of {len(both)}",
                }
            )
    return table(pd.DataFrame(lines))


def images() -> str:
    """FashionMNIST, with MNIST as the outside."""
    rows = pd.read_csv(RESULTS / "fashion_mnist.csv")
    rows = rows.loc[rows.val_nll.fillna(np.inf).groupby(rows.method, sort=False).idxmin()]
    shown = rows[["method", "members", "epochs"]].copy()
    shown["method"] = [f"`{method}`" for method in rows.method]
    for name, digits in (("accuracy", 4), ("nll", 4), ("ece", 4), ("ood_auroc", 4), ("single_nll", 4)):
        shown[name.replace("_", " ")] = rows[name].map(
            lambda value, d=digits: "" if np.isnan(value) else f"{value:.{d}f}"
        )
    return table(shown)


def fidelity() -> str:
    """Distances to NUTS on a small network, nearest first."""
    rows = pd.read_csv(RESULTS / "fidelity.csv").sort_values("total_variation")
    shown = pd.DataFrame({"inference": [f"`{name}`" for name in rows.method], "members": list(rows.members)})
    shown["draws a member"] = list(rows.draws)
    for name, digits in (("total_variation", 3), ("wasserstein", 3), ("std_ratio", 2)):
        shown[name.replace("_", " ")] = [f"{value:.{digits}f}" for value in rows[name]]
    return table(shown)


def measured(present: str) -> str:
    """The table of methods with what was measured of each in its last column; the other columns are written by hand."""
    rows = runs("standard")
    nll = {
        name: rows[rows["set"] == name].groupby("method").test_nll.mean() for name in ("energy", "concrete")
    }
    distance = pd.read_csv(RESULTS / "fidelity.csv").set_index("method").total_variation
    lines = present.splitlines()
    for at, line in enumerate(lines[2:], 2):
        cells = line.split(" | ")
        method = cells[0].removeprefix("| ").strip("`")
        figures = [
            f"{values[method]:.{digits}f}" if method in values.index else "–"
            for values, digits in ((nll["energy"], 2), (nll["concrete"], 2), (distance, 3))
        ]
        lines[at] = " | ".join([*cells[:-1], f"{', '.join(figures)} |"])
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "fidelity": ("fidelity.csv", fidelity),
    "uci": ("uci.csv", lambda: uci_by_method("nll")),
    "uci-rmse": ("uci.csv", lambda: uci_by_method("rmse")),
    "uci-gap": ("uci.csv", lambda: uci_by_method("nll", "gap")),
    "uci-gap-coverage": ("uci.csv", lambda: uci_by_method("coverage_95", "gap")),
    "uci-published": ("uci.csv", uci_against_published),
    "uci-paired": ("uci.csv", uci_paired),
    "fashion": ("fashion_mnist.csv", images),
}


def mark(name: str) -> str:
    return f"<!-- {name} -->\n"


def between(text: str, name: str, table: str) -> str:
    """The text with this table between the marks of that name."""
    head, rest = text.split(mark(name))
    return head + mark(name) + table + "\n" + mark(f"end {name}") + rest.split(mark(f"end {name}"))[1]


def reference(file: str) -> Path:
    """A file of published figures.

    Raises:
        FileNotFoundError: there is no such file here.
    """
    path = Path(os.environ.get("BDL_DATA_ROOT", "data")) / "reference" / file
    if not path.is_file():
        raise FileNotFoundError(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    text = before = README.read_text()
    for name, (file, make) in TABLES.items():
        if mark(name) not in text or not (RESULTS / file).is_file():
            continue
        try:
            made = make()
        except FileNotFoundError as missing:
            print(f"{name}: left as it is, {missing} is not there")
            continue
        text = between(text, name, made)
        if not given.check:
            print(f"{name}\n\n{made}\n")
    by_hand = text.split(mark("methods"))[1].split(mark("end methods"))[0]
    text = between(text, "methods", measured(by_hand))
    if given.check:
        sys.exit("README.md is not what docs/results says: run scripts/results.py" if text != before else 0)
    README.write_text(text)


if __name__ == "__main__":
    main()

"""A comparison of runs as one HTML page that stands alone: verdicts, means, and forest plots of paired differences."""

from importlib.resources import files

import numpy as np
import pandas as pd

from bdl_train.evaluation.compare import to_text
from bdl_train.evaluation.comparison import METRICS
from bdl_train.evaluation.report.figure import Figure, drawn
from bdl_train.evaluation.report.html import Html, folded, interval, join, number, table_of, tag
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

STYLES = {"better": 2, "worse": 1, "no clear difference": 4, "equal": 4}
"""Colour and shape of a difference."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def comparison_page(title: str, table: pd.DataFrame, paired: Section | None) -> bytes:
    """The page; it loads nothing from anywhere.

    Args:
        title: What is compared.
        table: Of `compare`.
        paired: Of `paired_section`; None = there was only one experiment.
    """
    chapters = [*([] if paired is None else _paired(paired)), ("means", "Means", _means(table))]
    style = (files("bdl_train.evaluation.report") / "static" / "style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"Comparison: {title}"),
        tag("style", Html(style)),
    )
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in chapters]
    nav = tag("nav", tag("ul", *links), aria_label="Chapters")
    top = tag("header", tag("p", "Comparison of runs", class_="over"), tag("h1", title))
    sections = [tag("section", tag("h2", name), content, id=key) for key, name, content in chapters]
    main = tag("main", top, *sections)
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', nav, main), lang='en')}\n".encode()


def _means(table: pd.DataFrame) -> Html:
    return join(
        [
            tag("p", "Mean ± standard error over runs that differ only in split or seed.", class_="dim"),
            table_of(to_text(table)),
            folded("The same as numbers", table_of(table)),
        ]
    )


def _paired(section: Section) -> list[tuple[str, str, Html]]:
    """Key, title and content of its chapters."""
    if section.level == "empty":
        content = tag("p", section.verdict, class_="verdict empty")
    else:
        differences, splits = section.tables["differences"], section.tables["splits"]
        content = join(
            [
                *[tag("p", one, class_="verdict") for one in section.verdict.splitlines()],
                tag("p", HOW, class_="dim"),
                drawn(_figures(differences, splits), "forest"),
                folded("All differences as numbers", table_of(differences)),
            ]
        )
    found = [(section.key, section.title, content)]
    if section.warnings:
        items = tag("ul", *[tag("li", one) for one in section.warnings], class_="warnings")
        found.append(("unpaired", "What was not paired", items))
    return found


HOW = (
    "Both models are scored on the same rows. Of one split the 95 % interval is the paired bootstrap over rows (other "
    "trainings are not part of it); of several it is the t interval of the differences of splits, with the variance of "
    "Nadeau and Bengio (2003) for splits that share training rows. p is adjusted by Holm over all differences to one "
    "baseline; a difference is called clear if its interval excludes 0 and p is at most 0.05."
)


def _figures(differences: pd.DataFrame, splits: pd.DataFrame) -> list[Figure]:
    """A forest plot for every baseline and metric."""
    found = []
    for baseline in differences["baseline"].unique():
        own, parts = (frame.loc[frame["baseline"] == baseline] for frame in (differences, splits))
        for metric in own["metric"].unique():
            kept = (frame.loc[frame["metric"] == metric] for frame in (own, parts))
            found.append(_forest(str(baseline), str(metric), *kept))
    return found


def _forest(baseline: str, metric: str, own: pd.DataFrame, parts: pd.DataFrame) -> Figure:
    known, unit = METRICS[metric], str(own["unit"].iloc[0])
    names = own["experiment"].tolist()
    panel = rows_panel(
        names,
        Scale.over(own["low"], own["high"], own["difference"], zero=True),
        xlabel=f"difference in {known.words}{f', {unit}' if unit else ''}",
        right=[number(value, 3) for value in own["difference"]],
        width=380,
    )
    panel.upright(0.0)
    edges = zip(own["difference"], own["low"], own["high"], own["result"], strict=True)
    for i, (name, (value, low, high, result)) in enumerate(zip(names, edges, strict=True)):
        style = STYLES.get(result, 4)
        single = parts["difference"].to_numpy(float)[(parts["experiment"] == name).to_numpy()]
        if len(single) > 1:
            panel.cloud(single, np.full(len(single), -i - 0.25), style)
        panel.ranges([low], [high], [-i], style)
        panel.points(
            [value], [-i], style, tips=[f"{name}: {number(value)} ({interval(low, high)}), {result}"]
        )
    side = "left" if known.better == "lower" else "right"
    caption = f"Against {baseline}; {side} of the line is better. Small dots are single splits."
    unknown = own.loc[~np.isfinite(own["low"].to_numpy(float)), "experiment"].tolist()
    if unknown:
        caption += f" Without an interval: {', '.join(unknown)}."
    shown = [own[NUMBERS].assign(split="all"), parts[SPLIT_NUMBERS].assign(split=parts["split"])]
    legend = [(name, style, "dot") for name, style in list(STYLES.items())[:3]]
    numbers = pd.concat(shown, ignore_index=True)
    return Figure(f"{known.words}: difference to {baseline}", [panel], numbers, caption, legend)


NUMBERS = ["experiment", "difference", "low", "high", "p", "p_adjusted", "result", "n"]
SPLIT_NUMBERS = ["experiment", "difference", "low", "high", "n"]

"""Privacy: membership attacks and reconstructions."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.inversion import ALL
from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, ordered, texts, where
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import Html, folded, interval, number, picture, table_of, tag
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_PICTURES = 24
LEAST_PIXELS = 64
"""Fewer values are a row of a table, not a picture."""


def draw(section: Section) -> Iterator[Block]:
    """Attacks, their ROC curves, and what inversion found."""
    attacks = section.tables["attacks"]
    yield _roc(section.tables["roc"])
    yield tag("h4", "Attacks")
    whole = attacks["slice"] == ALL
    yield table_of(_words(where(attacks, whole)))
    if sum(whole) < len(attacks):
        yield folded(
            f"The same within {len(set(texts(attacks, 'slice'))) - 1} slices",
            table_of(_words(where(attacks, ~whole))),
        )
    yield folded("All columns of the attacks", table_of(attacks))
    if "inversion" in section.tables:
        yield tag("h4", "Reconstructed inputs: are they nearer to training rows?")
        yield table_of(section.tables["inversion"])
    if "reconstructions" in section.tables:
        yield from _reconstructions(section.tables["reconstructions"])


def _roc(roc: pd.DataFrame) -> Figure:
    fpr, tpr = numbers(roc, "fpr"), numbers(roc, "tpr")
    positive = fpr[fpr > 0]
    lowest = 10.0 ** np.floor(np.log10(max(float(positive.min()), 1e-5))) if len(positive) else 1e-3
    scale = Scale.logarithmic(float(min(lowest, 0.01)), 1.0)
    panel = Panel(
        scale, scale, "false alarms (share of other rows)", "training rows found (share)", height=300
    )
    line = np.logspace(np.log10(scale.low), 0, 60)
    panel.line(line, line, class_="even", dashed=False)
    names = list(dict.fromkeys(roc["attack"]))
    for i, name in enumerate(names):
        group = where(roc, (roc["attack"] == name) & (fpr > 0) & (tpr > 0))
        panel.line(group["fpr"], group["tpr"], i)
    caption = (
        "Both axes are logarithmic: what matters is the left, few false alarms. The dashed line is guessing."
    )
    legend = [(str(name), i, "line") for i, name in enumerate(names)]
    return Figure("Telling training rows from others", [panel], roc, caption, legend)


def _words(attacks: pd.DataFrame) -> pd.DataFrame:
    def told(value: str, low: str, high: str) -> list[str]:
        return [
            f"{number(v, 3)} ({interval(a, b)})" if np.isfinite(v) else "–"
            for v, a, b in zip(attacks[value], attacks[low], attacks[high], strict=True)
        ]

    return pd.DataFrame(
        {
            "attack": attacks["attack"],
            "slice": attacks["slice"],
            "AUC": told("auc", "low", "high"),
            "found at 1 % false alarms": told("tpr_at_1_fpr", "low2", "high2"),
            "n in": attacks["n_in"],
            "n out": attacks["n_out"],
        }
    )


def _reconstructions(table: pd.DataFrame) -> Iterator[Html]:
    images = []
    for target, start in dict.fromkeys(zip(table["target"], table["start"], strict=True)):
        group = where(table, (table["target"] == target) & (table["start"] == start))
        values = numbers(ordered(group, "position"), "value")
        image = _as_image(values)
        if image is not None and len(images) < MOST_PICTURES:
            words = f"{target}, start {start}"
            images.append(
                tag("div", picture(image, f"Reconstruction of {words}"), tag("span", words), class_="thumb")
            )
    if images:
        yield tag("h4", "Some reconstructions")
        yield tag("div", *images, class_="thumbs")
        yield tag("p", "Each is stretched from its lowest to its highest value.", class_="dim")
    yield folded("Values of the reconstructions", table_of(table))


def _as_image(values: np.ndarray) -> np.ndarray | None:
    """Square images of one or three channels; None for anything else."""
    for channels in (1, 3):
        side = round((len(values) / channels) ** 0.5)
        if (
            side * side * channels == len(values)
            and side * side >= LEAST_PIXELS
            and np.isfinite(values).all()
        ):
            low, high = values.min(), values.max()
            image = (
                (255 * (values - low) / max(high - low, 1e-12)).astype(np.uint8).reshape(channels, side, side)
            )
            return image[0] if channels == 1 else image.transpose(1, 2, 0)
    return None

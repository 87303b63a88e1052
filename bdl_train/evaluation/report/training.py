"""How training went: learning curves of all members, and in words whether they had come to an end."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.columns import only
from bdl_train.evaluation.report.ensemble_size import ensemble_size
from bdl_train.evaluation.report.figure import Figure, drawn
from bdl_train.evaluation.report.history import LAST, STILL, end_of
from bdl_train.evaluation.report.html import Html, folded, number, table_of, tag
from bdl_train.evaluation.report.material import Material
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale

MOST_LINES, MOST_POINTS = 60, 250
"""Members whose curves are drawn, and points of a curve."""


def curves(material: Material) -> Html:
    """Learning curves of all members, and what they say."""
    words, level, figures = list(_convergence(material)), "note", list(_figures(material))
    if any(is_bad for _, is_bad in words):
        level = "warn"
    parts: list[Any] = [tag("h2", "Training")]
    parts += [
        tag("p", text, class_=f"verdict {level}" if i == 0 else None) for i, (text, _) in enumerate(words)
    ]
    parts.append(drawn(ensemble_size(material), "size"))
    if figures:
        parts.append(drawn(figures, "training"))
    else:
        parts.append(tag("p", "The run kept no learning curves.", class_="dim"))
    lost = [one for one in _members(material) if one.get("status") != "done"]
    if lost:
        parts += [
            tag("h4", "Members that were lost"),
            table_of(only(pd.DataFrame(lost), ["id", "status", "reason", "stack", "seed"])),
        ]
    if material.history.decisions:
        what = pd.DataFrame(material.history.decisions)
        parts.append(folded(f"{len(what)} things that happened to stacks", table_of(what)))
    return tag("section", *parts, id="training")


def _members(material: Material) -> list[dict[str, Any]]:
    found = material.manifest.get("members")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _convergence(material: Material) -> Iterator[tuple[str, bool]]:
    """Sentences, each with whether it is bad news."""
    members = _members(material)
    done = [one for one in members if one.get("status") == "done"]
    if members:
        lost = len(members) - len(done)
        text = (
            f"All {len(members)} members were trained to the end"
            if not lost
            else f"{lost} of {len(members)} members were lost"
        )
        yield f"{text}.", bool(lost)
    best = np.array([one["best_epoch"] for one in done if isinstance(one.get("best_epoch"), int)])
    trainer = material.config.get("trainer")
    most = trainer.get("max_epochs") if isinstance(trainer, dict) else None
    if len(best):
        text = f"Early stopping kept the weights of epoch {int(np.median(best))} (median; {best.min()} to {best.max()})"
        at_end = int((best == most).sum())
        text += f" of at most {most}." if most else "."
        if at_end:
            text += f" For {at_end} of {len(best)} members that is the last one: more epochs might help."
        yield text, at_end > len(best) / 2
    for key, what in (("val/nll", "validation"), ("train/nll", "training")):
        end = end_of(material.history.frame(key))
        if end is None:
            continue
        change = "falls" if end.last_fall > 0 else "rises"
        by = number(abs(end.last_fall), 3)
        text = f"Over the last {100 * LAST:.0f} % of the curve the mean {what} NLL {change} by {by} nats"
        if end.still_falls:
            text += (
                f", more than {100 * STILL:.0f} % of its whole fall of {number(end.fall, 3)}: it was still falling "
                "when training ended."
            )
        else:
            text += f" (its whole fall is {number(end.fall, 3)}): it had stopped falling."
        yield text, False
        return
    if material.history.curves.get("train/nll"):
        yield "The curves have too few points to say whether the loss had stopped falling.", False


def _figures(material: Material) -> Iterator[Figure]:
    per_epoch = _steps_per_epoch(material)
    axis = "epoch" if per_epoch else "optimiser step"
    frames = {key: material.history.frame(key) for key in ("train/nll", "val/nll")}
    shown = {key: frame for key, frame in frames.items() if not frame.empty}
    if not shown:
        return
    panels, numbers = [], []
    for key, frame in shown.items():
        frame = frame.set_axis(frame.index / (per_epoch or 1))
        thin = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, min(MOST_POINTS, len(frame))).astype(int))]
        values = thin.to_numpy(float)
        mean = np.array([np.nanmean(row) if np.isfinite(row).any() else np.nan for row in values])
        finite = values[np.isfinite(values)]
        y = Scale.over(
            np.quantile(finite, [0.0, 0.985]) if len(finite) else [], mean[min(1, len(mean) - 1) :]
        )
        what = "training" if key.startswith("train") else "validation"
        panel = Panel(
            Scale.over(thin.index.to_numpy(float), pad=0.02), y, axis, "NLL a row, nats", title=what
        )
        for member in list(thin.columns)[:: max(1, -(-len(thin.columns) // MOST_LINES))]:
            panel.line(thin.index, thin[member], 4, class_="member", dashed=False)
        panel.line(thin.index, mean, 0 if key.startswith("train") else 1)
        if len(thin) == 1:
            panel.points([thin.index[0]] * thin.shape[1], values[0], 4, filled=False, mark="circle")
        panels.append(panel)
        table = thin.rename(columns=lambda m: f"member {m}").assign(mean=mean).reset_index(names=axis)
        numbers.append(table.assign(curve=what))
    count = max(len(frame.columns) for frame in shown.values())
    caption = "Thin lines are members, the thick one their mean."
    if count > MOST_LINES:
        caption += f" {MOST_LINES} of {count} members are drawn."
    table = pd.concat(numbers, ignore_index=True)
    table = only(table, ["curve", *[str(name) for name in table.columns if name != "curve"]])
    yield Figure("Learning curves", panels, table, caption)
    yield from _beside(material, per_epoch, axis)


def _beside(material: Material, per_epoch: float | None, axis: str) -> Iterator[Figure]:
    """What stacks report beside their members: the loss of their mixture and how far members disagree."""
    panels, numbers = [], []
    for key, words in (
        ("val/stack_nll", "mixture of a stack, validation NLL"),
        ("val/disagreement", "disagreement of members, validation"),
    ):
        frame = material.history.frame(key)
        if len(frame) < 2:
            continue
        frame = frame.set_axis(frame.index / (per_epoch or 1))
        frame = frame.iloc[
            np.unique(np.linspace(0, len(frame) - 1, min(MOST_POINTS, len(frame))).astype(int))
        ]
        finite = frame.to_numpy(float)[np.isfinite(frame.to_numpy(float))]
        x, y = Scale.over(frame.index.to_numpy(float), pad=0.02), Scale.over(_most(finite))
        panel = Panel(x, y, axis, "nats" if "nll" in key else "", title=words, height=200)
        for stack in list(frame.columns)[:MOST_LINES]:
            panel.line(
                frame.index,
                frame[stack],
                2,
                class_="line" if len(frame.columns) == 1 else "member",
                dashed=False,
            )
        panels.append(panel)
        numbers.append(
            frame.rename(columns=lambda s: f"stack {s}").reset_index(names=axis).assign(curve=words)
        )
    if panels:
        yield Figure(
            "What stacks of members do together",
            panels,
            pd.concat(numbers, ignore_index=True),
            "One line a stack.",
        )


def _most(values: np.ndarray) -> np.ndarray:
    """The range of nearly all values: the first steps of a bad start would squeeze all others."""
    return np.quantile(values, [0.0, 0.985]) if len(values) else values


def _steps_per_epoch(material: Material) -> float | None:
    """Optimiser steps of an epoch, from the steps that stacks planned; None where epochs differ in length."""
    trainer = material.config.get("trainer")
    most = trainer.get("max_epochs") if isinstance(trainer, dict) else None
    planned = [
        value for value in material.history.progress.values() if isinstance(value.get("num_steps"), int)
    ]
    if any(value.get("num_epochs", most) != most for value in planned):
        return None
    steps = [value["num_steps"] for value in planned]
    return max(steps) / most if steps and isinstance(most, int) and most > 0 else None

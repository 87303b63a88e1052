"""The first screen: what was trained, how good it is, and what a reader must look at, in words."""

import re
from collections.abc import Iterator
from typing import Any

import pandas as pd

from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.report.columns import records
from bdl_train.evaluation.report.html import Html, folded, interval, number, table_of, tag
from bdl_train.evaluation.report.material import ORDER, Material
from bdl_train.evaluation.table import HEADLINE

QUALITY = ("accuracy", "rmse")
"""The metric that is told first, of classes and of numbers."""
FEW_LETTERS = 200
"""Of a verdict where several stand beside each other."""


def verdict(material: Material) -> Html:
    """What was trained, four answers, what needs attention and what is missing."""
    return tag(
        "section", *_banners(material), tag("p", _trained(material), class_="lead"),
        tag("div", *_answers(material), class_="answers"), _attention(material), _missing(material), id="verdict",
    )  # fmt: skip


def _banners(material: Material) -> Iterator[Html]:
    if material.status != "complete":
        lost = [one for one in _members(material) if one.get("status") != "done"]
        reasons = sorted({str(one["reason"]) for one in lost if one.get("reason")})
        words = f"This run is {material.status}."
        if lost:
            words += f" {len(lost)} of {len(_members(material))} members are not part of the ensemble"
            words += f": {'; '.join(reasons)}." if reasons else "."
        yield tag("p", words, class_="banner warn")
    if material.only_scores:
        yield tag(
            "p", "This evaluation has scores only. The chapters that scores allow are shown; ",
            tag("code", f"bdl evaluate run={material.run.path}"), " adds the others.", class_="banner",
        )  # fmt: skip
    for problem in material.problems:
        yield tag("p", problem, class_="banner warn")


def _members(material: Material) -> list[dict[str, Any]]:
    found = material.manifest.get("members")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def kind_of(material: Material, group: str) -> str:
    """The choice of a config group, from the name of its class's module."""
    node = material.config.get(group)
    parts = str(node.get("_target_", "") if isinstance(node, dict) else "").split(".")
    return parts[-2].replace("_", " ") if len(parts) > 1 else "unknown"


def data_name(material: Material) -> str:
    data = material.manifest.get("data")
    if isinstance(data, dict) and data.get("name"):
        return str(data["name"])
    return material.run.path.parent.name


def _trained(material: Material) -> str:
    done = sum(one.get("status") == "done" for one in _members(material))
    members = f"{done} members" if done != 1 else "1 member"
    trained_on = material.manifest.get("num_data")
    rows = f", {number(trained_on)} training rows a member," if isinstance(trained_on, int) else ""
    return (
        f"An ensemble of {members} (model {kind_of(material, 'model')}, inference {kind_of(material, 'inference')}, "
        f"likelihood {kind_of(material, 'likelihood')}, prior {kind_of(material, 'prior')}) was trained on "
        f"{data_name(material)}{rows} and scored on the {number(material.num_rows)} rows of its {material.part} part."
    )


# --- four answers -------------------------------------------------------------------------------------------------


def _answers(material: Material) -> Iterator[Html]:
    quality = next((found for key in QUALITY if (found := material.metric(key))), None)
    nll = material.metric("nll")
    if quality is not None:
        beside = f"NLL {_told(nll)}." if nll is not None else ""
        yield _answer(
            "How good?",
            f"{quality.key.upper() if len(quality.key) < 5 else quality.key} {number(quality.value)}",
            f"95 % interval {interval(quality.low, quality.high) or 'unknown'}. {beside}",
            "note",
        )
    elif nll is not None:
        yield _answer("How good?", f"NLL {number(nll.value)}", _told(nll), "note")
    words = {"good": "Yes", "warn": "No", "note": "See its chapter", "empty": "Unknown"}
    for key, question in (("calibration", "Calibrated?"), ("uncertainty", "Is uncertainty useful?")):
        section = material.section(key)
        if section is None:
            yield _answer(question, "Unknown", "This evaluation has no chapter on it.", "empty")
        else:
            yield _answer(question, words[section.level], section.verdict, section.level, key)
    yield _gain(material)


def _told(metric: Metric) -> str:
    unit = "" if metric.unit in ("share", "0..2") else f" {metric.unit}"
    edges = interval(metric.low, metric.high)
    return f"{number(metric.value)}{unit}" + (f" (95 % interval {edges})" if edges else "")


def _gain(material: Material) -> Html:
    question = "Does the ensemble help?"
    gain, nll, best = (material.metric(key) for key in ("gain_nll", "nll", "best_member_nll"))
    if gain is None or gain.value is None:
        return _answer(question, "Unknown", "The members were not scored alone.", "empty")
    if len(_members(material)) == 1:
        return _answer(question, "One member", "There is no ensemble to compare it with.", "note")
    edges = interval(gain.low, gain.high)
    words = f"Its NLL is {number(gain.value, 3)} nats lower than a single member's on average"
    words += f" ({edges})." if edges else "."
    if nll is None or best is None or nll.value is None or best.value is None:
        return _answer(question, "On average", words, "note", "members")
    beats = nll.value < best.value
    words += f" The best single member has {number(best.value)}, the ensemble {number(nll.value)}."
    if beats:
        return _answer(question, "Yes", words, "good", "members")
    return _answer(
        question,
        "Not over the best",
        f"{words} Which member is best is known only afterwards.",
        "note",
        "members",
    )


def _answer(question: str, short: str, words: str, level: str, link: str | None = None) -> Html:
    more = tag("a", "more", href=f"#{link}") if link else None
    return tag(
        "article",
        tag("h3", question),
        tag("p", short, class_="short"),
        tag("p", words, " ", more),
        class_=f"answer {level}",
    )


def _attention(material: Material) -> Html | None:
    warned = [one for one in material.sections if one.level == "warn"]
    if not warned:
        return None
    items = [
        tag("li", tag("a", one.title, href=f"#{one.key}"), f": {_first_words(one.verdict)}") for one in warned
    ]
    return tag("div", tag("h3", "Look at"), tag("ul", *items), class_="attention")


def _first_words(verdict: str) -> str:
    """Whole sentences, one or as many as are short together."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", verdict)
    told = sentences[0]
    for one in sentences[1:]:
        if len(told) + len(one) > FEW_LETTERS:
            return f"{told} …"
        told = f"{told} {one}"
    return told


def _missing(material: Material) -> Html | None:
    empty = [one for one in material.sections if one.level == "empty"]
    absent = [key for key in ORDER if material.section(key) is None]
    if not empty and not absent:
        return None
    items: list[Html] = [
        tag("li", tag("a", one.title, href=f"#{one.key}"), f": {one.verdict}") for one in empty
    ]
    if absent:
        items.append(
            tag("li", f"Not part of this evaluation: {', '.join(one.replace('_', ' ') for one in absent)}.")
        )
    return folded("What is missing", tag("ul", *items), open_=not material.only_scores and bool(empty))


# --- metrics ------------------------------------------------------------------------------------------------------


def metrics(material: Material) -> Html:
    """The headline metrics beside those of single members, then all of them in a fold."""
    beside = _of_members(material)
    shown = [one for key, one in material.metrics.items() if key in HEADLINE and not _is_of_member(key)]
    rows = [_metric_row(one, beside.get(one.key)) for one in shown]
    head = tag(
        "tr",
        *[
            tag("th", text, class_="n" if i else None)
            for i, text in enumerate(("metric", "ensemble", "mean member", "best member"))
        ],
    )
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="metrics")
    everything = pd.DataFrame(
        [
            {"metric": m.key, "value": m.value, "low": m.low, "high": m.high, "unit": m.unit, "better": m.better,
             "meaning": m.meaning, "reason": m.reason or ""}
            for m in material.metrics.values()
        ]
    )  # fmt: skip
    return tag(
        "section", tag("h2", "Metrics"),
        tag("div", table, class_="scroll", tabindex="0"),
        tag(
            "p", "Intervals are 95 % bootstrap intervals over rows: they say how far other rows of the same kind might "
            "move a number, not another training. The best member is the one with the least NLL, known only "
            "afterwards.", class_="dim",
        ),
        folded(f"All {len(everything)} metrics", table_of(everything)), id="metrics",
    )  # fmt: skip


def _is_of_member(key: str) -> bool:
    return key.startswith(("mean_member_", "best_member_"))


def _of_members(material: Material) -> dict[str, tuple[Any, Any]]:
    """(mean member, best member by NLL) by metric."""
    section = material.section("members")
    if section is not None and "compared" in section.tables:
        table = section.tables["compared"]
        return {row["metric"]: (row["mean_member"], row["best_member_by_nll"]) for row in records(table)}
    found = {}
    for key in material.metrics:
        mean, best = material.metric(f"mean_member_{key}"), material.metric(f"best_member_{key}")
        if mean or best:
            found[key] = (mean.value if mean else None, best.value if best else None)
    return found


def _metric_row(metric: Metric, beside: tuple[Any, Any] | None) -> Html:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(metric.better, "")
    unit = f", {metric.unit}" if metric.unit not in ("share", "0..2") else ""
    edges = interval(metric.low, metric.high)
    mean, best = beside or (None, None)
    value = number(metric.value) if metric.value is not None else f"– {metric.reason or ''}"
    return tag(
        "tr", tag("td", tag("b", f"{metric.key}{arrow}"), tag("span", f"{metric.meaning}{unit}", class_="dim")),
        tag("td", value, tag("span", edges, class_="dim") if edges else None, class_="n"),
        tag("td", number(mean) if mean is not None else "", class_="n"),
        tag("td", number(best) if best is not None else "", class_="n"),
    )  # fmt: skip

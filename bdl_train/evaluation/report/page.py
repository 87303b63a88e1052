"""The report of an evaluation: one HTML file that needs no other and asks for nothing."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from bdl_train import __version__
from bdl_train.evaluation.report import provenance, training
from bdl_train.evaluation.report.chapters import drawing_of
from bdl_train.evaluation.report.figure import drawn
from bdl_train.evaluation.report.headline import data_name, metrics, verdict
from bdl_train.evaluation.report.html import Html, folded, join, table_of, tag
from bdl_train.evaluation.report.material import Material, read_material
from bdl_train.evaluation.section import Section
from bdl_train.files import write_bytes
from bdl_train.runs import RunDir

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MARKS = {"good": "✓", "warn": "!", "note": "·", "empty": "–"}
SAID = {
    "good": "as it should be",
    "warn": "needs attention",
    "note": "for information",
    "empty": "nothing to show",
}


def write_report(run: RunDir, name: str) -> Path:
    """Write `evaluation/<name>/report.html` and return its path.

    Args:
        run: With this evaluation.
        name: Of the evaluation.

    Raises:
        UsageError: there is no such evaluation, or its metrics cannot be read.
    """
    path = run.evaluation(name) / "report.html"
    write_bytes(path, page(read_material(run, name)).encode())
    return path


def page(material: Material) -> str:
    """The whole document."""
    title = f"{data_name(material)}: {material.name} evaluation"
    before = [
        ("verdict", "Verdict", None, verdict(material)),
        ("metrics", "Metrics", None, metrics(material)),
        ("configuration", "Configuration", None, provenance.configuration(material)),
    ]
    chapters = [(one.key, one.title, one.level, _chapter(one)) for one in material.sections]
    first = [one for one in chapters if one[0] == "data"]
    rest = [one for one in chapters if one[0] != "data"]
    curves = [("training", "Training", None, training.curves(material))]
    after = [("provenance", "Provenance", None, provenance.provenance(material))]
    listed = [*before, *first, *curves, *rest, *after]
    style = (files("bdl_train.evaluation.report") / "static" / "style.css").read_text(encoding="utf-8")
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"), tag("title", title), tag("style", Html(style)),
    )  # fmt: skip
    nav = tag(
        "nav",
        tag("ul", *[tag("li", _link(key, name, level)) for key, name, level, _ in listed]),
        aria_label="Chapters",
    )
    top = tag(
        "header", tag("p", "Evaluation report", class_="over"), tag("h1", title),
        tag("p", f"Run {material.run.path.name}, {material.status}", class_="dim"),
    )  # fmt: skip
    main = tag("main", top, *[content for *_, content in listed], _foot(material))
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", nav, main), lang="en") + "\n"


def _link(key: str, name: str, level: str | None) -> Html:
    mark = None if level is None else tag("span", MARKS[level], class_=f"mark {level}", title=SAID[level])
    return tag("a", mark, name, href=f"#{key}")


def _foot(material: Material) -> Html:
    words = (
        f"Written by bdl_train {__version__} from {material.run.path.name}/evaluation/{material.name}/. Each figure "
        "has its numbers behind it. Folds that are closed are left out when the page is printed."
    )
    return tag("footer", tag("p", words, class_="dim"))


def _chapter(section: Section) -> Html:
    """Title, words, figures, warnings."""
    parts: list[Any] = [
        tag("h2", section.title),
        tag(
            "p",
            tag("span", MARKS[section.level], class_=f"mark {section.level}", title=SAID[section.level]),
            section.verdict,
            class_=f"verdict {section.level}",
        ),
    ]
    parts.append(_body(section))
    if section.warnings:
        items = tag("ul", *[tag("li", text) for text in section.warnings], class_="warnings")
        parts.append(items if len(section.warnings) <= 5 else folded(f"{len(section.warnings)} notes", items))
    return tag("section", *parts, id=section.key)


def _body(section: Section) -> Html | None:
    if section.level == "empty":
        return None
    draw = drawing_of(section.key)
    if draw is None:
        return join(_plain(section, open_=True))
    try:
        return drawn(list(draw(section)), section.key)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        words = (
            f"The figures of this chapter cannot be drawn from its tables ({type(error).__name__} {error})."
        )
        return join([tag("p", words, class_="banner warn"), *_plain(section, open_=False)])


def _plain(section: Section, open_: bool) -> list[Html]:
    return [
        folded(f"{name.replace('_', ' ')}, {len(table):,} rows", table_of(table), open_=open_)
        for name, table in section.tables.items()
    ]

"""The page: it stands alone, says what it has and what it lacks, and no text breaks out of its place."""

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_runs import CLASS, NUMBER, chapters, class_rows, number_rows

from bdl_train.errors import UsageError
from bdl_train.evaluation.report.chapters import drawing_of
from bdl_train.evaluation.report.headline import metrics, verdict
from bdl_train.evaluation.report.html import VOID
from bdl_train.evaluation.report.material import ORDER, read_material, rows_of
from bdl_train.evaluation.report.page import POLICY, page, write_report
from bdl_train.evaluation.section import Section, write_section
from bdl_train.files import write_json
from bdl_train.runs import RunDir

URL = re.compile(r"""(?:https?:)?//\w|url\(|@import|\bsrc="(?!data:)|\bhref="(?!#)|javascript:""", re.I)


class Seen(HTMLParser):
    """Checks that elements are nested, and keeps ids, links and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert not [name for name in found if name.startswith("on")]
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def of(run: RunDir) -> str:
    return write_report(run, "test").read_text()


@pytest.fixture(params=["classes", "numbers"])
def full_run(request, make_run) -> RunDir:
    rows, target = (class_rows(), CLASS) if request.param == "classes" else (number_rows(), NUMBER)
    return make_run(rows, target, chapters(rows, target))


def test_the_page_stands_alone_and_is_whole(full_run):
    text = of(full_run)
    seen = Seen(text)
    assert URL.findall(text) == []
    assert POLICY in text.replace("&#x27;", "'")
    assert not {"script", "link", "iframe", "object", "form", "i"} & set(seen.tags)
    assert len(set(seen.ids)) == len(seen.ids)
    assert {link.removeprefix("#") for link in seen.links} <= set(seen.ids)
    assert "nan" not in re.sub(r"[\w-]*nan\w+", "", text.lower())


def test_every_figure_has_its_numbers(full_run):
    figures = re.findall(r"<figure.*?</figure>", of(full_run), re.S)
    assert len(figures) >= 5
    for one in figures:
        assert "<svg" in one
        assert "Numbers behind this figure" in one
        assert re.search(r"<details>.*<tbody><tr>", one, re.S)


def test_equal_evaluations_give_equal_bytes(full_run):
    assert of(full_run) == of(full_run)


def test_chapters_come_in_order_with_their_words(full_run):
    material = read_material(full_run, "test")
    text = page(material)
    places = [text.index(f'<section id="{one.key}"') for one in material.sections]
    assert places == sorted(places)
    assert [one.key for one in material.sections] == [key for key in ORDER if material.section(key)]
    bands = material.section("bands")
    assert bands is not None
    assert ("Classes have no bands." in text) == (bands.level == "empty")


def test_a_train_only_run_has_the_chapters_that_scores_allow(make_run):
    rows = class_rows()
    material = read_material(make_run(rows, CLASS), "test")
    assert material.only_scores
    assert [one.key for one in material.sections] == ["calibration", "uncertainty", "deferral"]
    text = page(material)
    assert f"bdl evaluate run={material.run.path}" in text
    again, target = rows_of(
        pd.read_parquet(material.run.evaluation("test") / "predictions.parquet"), material.posterior
    )
    np.testing.assert_array_equal(again.probs, rows.probs)  # pyright: ignore[reportArgumentType]
    assert target.classes == CLASS.classes


def test_an_empty_chapter_says_why_and_a_warned_one_is_listed_first(make_run):
    empty = Section.empty("robustness", "Robustness", "It was <not> asked for.")
    table = pd.DataFrame({"x": [1]})
    warned = Section(
        "unknown_key", "Something new", "It is bad. Very.", "warn", {"numbers_of": table}, ("Beware of <b>.",)
    )
    text = of(make_run(class_rows(), CLASS, [empty, warned]))
    assert "It was &lt;not&gt; asked for." in text
    assert text.index('href="#unknown_key"', text.index('class="attention"')) < text.index(
        '<section id="metrics"'
    )
    own = text[text.index('<section id="unknown_key"') :]
    assert "numbers of, 1 rows" in own  # a chapter that nobody draws shows its tables
    assert "Beware of &lt;b&gt;." in own


def test_damage_is_named_and_the_rest_is_shown(full_run):
    folder = full_run.evaluation("test") / "sections"
    (folder / "calibration.json").write_text("{")
    (folder / "deferral.curve.parquet").write_bytes(b"no parquet")
    table = pd.DataFrame({"other": [1.0]})
    broken = Section(
        "uncertainty", "Uncertainty", "Fine.", "good", {"histogram": table, "error_by_uncertainty": table}
    )
    write_section(folder, broken)
    text = of(full_run)
    assert "calibration.json cannot be read" in text
    assert "deferral.json is damaged" in text
    assert "cannot be drawn from its tables (KeyError" in text
    assert '<section id="examples"' in text
    assert str(folder) not in text


def test_a_damaged_run_still_has_a_report(full_run):
    full_run.manifest.write_text("[]")
    full_run.config.write_text("a: [")
    (full_run.posterior / "posterior.json").unlink()
    text = of(full_run)
    assert "without a manifest" in text
    assert "config.yaml cannot be read" in text


def test_what_cannot_be_reported_is_refused(make_run):
    run = make_run(class_rows(), CLASS)
    with pytest.raises(UsageError, match=r"no evaluation of this name; there are: test"):
        write_report(run, "val")
    (run.evaluation("test") / "metrics_detail.parquet").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"metrics_detail.parquet is damaged"):
        write_report(run, "test")


# --- the first screen ---------------------------------------------------------------------------------------------


def test_the_verdict_gives_the_numbers_and_says_what_is_missing(full_run):
    material = read_material(full_run, "test")
    text = verdict(material)
    assert "An ensemble of 2 members" in text
    assert "120 rows of its test part" in text
    assert "The members were not scored alone." in text
    assert "Not part of this evaluation:" in text


def test_a_partial_run_says_so_before_anything_else(make_run):
    members = [{"id": 0, "status": "done"}, {"id": 1, "status": "failed", "reason": "it <diverged>"}]
    text = of(make_run(class_rows(), CLASS, members=members, status="partial"))
    assert "This run is partial. 1 of 2 members are not part of the ensemble: it &lt;diverged&gt;." in text
    assert text.index("This run is partial") < text.index("How good?")


@pytest.mark.parametrize(("best", "answer"), [(0.4, "Not over the best"), (0.6, ">Yes<")])
def test_the_gain_is_judged_against_the_best_member_too(make_run, best, answer):
    run = make_run(class_rows(), CLASS)
    path = run.evaluation("test") / "metrics_detail.parquet"
    table = pd.read_parquet(path)
    table.loc[table["key"] == "test/nll", "value"] = 0.5
    more = {"gain_nll": 0.1, "best_member_nll": best, "mean_member_nll": 0.6}
    rows = [
        {"key": f"test/{key}", "slice": "all", "value": value, "unit": "nats", "n": 120}
        for key, value in more.items()
    ]
    pd.concat([table, pd.DataFrame(rows).assign(meaning="", better="lower")]).to_parquet(path)
    material = read_material(run, "test")
    helps = verdict(material).partition("Does the ensemble help?")[2]
    assert answer in helps.partition("</article>")[0]
    row = next(one for one in metrics(material).split("<tr>") if "<b>nll" in one)
    assert [re.sub("<.*?>", "", cell) for cell in re.findall(r'<td class="n">.*?</td>', row)][1:] == [
        "0.6",
        str(best),
    ]


def test_every_known_chapter_can_be_drawn():
    assert [key for key in ORDER if drawing_of(key) is None] == []
    assert drawing_of("nothing") is drawing_of("sweeps/../x") is None


def test_ten_thousand_rows_take_seconds(make_run):
    rows = number_rows(10_000)
    run = make_run(rows, NUMBER, chapters(rows, NUMBER))
    start = time.monotonic()
    path = write_report(run, "test")
    assert time.monotonic() - start < 10
    assert path.stat().st_size < 3_000_000


def test_nothing_else_in_the_folder_changes(full_run):
    folder = full_run.evaluation("test")
    before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    write_json(folder / "hashes.json", {})
    before[folder / "hashes.json"] = (folder / "hashes.json").read_bytes()
    write_report(full_run, "test")
    after = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {folder / "report.html"}

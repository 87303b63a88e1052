"""The page stands alone, escapes what it is given, and shows every number that it draws."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
from paired_runs import scored_experiment

from bdl_train.evaluation.comparison import paired_section
from bdl_train.evaluation.comparison_page import comparison_page

TABLE = pd.DataFrame({"inference": ["swag"], "runs": [2], "test/nll": [1.5], "test/nll se": [0.25]})


class Balanced(HTMLParser):
    """Fails on elements that are not closed in order, and collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [str(value) for key, value in attrs if key == "id"]
        assert not any(key in ("src", "onclick", "onload") for key, _ in attrs)
        assert all(str(value).startswith("#") for key, value in attrs if key == "href")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(*experiments, table: pd.DataFrame = TABLE) -> str:
    text = comparison_page("runs/*", table, paired_section(experiments, [], seed=0)).decode()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    return text


def test_the_page_stands_alone_with_a_figure_for_each_metric_and_its_numbers():
    text = page_of(scored_experiment("base", splits=4), scored_experiment("good", splits=4, gain=0.2))
    assert text.count("<figure") == 4
    assert text.count("Numbers behind this figure") == 4
    assert "1.500 ± 0.250" in text
    assert "good against base, 4 splits: beats it in NLL" in text
    assert not re.search(r"https?://|<script|@import|url\(", text)
    assert "default-src &#x27;none&#x27;" in text
    section = paired_section(
        [scored_experiment("base", splits=4), scored_experiment("good", splits=4, gain=0.2)], [], seed=0
    )
    for value in section.tables["splits"]["difference"]:
        assert f"{value:.4g}".replace("-", "−") in text


def test_names_are_escaped():
    text = page_of(scored_experiment("a"), scored_experiment("<script>alert(1)</script>&"))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_intervals_are_drawn_around_their_difference():
    base, other = scored_experiment("base"), scored_experiment("good", gain=0.5)
    text = page_of(base, other)
    # The first figure: the interval's path, and the point between its ends (a triangle whose top is its middle).
    low, high = map(float, re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)" class="error c2"', text)[0])
    point = float(re.findall(r'd="M([\d.]+) [\d.]+L[^"]*" class="dot c2"', text)[0])
    zero = float(re.findall(r'd="M([\d.]+) 0V[\d.]+" class="even"', text)[0])
    section = paired_section([base, other], [], seed=0)
    row = section.tables["differences"].iloc[0]
    # Places are linear in values.
    unit = (zero - low) / -row["low"]
    assert abs(zero + unit * row["high"] - high) < 0.5
    assert abs(zero + unit * row["difference"] - point) < 0.5


def test_without_pairs_the_page_says_so():
    text = page_of(scored_experiment("a"), scored_experiment("b", data="other"))
    assert "There are no two experiments on the same rows." in text
    assert "b cannot be paired with a" in text
    assert "<figure" not in text
    assert "Paired" not in comparison_page("one", TABLE, None).decode()


def test_an_interval_that_is_not_known_is_said_and_not_drawn():
    base, other = scored_experiment("a"), scored_experiment("b")
    other.runs[0].columns["nll"][0] = np.nan
    text = page_of(base, other)
    assert "Without an interval: b." in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower()

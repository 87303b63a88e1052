"""`bdl report`: the file, what it refuses, and the page of a full evaluation in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bdl_train.runs import RunDir

EVERYTHING = (
    "find_slices=true", "recalibrate=true", "conformal=[0.9]", "robustness=true", "sensitivity=true",
    "attacks=[0.1,0.3]", "privacy=true", "max_rows=60",
)  # fmt: skip


def copy_of(run: RunDir, folder: Path) -> RunDir:
    return RunDir(shutil.copytree(run.path, folder / run.path.name))


def test_a_trained_run_has_a_report_at_once(bdl, class_run, tmp_path):
    run = copy_of(class_run, tmp_path)
    said = bdl("report", f"run={run.path}")
    assert said.status == 0, said.err
    path = run.evaluation("test") / "report.html"
    assert said.out == f"written: {path}\n"
    text = path.read_text()
    assert "breast_cancer" in text
    assert "bdl train data=sklearn" in text


def test_what_it_refuses(bdl, class_run, tmp_path):
    missing = bdl("report", f"run={class_run.path}", "name=val")
    assert missing.status == 2
    assert "no evaluation of this name; there are: test" in missing.err
    assert "is not a directory" in bdl("report", f"run={tmp_path / 'nothing'}").err
    assert "run must be given" in bdl("report").err
    assert bdl("report", f"run={class_run.path}", "name=../x").status == 2


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


def requests(browser: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]


SMALLEST_TEXT = """
const small = [...document.querySelectorAll('figure > .panels text')].filter((text) => {
  const svg = text.ownerSVGElement.closest('svg.panel');
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return parseFloat(getComputedStyle(text).fontSize) * scale < 8.5 && svg.checkVisibility();
});
return small.map((text) => text.textContent);
"""
CUT_TEXT = """
return [...document.querySelectorAll('figure > .panels text')].filter((text) => {
  const svg = text.ownerSVGElement.closest('svg.panel'), [a, b] = [text, svg].map((one) => one.getBoundingClientRect());
  return svg.checkVisibility() && (a.left < b.left - 3 || a.right > b.right + 3);
}).map((text) => text.textContent);
"""


@pytest.mark.ci
@pytest.mark.browser
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["class_run", "number_run"])
def test_the_page_of_a_full_evaluation_in_a_browser(bdl, browser, tmp_path, request, kind):
    run = copy_of(request.getfixturevalue(kind), tmp_path)
    slices = {"class_run": "slices=['mean radius>14']", "number_run": "slices=[colour,width>5]"}[kind]
    assert bdl("evaluate", f"run={run.path}", slices, *EVERYTHING).status == 0
    assert bdl("report", f"run={run.path}").status == 0
    path = run.evaluation("test") / "report.html"
    assert "cannot be drawn" not in path.read_text()
    for kind_of_log in ("browser", "performance"):
        browser.get_log(kind_of_log)  # of pages before
    for width in (1280, 390):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(path.as_uri())
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        browser.execute_script("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        figures = browser.execute_script(
            "return [...document.querySelectorAll('figure svg.panel, img')].map((one) => {"
            "const box = one.getBoundingClientRect(); return [box.width, box.height]})"
        )
        assert len(figures) > 20
        assert min(min(size) for size in figures) > 60
        assert browser.execute_script(SMALLEST_TEXT) == []
        assert browser.execute_script(CUT_TEXT) == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:"))] == []

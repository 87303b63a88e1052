"""The pages in a real browser: headless Chromium, driven over its DevTools by Selenium."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from bdl_train.evaluation.section import Section, write_section
from bdl_train.events import EventWriter
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking.chapters import SECTIONS

pytestmark = [pytest.mark.ci, pytest.mark.browser]


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


def until(browser: Any, script: str) -> Any:
    end = time.monotonic() + 60
    while not (found := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, browser.page_source[-3000:]
        time.sleep(0.1)
    return found


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_list_run_and_comparison_show_what_there_is(browser, serve, runs_root, class_run, number_run):
    browser.set_window_size(1280, 900)
    with serve(runs_root) as server:
        browser.get(server.url)
        until(browser, "document.querySelectorAll('#rows tr').length == 2")
        browser.execute_script("document.querySelectorAll('#rows input').forEach((box) => box.click())")
        browser.execute_script("document.getElementById('compare').click()")
        until(browser, "document.querySelectorAll('#compared tbody tr').length > 5")
        for run, figures in ((class_run, 3), (number_run, 4)):
            browser.get(f"{server.url}#/run/{quote(f'{run.path.parent.name}/{run.path.name}', safe='')}")
            until(browser, f"document.querySelectorAll('main svg').length == {figures}")
            assert browser.execute_script("return document.querySelectorAll('.tile.done').length") == 2
            assert browser.execute_script("return document.querySelectorAll('#metrics tr').length") > 5
        browser.execute_script("document.querySelector('.tile').click()")
        until(browser, "document.querySelectorAll('svg .thin').length == 2")
        assert complaints(browser) == []
        origin = server.url.rstrip("/")
        asked = browser.execute_script(
            "return performance.getEntriesByType('resource').map((one) => one.name)"
        )
        assert asked
        assert all(one.startswith(origin) or one.startswith("data:") for one in asked)


def test_a_phone_needs_no_sideways_scrolling(browser, serve, runs_root, class_run):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        with serve(runs_root) as server:
            for page in ("", f"#/run/{quote(f'breast_cancer/{class_run.path.name}', safe='')}"):
                browser.get(server.url + page)
                until(browser, "document.querySelectorAll('main table').length > 0")
                assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_running_run_grows_on_the_page_and_its_names_are_no_markup(
    browser, serve, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(RunDir, "status", lambda self: "running")
    run = RunDir(tmp_path / "<img src=x onerror=alert(1)>" / "20260101-000000-abcdef")
    run.path.mkdir(parents=True)
    run.config.write_text("a: <script>alert(2)</script>\n")
    write_json(
        run.plan, {"stacks": [{"id": "000", "members": [0, 1]}], "reasons": ["<b>why</b>"], "num_workers": 1}
    )
    writer = EventWriter(run.stack("000") / "events.jsonl")

    def report(step: int) -> None:
        writer.write("train/nll", [(0, 1 / step), (1, 2 / step)], step=step)
        writer.flush()

    report(1)
    with serve(tmp_path) as server:
        browser.get(f"{server.url}#/run/{quote(f'{run.path.parent.name}/{run.path.name}', safe='')}")
        until(browser, "document.querySelectorAll('.tile').length == 2")
        before = browser.execute_script(
            "return document.querySelector('svg .mark').getAttribute('points').split(' ').length"
        )
        threading.Timer(0.5, lambda: [report(step) for step in range(2, 6)]).start()
        until(
            browser,
            f"document.querySelector('svg .mark').getAttribute('points').split(' ').length == {before + 4}",
        )
        # Steps that a phase left out when it ended early are not drawn.
        for step in (40, 41):
            report(step)
        until(browser, "document.querySelectorAll('svg .mark').length == 2")
        assert browser.execute_script(
            "return [...document.querySelectorAll('svg .mark')]"
            ".map((line) => line.getAttribute('points').split(' ').length)"
        ) == [5, 2]
        assert (
            browser.execute_script("return document.querySelectorAll('main img, main script, main b').length")
            == 0
        )
        assert complaints(browser) == []
    writer.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_chapters_say_how_to_take_them_and_lead_to_the_report(browser, serve, tmp_path: Path, width):
    run = RunDir(tmp_path / "energy" / "20260101-000000-abcdef")
    run.path.mkdir(parents=True)
    run.config.write_text("a: 1\n")
    write_json(run.plan, {"stacks": [], "reasons": []})
    folder = run.evaluation("test") / SECTIONS
    text = "<img src=x onerror=alert(1)> " + "long_name_without_a_space" * 8
    write_section(folder, Section("a", "Robustness", text, "warn", warnings=("<b>one</b>", "two")))
    write_section(folder, Section("b", "Slices", "No slices were asked for.", "empty"))
    (folder / "c.json").write_text("{")
    (run.evaluation("test") / "report.html").write_text(
        "<!doctype html><title>report</title><style>p { color: rgb(1, 2, 3) }</style><p id=p>text</p>"
        "<script>document.title = 'script'</script>"
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 640},
    )
    try:
        with serve(tmp_path, token="s3cret") as server:
            browser.get(server.url)
            until(browser, "document.querySelectorAll('#rows tr').length == 1")
            browser.get(f"{server.url.split('?')[0]}#/run/{quote('energy/20260101-000000-abcdef', safe='')}")
            until(browser, "document.querySelectorAll('.chapter').length == 3")
            words = browser.execute_script(
                "return [...document.querySelectorAll('.chapter .level')].map((one) => one.textContent)"
            )
            assert words == ["look here", "nothing", "damaged"]
            assert (
                browser.execute_script("return document.querySelectorAll('.chapter img, .chapter b').length")
                == 0
            )
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            remarks = "document.querySelector('.chapter details')"
            assert not browser.execute_script(f"return {remarks}.open")
            browser.execute_script(f"{remarks}.open = true")
            browser.execute_script("return refresh()")
            until(browser, f"{remarks}.open && !!{remarks}.querySelector('li')")  # a poll folds nothing
            assert complaints(browser) == []
            browser.get(browser.execute_script("return document.querySelector('a.button').href"))
            assert browser.title == "report"  # its script did not run
            color = browser.execute_script("return getComputedStyle(document.getElementById('p')).color")
            assert color == "rgb(1, 2, 3)"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        complaints(browser)

"""Add up the JUnit files of several pytest runs: a line with the total, and no test may be left out.

    python scripts/ci_total.py first.xml second.xml

A test that one run skipped must have run in another; the only excuse is a machine without a GPU.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

EXCUSE = "no CUDA device"
RANK = ("skipped", "passed", "failed")  # of two outcomes of one test the later one here counts


def outcomes(files: Iterable[Path]) -> dict[str, tuple[str, str]]:
    """Test to its outcome over all runs, and the reason of a skip."""
    found: dict[str, tuple[str, str]] = {}
    for file in files:
        for case in ElementTree.parse(file).getroot().iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            skipped = case.find("skipped")
            outcome, reason = "passed", ""
            if case.find("failure") is not None or case.find("error") is not None:
                outcome = "failed"
            elif skipped is not None and skipped.get("type") != "pytest.xfail":
                outcome, reason = "skipped", skipped.get("message", "")
            if test not in found or RANK.index(outcome) > RANK.index(found[test][0]):
                found[test] = outcome, reason
    return found


def main(files: Iterable[Path]) -> int:
    """Print what was left out and the total; 0 if every test passed or is excused."""
    found = outcomes(files)
    left_out = {
        test: reason
        for test, (outcome, reason) in found.items()
        if outcome == "skipped" and EXCUSE not in reason
    }
    for test, reason in sorted(left_out.items()):
        print(f"left out, but must run here: {test} ({reason})")
    count = {one: sum(outcome == one for outcome, _ in found.values()) for one in RANK}
    print(f"total: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    return int(bool(left_out) or count["failed"] > 0 or count["passed"] == 0)


if __name__ == "__main__":
    raise SystemExit(main(Path(name) for name in sys.argv[1:]))

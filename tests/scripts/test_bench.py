"""The benchmarks that the README names run with the settings of today."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.mark.ci
@pytest.mark.parametrize("name", ["bench_stack", "bench_mclmc"])
def test_benchmark_runs_and_prints_a_ratio(name: str):
    done = subprocess.run(
        [sys.executable, BENCH / f"{name}.py", "--quick"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bare" in done.stdout

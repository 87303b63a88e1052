"""Scoring 100 posterior samples on a million rows of 10 classes: memory, and time against a loop over the samples.

    python scripts/bench/bench_evaluation.py            # all parts
    python scripts/bench/bench_evaluation.py 200000     # fewer rows

Prints the time of the shipped evaluation and of a plain loop over the samples in the same process (one forward pass a
sample over large batches, probabilities added up, nothing else), the peak memory of each in a process of its own, and
the time of all bootstrap intervals of 100,000 rows.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bdl_train.build import build
from bdl_train.data import Part
from bdl_train.evaluation.bootstrap import metrics_with_intervals, resamples_for
from bdl_train.evaluation.shards import score_part
from bdl_train.likelihoods import Likelihood
from bdl_train.models import architecture_from
from bdl_train.posteriors.artefact import Artefact, read_artefact, write_member, write_meta
from bdl_train.posteriors.atoms import Atoms
from bdl_train.predictive.predict import Predictor
from bdl_train.specs import InputSpec, TargetKind, TargetSpec
from bdl_train.stack import build_stack

MEMBERS, ATOMS, FEATURES, CLASSES, HIDDEN = 10, 10, 20, 10, 50
REPEATS = 3


def make(folder: Path) -> None:
    """A posterior of random weights on disk."""
    architecture = {
        "_target_": "bdl_train.models.mlp.Mlp", "hidden": [HIDDEN], "activation": "relu", "dropout": 0.0
    }  # fmt: skip
    likelihood = {"_target_": "bdl_train.likelihoods.categorical.Categorical"}
    inputs = InputSpec((FEATURES,), (1,) * FEATURES, tuple(f"x{i}" for i in range(FEATURES)))
    target = TargetSpec(TargetKind.CLASS, "label", tuple(str(k) for k in range(CLASSES)))
    build(likelihood, Likelihood, key="likelihood")
    network = architecture_from(architecture)
    members = []
    for m in range(MEMBERS):
        _, stack = build_stack(lambda: network.network(inputs, CLASSES), [100 * m + a for a in range(ATOMS)])
        entry = write_member(folder, m, Atoms(stack.flat, stack.buffers))
        members.append({"id": m, "status": "done", **entry})
    meta = {
        "architecture": architecture, "likelihood": likelihood, "inputs": inputs.to_json(),
        "target": target.to_json(), "transform": None, "dtype": "float32", "num_draws": ATOMS, "draw_seed": 0,
        "layout": {"names": list(stack.layout.names), "shapes": [list(s) for s in stack.layout.shapes]},
        "members": members, "files": {},
    }  # fmt: skip
    write_meta(folder, meta)


def rows_of(count: int) -> Part:
    random = np.random.default_rng(0)
    x = random.standard_normal((count, FEATURES), dtype=np.float32)
    return Part(x, random.integers(0, CLASSES, count), np.arange(count))


def shipped(artefact: Artefact, part: Part) -> np.ndarray:
    rows, _ = score_part(Predictor(artefact), part, artefact.target)
    assert rows.probs is not None
    return rows.probs


def plain(artefact: Artefact, part: Part) -> np.ndarray:
    """One sample after another, with batches of 8192 rows."""
    network = artefact.network()
    total = np.zeros((len(part), CLASSES))
    with torch.no_grad():
        for chunk in artefact.posterior.draw(chunk_size=1):
            torch.nn.utils.vector_to_parameters(chunk.flat[0], network.parameters())
            for start in range(0, len(part), 8192):
                x = torch.from_numpy(part.x[start : start + 8192])
                total[start : start + 8192] += network(x).softmax(-1).numpy() / (MEMBERS * ATOMS)
    return total


WAYS = {"shipped": shipped, "plain": plain}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        artefact = read_artefact(folder)
        part = rows_of(count)
        seconds: dict[str, list[float]] = {"plain": [], "shipped": []}
        results = {}
        for _ in range(REPEATS):  # in turns: other work on the machine then meets both
            for way, run in (("plain", plain), ("shipped", shipped)):
                start = time.perf_counter()
                results[way] = run(artefact, part)
                seconds[way].append(time.perf_counter() - start)
        np.testing.assert_allclose(results["shipped"], results["plain"], atol=1e-5)
        threads = torch.get_num_threads()
        print(
            f"{MEMBERS * ATOMS} samples x {count:,} rows x {CLASSES} classes, {threads} threads, median of {REPEATS}"
        )
        middle = {way: float(np.median(each)) for way, each in seconds.items()}
        ratio = float(np.median(np.divide(seconds["shipped"], seconds["plain"])))
        print(
            f"plain loop {middle['plain']:.1f} s, shipped {middle['shipped']:.1f} s with all scores of rows and members"
        )
        print(f"shipped / plain {ratio:.2f}")
        for way in WAYS:
            words = [sys.executable, __file__, "peak", way, str(folder), str(count)]
            told = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
            print(f"peak memory, {way}: {told}")
        few = rows_of(min(count, 100_000))
        rows, _ = score_part(Predictor(artefact), few, artefact.target)
        start = time.perf_counter()
        found = metrics_with_intervals(rows, "")
        took = time.perf_counter() - start
        print(
            f"{resamples_for(len(rows))} resamples of {len(rows):,} rows, {len(found)} metrics: {took:.1f} s"
        )


def peak(way: str, folder: str, count: int) -> None:
    artefact, part = read_artefact(Path(folder)), rows_of(count)
    before = highest_mib()
    WAYS[way](artefact, part)
    print(f"{highest_mib():.0f} MiB in all, {before:.0f} MiB before scoring")


def highest_mib() -> float:
    """Largest resident memory of this process so far; unlike ru_maxrss it starts anew with the program."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()

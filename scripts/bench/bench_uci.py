"""UCI regression by every method: trains through the command, scores validation and test parts, keeps one row a run.

    python scripts/bench/bench_uci.py                              # 5 splits, all sets: the tables
    python scripts/bench/bench_uci.py --splits 20 --sets energy concrete --methods mclmc-4x16
    python scripts/bench/bench_uci.py --protocol gap --sets concrete energy
    python scripts/results.py                                      # the tables of the README, from the rows

Needs `$BDL_DATA_ROOT`. Rows that are already in `docs/results/uci.csv` are not run again: the file is the state, and a
benchmark that was stopped goes on. Every run is `bdl train` with the method's shipped settings and what `CASES` says;
the validation part, a tenth of the training rows of a split, stops members and chooses methods, the test part does
nothing but give the figures.
"""

import argparse
import json
import tempfile
from pathlib import Path

from _command import Rows, bdl, cost

SETS = ("concrete", "energy", "wine-quality-red", "kin8nm", "power-plant", "protein-tertiary-structure")
NUM_SPLITS = {"protein-tertiary-structure": 5}
NUM_FEATURES = {
    "concrete": 8, "energy": 8, "wine-quality-red": 11, "kin8nm": 8, "power-plant": 4, "protein-tertiary-structure": 9,
}  # fmt: skip
BATCH_SIZE = {"power-plant": 128, "protein-tertiary-structure": 512}
"""Where it is not the shipped 32; chosen with deep ensembles on the validation part of split 0: 32 (power-plant) and
128 (protein) were worse and slower."""
COMMON = ("data=uci", "likelihood=heteroscedastic_gaussian", "cluster=inline", "cluster.cpus_per_stack=1")
ALL_ROWS = "data.val_fraction=0"
"""Nothing is held back, as in most published figures: such a row has no validation scores and is never chosen."""
CASES: dict[str, tuple[str, ...]] = {
    "deep_ensemble": ("inference=deep_ensemble",),
    "swag": ("inference=swag",),
    "anchored": ("inference=anchored", "inference.patience=50"),
    "snapshot": ("inference=snapshot",),
    "mc_dropout": ("inference=mc_dropout", "model.dropout=0.05"),
    "laplace": ("inference=laplace",),
    "mean_field_vi": ("inference=mean_field_vi",),
    "ivon": ("inference=ivon",),
    "sgld": ("inference=sgld",),
    "sghmc": ("inference=sghmc",),
    "cyclical_sgmcmc": ("inference=cyclical_sgmcmc",),
    "svgd": ("inference=svgd",),
    "repulsive_ensemble": ("inference=repulsive_ensemble",),
    "mclmc": ("inference=mclmc",),
    "hmc": ("inference=hmc",),
    "mclmc-4x16": ("inference=mclmc", "model.hidden=[16,16,16,16]", "num_members=10"),
    "mclmc-4x16-all-rows": (
        "inference=mclmc",
        "model.hidden=[16,16,16,16]",
        "num_members=10",
        ALL_ROWS,
        "inference.patience=null",
    ),
}
"""Networks of one hidden layer of 50 units (100 for protein), 5 members, unless the row says otherwise."""
ON_ALL_SETS = (
    "deep_ensemble", "swag", "mc_dropout", "laplace", "ivon", "sghmc", "cyclical_sgmcmc", "mclmc", "mclmc-4x16",
)  # fmt: skip
WITH_ALL_METHODS = ("energy", "concrete")
METRICS = ("nll", "rmse", "crps", "coverage_95")
FIELDS = (
    "set", "protocol", "split", "method", *(f"val_{name}" for name in METRICS), *(f"test_{name}" for name in METRICS),
    "device_time_s", "commit",
)  # fmt: skip
ROWS = Rows(Path(__file__).parents[2] / "docs" / "results" / "uci.csv", FIELDS)


def run(name: str, protocol: str, split: int, method: str, gpu: bool) -> dict[str, object]:
    """One run; its row.

    Raises:
        RuntimeError: the command failed; with the end of what it said.
    """
    words = [*COMMON, f"data.name={name}", f"data.split={split}", f"data.protocol={protocol}", *CASES[method]]
    if not any(word.startswith("num_members") for word in words):
        words.append("num_members=5")
    if not any(word.startswith("model.hidden") for word in words):
        words.append(f"model.hidden=[{100 if name == 'protein-tertiary-structure' else 50}]")
    if name in BATCH_SIZE:
        words.append(f"data.batch_size={BATCH_SIZE[name]}")
    words.append(f"cluster.gpus_per_stack={int(gpu)}")
    with tempfile.TemporaryDirectory() as folder:
        bdl("train", *words, f"output_dir={folder}", "name=one")
        [run_dir] = Path(folder).glob("one/*")
        test = json.loads((run_dir / "metrics.json").read_text())
        val = dict[str, float]()
        if ALL_ROWS not in words:
            bdl("evaluate", f"run={run_dir}", "part=val", "cluster=inline")
            val = json.loads((run_dir / "evaluation" / "val" / "metrics.json").read_text())
        spent = cost(run_dir)
    row: dict[str, object] = {"set": name, "protocol": protocol, "split": split, "method": method}
    row |= {f"val_{key}": val.get(f"val/{key}", "") for key in METRICS}
    row |= {f"test_{key}": test[f"test/{key}"] for key in METRICS}
    return row | spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--methods", nargs="+", default=None, choices=tuple(CASES))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--protocol", default="standard", choices=("standard", "gap"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="train on the first GPU")
    given = parser.parse_args()
    done = {(row["set"], row["protocol"], int(row["split"]), row["method"]) for row in ROWS.stored()}
    jobs = [
        (name, given.protocol, split, method)
        for split in range(20)
        for name in given.sets
        for method in given.methods or (CASES if name in WITH_ALL_METHODS else ON_ALL_SETS)
        if split
        < (NUM_FEATURES[name] if given.protocol == "gap" else min(given.splits, NUM_SPLITS.get(name, 20)))
    ]
    jobs = [job for job in jobs if job not in done]
    ROWS.fill(jobs, lambda job: run(*job, given.gpu), given.jobs)


if __name__ == "__main__":
    main()

"""FashionMNIST with LeNets, through the command: accuracy, NLL, calibration error, and MNIST as the outside.

    python scripts/bench/bench_fashion.py [--methods ...] [--jobs 2]   # keeps a row a method in docs/results/
    python scripts/results.py                                         # the table of the README, from the rows

Needs `$BDL_DATA_ROOT`. One network, one optimiser and one schedule for all; what a method needs beside its shipped
settings stands in `CASES`, and was chosen on the validation part (a tenth of the training images). A row is not made
twice: delete it to make it again.
"""

import argparse
import json
import tempfile
from pathlib import Path

from _command import Rows, bdl, cost

from bdl_train.evaluation.section import read_section

COMMON = (
    "data=images",
    "data.name=fashion_mnist",
    "model=lenet",
    "cluster=inline",
    "cluster.cpus_per_stack=1",
)
ENSEMBLE = ("inference=deep_ensemble", "inference.patience=null", "scheduler=cosine")
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "deep_ensemble-10": (10, 20, ENSEMBLE),
    "deep_ensemble": (5, 10, ENSEMBLE),
    "swag": (5, 10, ("inference=swag", "inference.snapshot_every=105", "scheduler=cosine")),
    "cyclical_sgmcmc": (5, 10, ("inference=cyclical_sgmcmc", "inference.num_cycles=2")),
    "laplace": (5, 10, ("inference=laplace", "inference.patience=null", "scheduler=cosine")),
    "mc_dropout": (5, 10, ("inference=mc_dropout", "inference.patience=null", "scheduler=cosine", "model.dropout=0.1")),
}  # fmt: skip
"""Members, epochs, words."""
SCORE = "predictive_entropy"
"""By which MNIST is told apart, for all methods."""
FIELDS = (
    "method", "members", "epochs", "accuracy", "nll", "ece", "ood_auroc", "single_nll", "val_nll", "val_ece",
    "device_time_s", "commit",
)  # fmt: skip
ROWS = Rows(Path(__file__).parents[2] / "docs" / "results" / "fashion_mnist.csv", FIELDS)


def run(method: str) -> dict[str, object]:
    """One run; its row.

    Raises:
        RuntimeError: the command failed; with the end of what it said.
    """
    members, epochs, words = CASES[method]
    with tempfile.TemporaryDirectory() as folder:
        size = (f"num_members={members}", f"trainer.max_epochs={epochs}")
        bdl("train", *COMMON, *size, *words, f"output_dir={folder}", "name=one")
        [run_dir] = Path(folder).glob("one/*")
        bdl("evaluate", f"run={run_dir}", "part=val", "cluster=inline")
        bdl("evaluate", f"run={run_dir}", "name=ood", "ood=[images/mnist_test.npz]", "cluster=inline")
        test = json.loads((run_dir / "metrics.json").read_text())
        val = json.loads((run_dir / "evaluation" / "val" / "metrics.json").read_text())
        spent = cost(run_dir)
        detection = read_section(run_dir / "evaluation" / "ood" / "sections", "ood").tables["detection"]
    row: dict[str, object] = {"method": method, "members": members, "epochs": epochs}
    row |= {name: test[f"test/{name}"] for name in ("accuracy", "nll", "ece")}
    row["ood_auroc"] = float(detection.loc[detection["score"] == SCORE, "auroc"].iloc[0])
    row["single_nll"] = test["test/mean_member_nll"]
    row |= {f"val_{name}": val[f"val/{name}"] for name in ("nll", "ece")}
    return row | spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    done = {row["method"] for row in ROWS.stored()}
    ROWS.fill([method for method in given.methods if method not in done], run, given.jobs)


if __name__ == "__main__":
    main()

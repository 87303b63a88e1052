"""FashionMNIST with LeNets, through the command: accuracy, NLL, calibration error, and MNIST as the outside.

    python scripts/bench/bench_fashion.py [--methods ...] [--jobs 2] [--gpu]   # keeps rows in docs/results/
    python scripts/results.py                                                 # the table of the README, from the rows

Needs `$BDL_DATA_ROOT`. One network, one batch size and one number of epochs for all. The ensemble of 10 runs under
several settings; the table shows the one with the lowest NLL of the validation part, a tenth of the training images. A
row is not made twice: delete it to make it again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from _command import Rows, bdl, cost

from bdl_train.evaluation.section import read_section

EPOCHS = 30
COMMON = (
    "data=images",
    "data.name=fashion_mnist",
    "model=lenet",
    "cluster=inline",
    "cluster.cpus_per_stack=1",
    f"trainer.max_epochs={EPOCHS}",
)
DESCENT = ("scheduler=cosine", "optimizer.lr=0.002")
ENSEMBLE = ("inference=deep_ensemble", "inference.patience=null")
ALL_IMAGES = "data.val_fraction=0"
"""Nothing is held back: the setting is the one that was chosen with a validation part."""
CASES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("deep_ensemble-10", 10, (*ENSEMBLE, *DESCENT)),
    ("deep_ensemble-10", 10, (*ENSEMBLE, "scheduler=cosine", "optimizer.lr=0.004")),
    ("deep_ensemble-10", 10, (*ENSEMBLE, "scheduler=cosine", "optimizer=sgd", "optimizer.lr=0.05", "prior.scale=0.3")),
    ("deep_ensemble-10", 10, (*ENSEMBLE, *DESCENT, "model.dropout=0.2")),
    ("deep_ensemble-10-all-images", 10, (*ENSEMBLE, *DESCENT, "model.dropout=0.2", ALL_IMAGES)),
    ("deep_ensemble", 5, (*ENSEMBLE, *DESCENT)),
    ("swag", 5, ("inference=swag", "inference.snapshot_every=105", *DESCENT, "inference.lr_factor=0.25")),
    ("cyclical_sgmcmc", 5, ("inference=cyclical_sgmcmc",)),
    ("laplace", 5, ("inference=laplace", "inference.patience=null", *DESCENT)),
    ("mc_dropout", 5, ("inference=mc_dropout", "inference.patience=null", *DESCENT, "model.dropout=0.1")),
)  # fmt: skip
"""Method, members, words."""
SCORE = "predictive_entropy"
"""By which MNIST is told apart, for all methods."""
FIELDS = (
    "method", "setting", "members", "epochs", "accuracy", "nll", "ece", "ood_auroc", "single_nll", "val_nll", "val_ece",
    "device", "device_time_s", "commit",
)  # fmt: skip
ROWS = Rows(Path(__file__).parents[2] / "docs" / "results" / "fashion_mnist.csv", FIELDS)


def run(method: str, members: int, words: tuple[str, ...], gpu: bool) -> dict[str, object]:
    """One run; its row.

    Raises:
        RuntimeError: the command failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = f"cluster.gpus_per_stack={int(gpu)}"
        bdl("train", *COMMON, f"num_members={members}", *words, where, f"output_dir={folder}", "name=one")
        [run_dir] = Path(folder).glob("one/*")
        val = dict[str, float]()
        if ALL_IMAGES not in words:
            bdl("evaluate", f"run={run_dir}", "part=val", "cluster=inline")
            val = json.loads((run_dir / "evaluation" / "val" / "metrics.json").read_text())
        bdl("evaluate", f"run={run_dir}", "name=ood", "ood=[images/mnist_test.npz]", "cluster=inline")
        test = json.loads((run_dir / "metrics.json").read_text())
        spent = cost(run_dir)
        detection = read_section(run_dir / "evaluation" / "ood" / "sections", "ood").tables["detection"]
    row: dict[str, object] = {
        "method": method,
        "setting": " ".join(words),
        "members": members,
        "epochs": EPOCHS,
    }
    row |= {name: test[f"test/{name}"] for name in ("accuracy", "nll", "ece")}
    row["ood_auroc"] = float(detection.loc[detection["score"] == SCORE, "auroc"].iloc[0])
    row["single_nll"] = test["test/mean_member_nll"]
    row |= {f"val_{name}": val.get(f"val/{name}", "") for name in ("nll", "ece")}
    row["device"] = torch.cuda.get_device_name() if gpu else "CPU"
    return row | spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple(dict.fromkeys(method for method, _, _ in CASES))
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="train on the first GPU")
    given = parser.parse_args()
    done = {(row["method"], row["setting"]) for row in ROWS.stored()}
    cases = [case for case in CASES if case[0] in given.methods and (case[0], " ".join(case[2])) not in done]
    ROWS.fill(cases, lambda case: run(*case, given.gpu), given.jobs)


if __name__ == "__main__":
    main()

"""Score the posterior predictive of a run on one part of its data.

Examples:
    bdl evaluate run=runs/energy/20260101-120000-a1b2c3 part=val
    bdl evaluate -m run=runs/energy/20260101-120000-a1b2c3 part=train,val,test
"""

from typing import Any

from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError
from bdl_train.evaluation.evaluate import evaluate, write_evaluation
from bdl_train.evaluation.table import show_metrics
from bdl_train.posteriors.artefact import read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, read_json
from bdl_train.verbs._runs import device_of, load_data, read_config

MULTIRUN = True


def run(config: dict[str, Any], options: Options) -> Exit:
    """Write `<run>/evaluation/<name>/` and print its metrics."""
    if config["part"] not in ("train", "val", "test"):
        raise UsageError(f"part must be train, val or test, got '{config['part']}'.")
    run_dir = RunDir.open(config["run"])
    artefact = read_artefact(run_dir.posterior)
    stored = read_config(run_dir)
    if config["data"]["root"] is not None:
        stored["data"]["root"] = config["data"]["root"]
    data = load_data(stored)
    expected = read_json(run_dir.manifest)["data"]["fingerprint"]
    if data.fingerprint() != expected:
        raise UsageError(
            f"The data at data.root={stored['data']['root']} differ from those the run was trained on "
            f"(fingerprint {data.fingerprint()[:12]}, the manifest says {expected[:12]}): scores would not compare."
        )
    predictor = Predictor(artefact, device=device_of(config["accelerator"]), num_draws=config["num_draws"])
    part = getattr(data, config["part"])
    evaluation = evaluate(predictor, part, artefact.target)
    write_evaluation(run_dir, config["name"], evaluation, config["part"])
    members = artefact.posterior.num_members
    show_metrics(
        f"{data.name}: {config['part']} metrics of {members} members ({len(part)} rows)", evaluation.metrics
    )
    print(f"\nwritten: {run_dir.evaluation(config['name'])}")
    return Exit.DONE

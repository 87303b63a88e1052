"""Score the posterior predictive of a run on one part of its data.

Examples:
    bdl evaluate run=runs/energy/20260101-120000-a1b2c3 part=val
    bdl evaluate -m run=runs/energy/20260101-120000-a1b2c3 part=train,val,test
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from bdl_train.build import settings_of
from bdl_train.config import Options
from bdl_train.errors import Exit, UsageError
from bdl_train.evaluation.evaluate import evaluate, write_evaluation
from bdl_train.evaluation.table import show_metrics
from bdl_train.runs import RunDir
from bdl_train.verbs._runs import load_data, open_artefact, predictor_of, read_config, read_manifest

MULTIRUN = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of `conf/evaluate.yaml`."""

    run: str
    part: Literal["train", "val", "test"]
    name: Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
    num_draws: Annotated[int, Field(ge=1)] | None
    accelerator: Literal["auto", "cpu", "gpu"]
    allow: list[str]
    data: dict[str, str | None]


def run(config: dict[str, Any], options: Options) -> Exit:
    """Write `<run>/evaluation/<name>/` and print its metrics."""
    settings = settings_of(Settings, config, key="")
    if settings.name == "test" and (settings.part != "test" or settings.num_draws is not None):
        raise UsageError(
            "name=test is the run's own evaluation of its test part: give this one another name."
        )
    run_dir = RunDir.open(settings.run)
    manifest = read_manifest(run_dir)
    artefact = open_artefact(run_dir)
    stored = read_config(run_dir)
    if settings.data["root"] is not None:
        stored["data"]["root"] = settings.data["root"]
    data = load_data(stored)
    expected = manifest["data"]["fingerprint"]
    if data.fingerprint() != expected:
        raise UsageError(
            f"The data at data.root={stored['data']['root']} differ from those the run was trained on "
            f"(fingerprint {data.fingerprint()[:12]}, the manifest says {expected[:12]}): scores would not compare."
        )
    predictor = predictor_of(artefact, settings.accelerator, settings.num_draws)
    part = getattr(data, settings.part)
    evaluation = evaluate(predictor, part, artefact.target)
    write_evaluation(run_dir, settings.name, evaluation, settings.part)
    members = artefact.posterior.num_members
    show_metrics(
        f"{data.name}: {settings.part} metrics of {members} members ({len(part)} rows)", evaluation.metrics
    )
    print(f"\nwritten: {run_dir.evaluation(settings.name)}")
    return Exit.DONE

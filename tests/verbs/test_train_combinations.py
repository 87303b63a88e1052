"""Every data source, model, likelihood, prior, method, optimiser and schedule in at least one whole run."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import yaml
from sklearn.utils import Bunch
from small_methods import NAMES as METHODS
from small_methods import SMALL

from bdl_train.build import allowing
from bdl_train.posteriors.artefact import read_artefact
from bdl_train.runs import RunDir, read_json

CONF = Path(__file__).parents[2] / "conf"

CSV = "data=csv data.path={csv} data.features=[width,colour,age] data.split_column=part data.target="
GREY = "data=images data.name=grey data.batch_size=12 trainer.max_epochs=2"
COLOUR = "data=images data.name=colour data.batch_size=12 trainer.max_epochs=2"
UCI = "data=uci data.name=toy data.root={root}"

RUNS = {
    "breast_cancer": "",
    "digits": "data.name=digits inference=deep_ensemble trainer.max_epochs=2 data.batch_size=256",
    "wine": "data.name=wine inference=anchored prior.fan_in=true",
    "iris": "data.name=iris optimizer=sgd scheduler=cosine trainer.clip_norm=1.0",
    "diabetes_gaussian": "data.name=diabetes likelihood=gaussian inference=anchored",
    "diabetes_known_noise": "data.name=diabetes likelihood=gaussian likelihood.learn_noise=false inference=anchored",
    "diabetes_swag": "data.name=diabetes likelihood=gaussian prior=student_t",
    "bernoulli": "likelihood=bernoulli prior=laplace inference=deep_ensemble optimizer=rmsprop",
    "bernoulli_swag": "likelihood=bernoulli prior=scale_mixture scheduler=step",
    "layerwise": "prior=layerwise inference=anchored optimizer=adamw",
    "uci": f"{UCI} likelihood=heteroscedastic_gaussian inference=deep_ensemble",
    "uci_gap": f"{UCI} data.protocol=gap data.split=1 likelihood=student_t inference=deep_ensemble",
    "student_t_swag": f"{UCI} likelihood=student_t",
    "csv_number": f"{CSV}y likelihood=heteroscedastic_gaussian inference.max_rank=0",
    "csv_class": f"{CSV}sick inference=deep_ensemble",
    "csv_count": f"{CSV}visits data.kind=count likelihood=poisson inference=deep_ensemble",
    "csv_count_swag": f"{CSV}visits data.kind=count likelihood=poisson",
    "transformer": f"{CSV}y likelihood=gaussian model=ft_transformer model.width=8 model.num_heads=2 "
    "model.num_blocks=1 model.ffn_width=8 trainer.max_epochs=2 inference=deep_ensemble",
    "lenet": f"{GREY} model=lenet inference=deep_ensemble",
    "lenet_dropout": f"{GREY} model=lenet model.dropout=0.2 inference=anchored",
    "resnet20_batch_norm_swag": f"{COLOUR} model=resnet20 model.width=2 inference.num_draws=2 inference.start_epoch=0",
    "resnet20_augmented": f"{COLOUR} data.augment=flip_crop model=resnet20 model.width=2 model.norm=filter_response "
    "inference=deep_ensemble",
    "wide_resnet": f"{COLOUR} model=wide_resnet model.depth=10 model.widen_factor=1 model.norm=group "
    "inference=deep_ensemble num_members=1",
    "openml": "data=openml data.data_id=31 inference=deep_ensemble data.batch_size=8",
    "datamodule": "data=datamodule data._target_={package}.Waves +data.rows=60 allow=[{package}] likelihood=gaussian",
    "module": "model=module model._target_={package}.Net +model.width=5 allow=[{package}]",
    "linear_double": "model.hidden=[] trainer.precision=64-true trainer.executor=vmap",
    "bf16_loop": "trainer.precision=bf16-mixed trainer.executor=loop",
    "no_validation": "data.val_fraction=0 model.dropout=0.2 num_members=1",
}


def choices(words: list[str]) -> dict[str, str]:
    """The choice of every group, with the defaults of `conf/train.yaml`."""
    defaults = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    chosen = {group: name for one in defaults if isinstance(one, dict) for group, name in one.items()}
    return chosen | {key: value for key, _, value in (word.partition("=") for word in words) if key in chosen}


def test_no_choice_of_these_groups_is_left_out():
    seen = [choices(words.split()) for words in RUNS.values()]
    for group in ("data", "model", "likelihood", "prior", "optimizer", "scheduler"):
        shipped = {path.stem for path in (CONF / group).glob("*.yaml")}
        # `from_posterior` needs an earlier run and has tests of its own below.
        assert {one[group] for one in seen} | {"from_posterior"} >= shipped, group


def check_run(run: RunDir, num_members: int) -> None:
    """What design section 4.6 promises of a complete run."""
    manifest = read_json(run.manifest)
    assert manifest["status"] == "complete"
    assert [member["id"] for member in manifest["members"]] == list(range(num_members))
    assert {member["status"] for member in manifest["members"]} == {"done"}
    metrics = read_json(run.metrics)
    assert metrics == read_json(run.evaluation("test") / "metrics.json")
    assert all(key.startswith(("test/", "diagnostics/")) for key in metrics)
    assert math.isfinite(metrics["test/nll"])
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    posterior = read_artefact(run.posterior).posterior
    assert list(posterior.ids) == list(range(num_members))


@pytest.mark.parametrize("name", RUNS)
def test_combination_trains_and_scores(name, train, mixed_csv, data_folder, user_package, monkeypatch):
    table = Bunch(frame=pd.read_csv(mixed_csv)[["width", "colour", "sick"]], target_names=["sick"])
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **given: table)
    given = RUNS[name].format(csv=mixed_csv, root=data_folder, package=user_package).split()
    if "data=images" in given:
        given.append(f"data.root={data_folder}")
    said = train(*given)
    with allowing([user_package]):
        check_run(said.run, 1 if "num_members=1" in given else 2)
    assert "Traceback" not in said.err


@pytest.mark.parametrize("kind", ["numbers", "classes"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_numbers_and_on_classes(method: str, kind: str, train, data_folder):
    given = [f"inference={method}", "trainer.max_epochs=8", "trainer.compile=false"]
    given += [f"inference.{key}={value}" for key, value in SMALL.get(method, {}).items()]
    if kind == "numbers":
        given += f"{UCI} likelihood=heteroscedastic_gaussian".format(root=data_folder).split()
    if method == "mc_dropout":
        given.append("model.dropout=0.1")
    check_run(train(*given).run, 2)


def test_swag_with_batch_norm_stores_draws_with_statistics_of_their_own(train, data_folder):
    words = f"{COLOUR} data.root={data_folder} model=resnet20 model.width=2 inference.start_epoch=0"
    run = train(*words.split(), "inference.num_draws=3").run
    artefact = read_artefact(run.posterior)
    assert artefact.meta["batch_norm"] == "re-estimated for every draw"
    assert {member.num_atoms for member in artefact.posterior.members} == {3}
    drawn = list(artefact.posterior.members[0].draw(3, 0))
    means = [next(value for name, value in buffers.items() if "running_mean" in name) for _, buffers in drawn]
    assert not np.allclose(means[0], means[1])


def test_members_of_a_run_differ(train):
    run = train("inference=deep_ensemble").run
    artefact = read_artefact(run.posterior)
    one, other = (next(member.draw(1, 0))[0] for member in artefact.posterior.members)
    assert (one - other).norm() > 1

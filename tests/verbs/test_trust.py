"""What a run directory may and may not change about the next command."""

import json
import logging

import pytest
import yaml

from bdl_train.runs import read_json
from bdl_train.verbs import train as verb


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_a_posterior_json_that_was_changed_is_refused(verb, bdl, train, tmp_path):
    run = train("data.name=diabetes", "likelihood=gaussian", "inference=deep_ensemble").run
    edit_json(run.posterior / "posterior.json", lambda meta: meta["target"].update(loc=1000.0))
    table = tmp_path / "rows.csv"
    table.write_text("age\n1\n")
    words = {"evaluate": [], "predict": [f"input={table}", "output=out.csv"]}[verb]
    said = bdl(verb, f"run={run.path}", *words)
    assert said.status == 2
    assert "posterior.json does not match the hash in manifest.json" in said.err


def test_a_resumed_run_is_unfinished_until_it_has_finished_again(bdl, train, monkeypatch):
    run = train("inference=deep_ensemble").run
    edit_json(run.manifest, lambda manifest: manifest.update(status="partial"))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verb, "_carry_out", killed)
        assert bdl("train", f"resume={run.path}", "cluster.members_per_stack=1").status == 75
    assert not run.manifest.exists()
    assert bdl("train", f"resume={run.path}").status == 0
    assert read_json(run.manifest)["status"] == "complete"


def test_a_secret_in_a_group_that_the_posterior_stores_is_refused(bdl, tmp_path):
    said = bdl(
        "train",
        "model=module",
        "model._target_=torch.nn.Linear",
        "+model.api_key=hf_SECRET",
        "cluster=inline",
    )
    assert said.status == 2
    assert "model.api_key is named like a secret" in said.err
    assert "hf_SECRET" not in said.err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def earlier(train, tmp_path):
    return train(
        "data.name=diabetes", "likelihood=gaussian", "num_members=3", f"output_dir={tmp_path / 'then'}"
    ).run


NUMBERS = ("data.name=diabetes", "likelihood=gaussian", "prior=from_posterior")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("model.activation=tanh",), "choice of model"),
        (
            ("data=csv", "data.path=other.csv", "data.target=progression", "data.name=null"),
            "choice of the input columns",
        ),
    ],
)
def test_a_posterior_over_other_networks_or_columns_is_no_prior(words, what, bdl, earlier, tmp_path):
    header = "p,q,r,s,t,u,v,w,x,z,progression"
    rows = [",".join(str((7 * i + 3 * j) % 11 + 0.5) for j in range(11)) for i in range(40)]
    (tmp_path / "other.csv").write_text("\n".join([header, *rows]))
    said = bdl(
        "train", *NUMBERS, f"prior.run={earlier.path}", "cluster=inline", "inference=deep_ensemble", *words
    )
    assert said.status == 2, said.out + said.err
    assert what in said.err


def test_a_prior_in_other_units_is_a_warning(train, earlier, caplog):
    edit_json(earlier.posterior / "posterior.json", lambda meta: meta["target"].update(scale=1.0))
    edit = yaml.safe_load(earlier.config.read_text())
    assert edit["data"]["name"] == "diabetes"
    with caplog.at_level(logging.WARNING, logger="bdl_train"):
        train(*NUMBERS, f"prior.run={earlier.path}", "inference=deep_ensemble")
    assert "standardised the target 'progression' differently" in caplog.text

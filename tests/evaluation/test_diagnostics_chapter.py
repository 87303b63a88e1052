"""The chapter on chains: what it says of chains that mix, drift, stand still or are none, and where the numbers go."""

# pandas-stubs take a column for anything that a table can hold.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_chains import chain_artefact, some_rows
from small_posteriors import small_artefact

from bdl_train.evaluation.diagnostics_chapter import Diagnosis, advice, diagnose
from bdl_train.evaluation.evaluate import evaluate, write_evaluation
from bdl_train.evaluation.report.chapters import drawing_of
from bdl_train.evaluation.report.figure import drawn
from bdl_train.evaluation.section import read_section, write_section
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.chain import Chain
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, read_json

SGLD = {"_target_": "x", "lr": 0.001, "burn_in_epochs": 0, "thin": None, "num_draws": 30}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def diagnosed(artefact: Artefact) -> Diagnosis:
    part = some_rows(artefact)
    predictor = Predictor(artefact)
    return diagnose(artefact, predictor, part, evaluate(predictor, part, artefact.target).members)


def values(found: Diagnosis) -> dict[str, float | None]:
    return {one.key: one.value for one in found.metrics}


@pytest.mark.parametrize(
    "likelihood", ["heteroscedastic_gaussian", "gaussian", "poisson", "categorical", "bernoulli"]
)
def test_chains_of_independent_draws_have_mixed_though_members_differ(likelihood: str):
    found = diagnosed(chain_artefact(likelihood, num_draws=100))
    assert found.has_chains
    assert found.section.level == "good", found.section.verdict
    assert found.section.verdict.startswith("The chains have mixed")
    assert "different modes" in found.section.verdict
    assert "no failure" in found.section.verdict
    numbers = values(found)
    assert numbers["rhat_within_median"] == pytest.approx(1, abs=0.03)
    assert numbers["rhat_across_median"] > 1.3  # pyright: ignore[reportOptionalOperand]
    # 100 independent draws: an estimate of their number spreads by some 20 %.
    assert numbers["ess_bulk_median"] == pytest.approx(100, rel=0.2)
    assert numbers["member_disagreement"] is not None


def test_members_around_one_network_predict_alike():
    found = diagnosed(chain_artefact(apart=False, num_draws=100))
    assert "they predict alike" in found.section.verdict
    assert values(found)["ess_bulk_total_median"] == pytest.approx(300, rel=0.2)


def test_a_chain_that_drifts_is_named_with_what_to_do():
    found = diagnosed(chain_artefact(drift=(0, 6, 0), num_draws=100, method=SGLD))
    assert found.section.level == "warn"
    assert found.section.verdict.startswith("1 of 3 chains (member 1) have not mixed")
    for words in ("inference.burn_in_epochs", "inference.thin", "trainer.max_epochs", "inference.lr"):
        assert words in found.section.verdict
    assert "inference.num_draws" not in found.section.verdict
    chains = found.section.tables["chains"]
    assert chains["rhat_median"].to_numpy().argmax() == 1
    assert chains["potential_rhat"].to_numpy().argmax() == 1


def test_a_potential_that_drifts_alone_is_named():
    artefact = chain_artefact(num_draws=100)
    members = []
    for m, one in enumerate(artefact.posterior.members):
        assert isinstance(one, Chain)
        slope = torch.linspace(0, 4, 100) if m == 2 else 0
        members.append(replace(one, traces={"potential": one.traces["potential"] + slope}))
    found = diagnosed(replace(artefact, posterior=replace(artefact.posterior, members=members)))
    assert found.section.level == "warn"
    assert "(member 2)" in found.section.verdict
    assert "The potential still drifts" in found.section.verdict


def test_a_chain_that_never_moves_is_named():
    artefact = chain_artefact()
    first = artefact.posterior.members[0]
    assert isinstance(first, Chain)
    frozen = replace(first, flat=first.flat[:1].expand(40, -1).clone())
    members = [frozen, *artefact.posterior.members[1:]]
    found = diagnosed(replace(artefact, posterior=replace(artefact.posterior, members=members)))
    assert found.section.level == "warn"
    assert "Some never move (member 0)" in found.section.verdict


def test_cycles_are_allowed_not_to_mix():
    artefact = chain_artefact(drift=(6, 6, 6), num_draws=100, traces=("potential", "cycle"))
    found = diagnosed(artefact)
    assert found.section.level == "note"
    assert "need not" in found.section.verdict


@pytest.mark.parametrize(
    ("method", "reason"), [("ensemble", "single weight vectors"), ("swag", "distributions")]
)
def test_without_chains_there_are_pairs_alone(method: str, reason: str):
    found = diagnosed(small_artefact("gaussian", method, num_draws=4))
    assert not found.has_chains
    assert found.section.level == "note"
    assert reason in found.section.verdict
    assert set(found.section.tables) == {"pairs"}
    assert set(values(found)) == {"member_disagreement", "member_correlation"}


def test_one_member_without_a_chain_has_nothing():
    found = diagnosed(small_artefact("gaussian", "ensemble", num_members=1))
    assert (found.section.level, found.metrics, found.section.tables) == ("empty", [], {})


def test_one_chain_alone_is_compared_with_itself():
    found = diagnosed(chain_artefact(num_members=1, num_draws=100))
    assert found.section.level == "good"
    assert "across members" not in found.section.verdict
    assert values(found)["rhat_across_median"] is None
    assert "pairs" not in found.section.tables


def test_a_member_that_predicts_nan_breaks_nothing():
    artefact = chain_artefact()
    first = artefact.posterior.members[0]
    assert isinstance(first, Chain)
    broken = replace(first, flat=torch.full_like(first.flat, torch.nan))
    members = [broken, *artefact.posterior.members[1:]]
    found = diagnosed(replace(artefact, posterior=replace(artefact.posterior, members=members)))
    assert any("not finite in some draw" in one for one in found.section.warnings)


def test_advice_names_the_settings_that_there_are():
    assert advice({"num_warmup": 1, "step_size": 1, "thin": 1}) == (
        "What helps: discard more of their start (inference.num_warmup) and put more steps between draws "
        "(inference.thin)."
    )
    assert advice({"lr": 0.1, "thin": 1}) == (
        "What helps: put more steps between draws (inference.thin); larger steps (inference.lr) mix faster, as long as "
        "the test scores hold."
    )
    assert advice({}) == "What helps: let the chains run longer."


def test_tables_hold_a_row_a_member_a_value_and_a_draw():
    artefact = replace(chain_artefact("gaussian"))
    artefact = replace(artefact, posterior=replace(artefact.posterior, ids=[0, 3, 7]))
    tables = diagnosed(artefact).section.tables
    assert tables["chains"]["member"].tolist() == [0, 3, 7]
    assert len(tables["values"]) == 30 + 1
    assert tables["values"]["row"].isna().sum() == 1  # the noise
    assert tables["traces"].groupby("member").size().to_dict() == {0: 40, 3: 40, 7: 40}
    last = artefact.posterior.members[2]
    assert isinstance(last, Chain)
    own = tables["traces"][tables["traces"]["member"] == 7]
    np.testing.assert_array_equal(own["step_size"].to_numpy(), last.traces["step_size"].numpy())
    assert own["draw"].tolist() == list(range(40))


def test_metrics_go_beside_those_of_the_split(tmp_path: Path):
    artefact = chain_artefact()
    part, predictor = some_rows(artefact), Predictor(artefact)
    evaluation = evaluate(predictor, part, artefact.target)
    found = diagnose(artefact, predictor, part, evaluation.members)
    flat = write_evaluation(RunDir(tmp_path), "val", evaluation, "val", diagnostics=found.metrics)
    folder = tmp_path / "evaluation" / "val"
    assert read_json(folder / "metrics.json") == flat
    assert flat["diagnostics/rhat_within_median"] == values(found)["rhat_within_median"]
    assert flat["val/nll"] is not None
    details = pd.read_parquet(folder / "metrics_detail.parquet").set_index("key")
    assert details.loc["diagnostics/ess_bulk_min", "unit"] == "draws"


@pytest.mark.parametrize(
    "artefact", [chain_artefact(), chain_artefact(num_members=1), small_artefact("gaussian")]
)
def test_the_report_draws_it_from_its_files(artefact: Artefact, tmp_path: Path):
    section = diagnosed(artefact).section
    write_section(tmp_path, section)
    draw = drawing_of("diagnostics")
    assert draw is not None
    page = drawn(list(draw(read_section(tmp_path, "diagnostics"))), "diagnostics")
    assert ("R-hat of predictions" in page) == ("chains" in section.tables)
    assert "nan" not in page

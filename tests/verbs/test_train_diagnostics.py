"""Chains of a real training are diagnosed at its end: numbers in the run, a warning on the terminal, a chapter."""

import pytest

from bdl_train.evaluation.section import read_section
from bdl_train.runs import find_runs, read_json

SMALL = ("num_members=2", "trainer.max_epochs=8", "cluster=inline", "model.hidden=[4]")


def test_chains_that_have_not_mixed_are_a_warning_that_says_what_to_do(bdl, tmp_path):
    said = bdl(
        "train",
        *SMALL,
        "inference=sgld",
        "inference.num_draws=30",
        "inference.lr=0.0001",
        "inference.burn_in_epochs=0",
        "name=chains",
    )
    assert said.status == 0, said.err
    run = find_runs(tmp_path / "runs")[-1]
    metrics = read_json(run.metrics)
    assert metrics == read_json(run.evaluation("test") / "metrics.json")
    assert {
        "diagnostics/rhat_within_median",
        "diagnostics/rhat_across_median",
        "diagnostics/ess_bulk_min",
    } <= set(metrics)
    assert "warning: The chains have not mixed" in said.out
    assert "inference.burn_in_epochs" in said.out
    assert bdl("report", f"run={run.path}").status == 0
    page = (run.evaluation("test") / "report.html").read_text()
    attention = page[page.index('class="attention"') :]
    assert "The chains have not mixed" in attention[: attention.index("</div>")]
    assert '<section id="calibration"' in page  # of the scores, and the others are still to be asked for
    assert f"bdl evaluate run={run.path}" in page
    again = bdl("evaluate", f"run={run.path}")
    assert again.status == 0, again.err
    section = read_section(run.evaluation("test") / "sections", "diagnostics")
    assert section.verdict in again.out
    assert section.tables["traces"]["potential"].notna().to_numpy().all()
    rescored = read_json(run.evaluation("test") / "metrics.json")
    # The same rows and draws, by the same code.
    assert {key: value for key, value in rescored.items() if "diagnostics/" in key} == pytest.approx(
        {key: value for key, value in metrics.items() if "diagnostics/" in key}
    )


def test_members_without_chains_have_their_likeness_alone(bdl, tmp_path):
    said = bdl("train", *SMALL, "inference=deep_ensemble", "name=atoms")
    assert said.status == 0, said.err
    metrics = read_json(find_runs(tmp_path / "runs")[-1].metrics)
    found = {key for key in metrics if key.startswith("diagnostics/")}
    assert found == {"diagnostics/member_disagreement", "diagnostics/member_correlation"}
    assert "mixed" not in said.out
    assert not (find_runs(tmp_path / "runs")[-1].evaluation("test") / "sections").exists()

"""Scoring a part: members alone by hand, and what is written."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from small_posteriors import small_artefact
from torch.func import functional_call

from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from bdl_train.evaluation.members import member_scores
from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.table import show_metrics
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive import _forward, predict
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def part_for(artefact: Artefact, count: int = 30) -> Part:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 3)).astype(np.float32)
    num_classes = artefact.target.num_classes
    y = (
        generator.integers(0, num_classes, count)
        if num_classes
        else generator.normal(size=count).astype(np.float32)
    )
    return Part(x, y, np.arange(100, 100 + count))


def values(evaluation: Evaluation) -> dict[str, float | None]:
    return {metric.key: metric.value for metric in evaluation.metrics}


def member_nll_by_hand(artefact: Artefact, part: Part, member: int) -> float:
    """−log of the mean density of a member's draws, on the raw scale, by scipy."""
    network, target = artefact.network(), artefact.target
    densities = []
    (draws,) = artefact.posterior.only(member).draw(chunk_size=1000)
    for flat in draws.flat:
        params = artefact.layout.unflatten(flat)
        weights = {name: params[name] for name, _ in network.named_parameters()}
        outputs = functional_call(network, weights, (torch.from_numpy(part.x),)).detach().double().numpy()
        if target.num_classes:
            probs = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
            densities.append(probs[np.arange(len(part)), part.y])
        else:
            std = math.exp(float(params["likelihood.log_noise_std"])) * target.scale
            raw = part.y.astype(np.float64) * target.scale + target.loc
            densities.append(scipy.stats.norm.pdf(raw, outputs[:, 0] * target.scale + target.loc, std))
    return float(-np.log(np.mean(densities, axis=0)).mean())


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("method", ["ensemble", "atoms", "swag"])
def test_best_and_mean_member_are_those_by_hand(likelihood: str, method: str):
    artefact = small_artefact(likelihood, method, num_draws=4)
    part = part_for(artefact)
    evaluation = evaluate(Predictor(artefact), part, artefact.target)
    by_hand = [member_nll_by_hand(artefact, part, member) for member in range(3)]
    found = values(evaluation)
    assert found["best_member_nll"] == pytest.approx(min(by_hand), rel=1e-5)
    assert found["mean_member_nll"] == pytest.approx(np.mean(by_hand), rel=1e-5)
    best = next(metric for metric in evaluation.metrics if metric.key == "best_member_nll")
    assert best.meaning.endswith(f"number {int(np.argmin(by_hand))}")
    # Jensen: the mixture is never worse than its members are on average.
    assert found["nll"] is not None
    assert found["nll"] < np.mean(by_hand)


def test_tiles_change_no_metric(monkeypatch: pytest.MonkeyPatch):
    for likelihood in ("categorical", "gaussian"):
        artefact = small_artefact(likelihood, "swag", num_draws=4)
        part = part_for(artefact, 200)
        whole = evaluate(Predictor(artefact), part, artefact.target)
        with monkeypatch.context() as patch:
            patch.setattr(predict, "STATS_BYTES", {"cpu": 1 << 13})
            patch.setattr(_forward, "MIN_ROWS", 7)
            tiled = evaluate(Predictor(artefact), part, artefact.target)
        assert values(tiled) == pytest.approx(values(whole), rel=1e-5, abs=1e-6)
        np.testing.assert_array_equal(tiled.rows.columns["y"], whole.rows.columns["y"])


def test_members_are_told_apart_by_index_not_by_place():
    log_prob = torch.tensor([[0.1], [0.2], [0.4]], dtype=torch.float64).log()
    ids, found = member_scores(log_prob, torch.tensor([5, 2, 5]))
    assert ids == [2, 5]
    torch.testing.assert_close(found.exp(), torch.tensor([[0.2], [0.25]], dtype=torch.float64))


def test_a_part_without_rows_is_refused():
    artefact = small_artefact()
    empty = Part(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(UsageError, match="no rows to score"):
        evaluate(Predictor(artefact), empty, artefact.target)


def test_what_is_written_can_be_read_back(tmp_path: Path):
    artefact = small_artefact("categorical", "atoms")
    part = part_for(artefact)
    evaluation = evaluate(Predictor(artefact), part, artefact.target)
    flat = write_evaluation(RunDir(tmp_path), "shifted", evaluation, "test")
    folder = tmp_path / "evaluation" / "shifted"

    assert json.loads((folder / "metrics.json").read_text()) == flat
    assert flat == {f"test/{key}": value for key, value in values(evaluation).items()}
    detail = pd.read_parquet(folder / "metrics_detail.parquet")
    assert list(detail) == [
        "key",
        "slice",
        "value",
        "low",
        "high",
        "n",
        "unit",
        "meaning",
        "better",
        "reason",
    ]
    assert dict(zip(detail["key"], detail["value"], strict=True)) == flat
    assert set(detail["n"]) == {30}
    table = pd.read_parquet(folder / "predictions.parquet")
    assert table["row"].tolist() == part.rows.tolist()
    assert table["y"].tolist() == part.y.tolist()
    probs = table[[f"p_{name}" for name in artefact.target.classes]].to_numpy()
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
    hashes = json.loads((folder / "hashes.json").read_text())
    assert hashes == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("metrics.json", "metrics_detail.parquet", "predictions.parquet")
    }


def test_a_metric_that_is_not_finite_is_null_with_a_reason(tmp_path: Path):
    artefact = small_artefact("gaussian")
    evaluation = evaluate(Predictor(artefact), part_for(artefact), artefact.target)
    broken = dataclasses.replace(
        evaluation, metrics=[Metric("nll", math.nan, "nats", "surprise", "lower"), *evaluation.metrics[1:]]
    )
    write_evaluation(RunDir(tmp_path), "test", broken, "test")
    text = (tmp_path / "evaluation" / "test" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["test/nll"] is None
    detail = pd.read_parquet(tmp_path / "evaluation" / "test" / "metrics_detail.parquet").set_index("key")
    assert detail.loc["test/nll", "reason"] == "not finite"
    assert pd.isna(detail.loc["test/rmse", "reason"])


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_every_metric_has_an_interval_around_it(
    likelihood: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    artefact = small_artefact(likelihood)
    evaluation = evaluate(Predictor(artefact), part_for(artefact), artefact.target)
    write_evaluation(RunDir(tmp_path), "test", evaluation, "test")
    detail = pd.read_parquet(tmp_path / "evaluation" / "test" / "metrics_detail.parquet")
    assert np.all(detail["low"].to_numpy() <= detail["high"].to_numpy())
    means = detail[~detail["key"].str.contains("ece|ace|mce|brier_|aurc|pit")]  # resampling raises those
    low, value, high = (np.asarray(means[name]) for name in ("low", "value", "high"))
    slack = 1e-9 * np.abs(value)  # what is equal in all rows is summed in another order
    assert np.all((low <= value + slack) & (value <= high + slack))
    show_metrics("scores", evaluation.metrics)
    assert f"{evaluation.metrics[0].low:.3g} .. {evaluation.metrics[0].high:.3g}" in capsys.readouterr().out


def test_the_table_names_value_unit_and_meaning(capsys: pytest.CaptureFixture[str]):
    show_metrics(
        "scores", [Metric("nll", 0.25, "nats", "surprise", "lower"), Metric("ece", None, "share", "gap", "")]
    )
    text = capsys.readouterr().out
    for word in ("scores", "nll", "0.25", "↓", "nats", "surprise", "undefined"):
        assert word in text

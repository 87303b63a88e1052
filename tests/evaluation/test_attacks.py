"""Attacks: closed forms of linear models, the ball that bounds them, and scores of what they made."""

import dataclasses
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from small_posteriors import MLP, PIXELS, RESNET, small_artefact

from bdl_train.data import Part
from bdl_train.data._table import CategoryColumn, NumericColumn, TableTransform
from bdl_train.errors import UsageError
from bdl_train.evaluation.attacks import attacks_section
from bdl_train.evaluation.rows import RowScores, score_rows
from bdl_train.evaluation.section import Section
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.atoms import Atoms
from bdl_train.predictive.differentiable import MixtureModule
from bdl_train.predictive.predict import Predictor

LINEAR = {**MLP, "hidden": []}
MIXED = TableTransform(
    (
        NumericColumn("age", 40.0, 8.0, False),
        CategoryColumn("colour", ("blue", "green", "red")),
        NumericColumn("height", 1.7, 0.1, True),
        NumericColumn("planet", 3.0, 0.0, False),
    )
)


class Scorer:
    """Scores parts, and keeps them in the order of the calls: unattacked, then each attack's strengths."""

    def __init__(self, artefact: Artefact) -> None:
        self.predictor, self.target = Predictor(artefact), artefact.target
        self.parts: list[Part] = []
        self.rows: list[RowScores] = []

    def __call__(self, part: Part) -> RowScores:
        tiles = self.predictor(torch.from_numpy(part.x), torch.from_numpy(part.y))
        scored = RowScores.concatenate([score_rows(tile, part.y[tile.rows], self.target) for tile in tiles])
        self.parts.append(part)
        self.rows.append(scored)
        return scored


def part_of(artefact: Artefact, count: int = 60, seed: int = 0) -> Part:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, *artefact.inputs.shape)).astype(np.float32)
    num_classes = artefact.target.num_classes
    y = generator.integers(0, num_classes, count) if num_classes else generator.normal(size=count)
    return Part(x, y if num_classes else y.astype(np.float32), np.arange(count))


def attacked(
    artefact: Artefact, part: Part, strengths: tuple[float, ...] = (0.1, 0.5), **settings: Any
) -> tuple[Section, Scorer]:
    scorer = Scorer(artefact)
    section = attacks_section(
        MixtureModule(artefact, device="cpu"),
        part,
        inputs=artefact.inputs,
        target=artefact.target,
        strengths=strengths,
        score=scorer,
        **{"seed": 0, "max_rows": 1000, **settings},
    )
    return section, scorer


def linear_params(artefact: Artefact) -> tuple[np.ndarray, np.ndarray]:
    (draws,) = artefact.posterior.draw(chunk_size=10)
    params = artefact.layout.unflatten(draws.flat[0].double())
    return params["0.weight"].numpy(), params["0.bias"].numpy()


def test_fgsm_on_a_linear_softmax_is_its_closed_form():
    artefact = small_artefact("categorical", num_members=1, architecture=LINEAR)
    part = part_of(artefact)
    weight, bias = linear_params(artefact)
    logits = part.x @ weight.T + bias
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (probs - np.eye(3)[part.y]) @ weight  # of the NLL
    _, scorer = attacked(artefact, part, (0.25,))
    clean, fgsm, _ = scorer.parts
    assert clean is part
    np.testing.assert_allclose(fgsm.x, part.x + 0.25 * np.sign(gradient), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(fgsm.y, part.y)


def test_signs_outlive_probabilities_that_round_to_one():
    artefact = small_artefact("categorical", num_members=1, architecture=LINEAR)
    member = artefact.posterior.members[0]
    assert isinstance(member, Atoms)
    sharp = dataclasses.replace(member, flat=60 * member.flat)
    artefact = dataclasses.replace(
        artefact, posterior=dataclasses.replace(artefact.posterior, members=[sharp])
    )
    weight, bias = linear_params(artefact)
    part = part_of(artefact)
    logits = part.x @ weight.T + bias
    part.y[:] = logits.argmax(1)
    logits[np.arange(len(part)), part.y] -= np.inf
    others = np.exp(logits - logits.max(1, keepdims=True))  # the classes that the label competes with
    gradient = (others / others.sum(1, keepdims=True) - np.eye(3)[part.y]) @ weight
    module = MixtureModule(artefact, device="cpu")
    is_certain = module.log_probs(torch.from_numpy(part.x)).max(1).values.numpy() > -1e-12
    assert is_certain.sum() > 20
    _, scorer = attacked(artefact, part, (0.25,))
    np.testing.assert_allclose(scorer.parts[1].x, part.x + 0.25 * np.sign(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson"])
def test_fgsm_on_a_linear_mean_pushes_it_away_from_the_target(likelihood: str):
    artefact = small_artefact(likelihood, num_members=1, architecture=LINEAR)
    part = part_of(artefact)
    if likelihood == "poisson":
        part = Part(part.x, np.random.default_rng(1).poisson(2, len(part)).astype(np.int64), part.rows)
    weight, bias = linear_params(artefact)
    output = part.x @ weight[0] + bias
    error = (np.exp(output) if likelihood == "poisson" else output) - part.y
    section, scorer = attacked(artefact, part, (0.25,))
    expected = part.x + 0.25 * np.sign(error[:, None] * weight)
    np.testing.assert_allclose(scorer.parts[1].x, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scorer.parts[2].x, expected, rtol=0, atol=1e-6)  # no other way is worse
    curves = section.tables["curves"].set_index(["kind", "severity", "metric"])["value"].to_dict()
    raw = artefact.target.scale * np.abs(error)
    assert curves["pgd", 0.0, "rmse"] == pytest.approx(np.sqrt(np.mean(raw**2)), rel=1e-5)
    if likelihood == "gaussian":
        further = raw + 0.25 * np.abs(weight).sum() * artefact.target.scale
        assert curves["fgsm", 0.25, "rmse"] == pytest.approx(np.sqrt(np.mean(further**2)), rel=1e-5)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_pgd_is_stronger_than_fgsm_and_both_keep_to_the_ball(likelihood: str):
    artefact = small_artefact(likelihood, "swag", num_draws=3)
    part = part_of(artefact)
    strengths = (0.1, 0.5, 1.5)
    section, scorer = attacked(artefact, part, strengths)
    assert len(scorer.parts) == 7
    for made, strength in zip(scorer.parts[1:], 2 * strengths, strict=True):
        distance = np.abs(made.x.astype(np.float64) - part.x).max(1)
        assert made.x.dtype == np.float32
        assert distance.max() <= strength * (1 + 1e-6) + 1e-6
        assert np.median(distance) > 0.9 * strength
    metric = "rmse" if likelihood == "gaussian" else "nll"
    curves = section.tables["curves"]
    value = curves[curves["metric"] == metric].set_index(["kind", "severity"])["value"].to_dict()
    for strength in strengths:
        assert value["pgd", strength] >= value["fgsm", strength] - 1e-4
    assert value["pgd", 1.5] > value["fgsm", 1.5] + 1e-3
    assert value["pgd", 0.0] < value["pgd", 0.1] < value["pgd", 0.5] < value["pgd", 1.5]


def test_epsilon_zero_are_the_rows_as_they_are():
    artefact = small_artefact("categorical")
    part = part_of(artefact)
    section, scorer = attacked(artefact, part, (0.0, 0.3))
    curves = section.tables["curves"]
    assert set(curves["severity"]) == {0.0, 0.3}
    for kind in ("fgsm", "pgd"):
        at_zero = curves[(curves["kind"] == kind) & (curves["severity"] == 0)].set_index("metric")
        clean = scorer.rows[0].columns
        for metric, column in (
            ("accuracy", "correct"),
            ("nll", "nll"),
            ("total", "total"),
            ("epistemic", "epistemic"),
        ):
            assert at_zero["value"].to_dict()[metric] == pytest.approx(clean[column].mean())
        assert all(low <= value <= high for low, value, high in at_zero[["low", "value", "high"]].to_numpy())
        assert set(at_zero["n"]) == {60}


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_categories_missing_values_and_flags_stay(likelihood: str, monkeypatch: pytest.MonkeyPatch):
    artefact = dataclasses.replace(small_artefact(likelihood, inputs=MIXED.input_spec), transform=MIXED)
    part = part_of(artefact)
    part.x[:, 1:4] = np.eye(3)[np.arange(60) % 3]
    part.x[:, 5] = np.arange(60) < 20  # height is missing in the first rows
    part.x[:20, 4] = 0
    part.x[:, 6] = 0
    seen, run = [], MixtureModule._over_chunks
    monkeypatch.setattr(
        MixtureModule, "_over_chunks", lambda self, x: seen.append(x.detach()) or run(self, x)
    )
    _, scorer = attacked(artefact, part)
    fixed = torch.cat(seen)[:, [1, 2, 3, 5, 6]]  # not on the way either
    assert len(fixed) > 20 * 60
    assert torch.equal(fixed, fixed.round())
    for made in scorer.parts[1:]:
        np.testing.assert_array_equal(made.x[:, [1, 2, 3, 5, 6]], part.x[:, [1, 2, 3, 5, 6]])
        np.testing.assert_array_equal(made.x[:20, 4], 0)
        assert np.all(made.x[20:, 4] != part.x[20:, 4])
        assert np.all(made.x[:, 0] != part.x[:, 0])


def test_images_are_whole_pixels_within_epsilon():
    artefact = small_artefact("categorical", architecture=RESNET, inputs=PIXELS)
    x = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8)).astype(np.uint8)
    x[0, 0, 0, :2] = (0, 255)
    part = Part(x, np.random.default_rng(0).integers(0, 3, 4), np.arange(4))
    section, scorer = attacked(artefact, part, (4.5,))
    for made in scorer.parts[1:]:
        assert made.x.dtype == np.uint8
        change = np.abs(made.x.astype(int) - x)
        assert change.max() == 4  # 4.5 would leave the ball by rounding to 5
        assert change.mean() > 2
    assert [one.split(" ")[0] for one in section.warnings] == ["Rounding", "Rounding"]
    assert "(pixel values of 255)" in section.verdict
    assert scorer.rows[2].columns["nll"].mean() > scorer.rows[0].columns["nll"].mean()


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_detection_is_the_area_of_scikit_learn(likelihood: str):
    artefact = small_artefact(likelihood, "swag", num_draws=3)
    section, scorer = attacked(artefact, part_of(artefact))
    table = section.tables["detection"].set_index(["kind", "severity", "score"])
    clean = scorer.rows[0].columns
    end = "_std" if likelihood == "gaussian" else ""
    expected = {}
    for (kind, severity), rows in zip(
        [("fgsm", 0.1), ("fgsm", 0.5), ("pgd", 0.1), ("pgd", 0.5)], scorer.rows[1:], strict=True
    ):
        for name in ("total", "epistemic"):
            both = np.concatenate([clean[name + end], rows.columns[name + end]])
            expected[kind, severity, name] = roc_auc_score(np.repeat([0, 1], 60), both)
    assert table["auroc"].to_dict() == pytest.approx(expected)
    assert table["auroc"].between(table["low"], table["high"]).all()
    rises = table["low"].to_dict()["pgd", 0.5, "epistemic"] > 0.5
    assert section.level == ("note" if rises else "warn")
    assert ("does not rise for certain" in section.verdict) != rises
    assert f"AUROC of {expected['pgd', 0.5, 'epistemic']:.3f}" in section.verdict


def test_the_seed_decides_and_global_generators_stay():
    artefact = small_artefact("categorical")
    part = part_of(artefact, 30)
    states = pickle.dumps(np.random.get_state()), torch.random.get_rng_state()
    _, one = attacked(artefact, part, seed=3, max_rows=20)
    assert pickle.dumps(np.random.get_state()) == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    np.random.seed(7)
    section, again = attacked(artefact, part, seed=3, max_rows=20)
    np.testing.assert_array_equal(one.parts[-1].x, again.parts[-1].x)
    np.testing.assert_array_equal(one.parts[0].rows, again.parts[0].rows)
    assert section.warnings == ("20 of 30 rows, taken at random.",)


def test_wrong_use_is_refused(monkeypatch: pytest.MonkeyPatch):
    artefact = small_artefact("categorical")
    part = part_of(artefact)
    for strengths in ((), (0.0,), (-1.0,), (float("nan"),)):
        with pytest.raises(UsageError, match="strengths must be one or more finite numbers"):
            attacked(artefact, part, strengths)
    images = small_artefact("categorical", architecture=RESNET, inputs=PIXELS)
    with pytest.raises(UsageError, match=r"pixel values of 255, 1 or more\), got \[0.03\]"):
        attacked(images, Part(np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, int), np.arange(2)), (0.03,))
    only = TableTransform((CategoryColumn("colour", ("blue", "green", "red")),))
    with pytest.raises(UsageError, match="No row has a numeric column"):
        attacked(dataclasses.replace(artefact, transform=only), part)
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    with pytest.raises(UsageError, match=r"pip install 'bdl_train\[attacks\]'"):
        attacked(artefact, part)

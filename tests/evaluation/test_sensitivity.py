"""Sensitivity: linear models know their derivatives, switches are enumerated by hand, kinks are told."""

import dataclasses

import numpy as np
import pytest
import torch
from small_posteriors import MLP, PIXELS, RESNET, small_artefact

from bdl_train.data import Part
from bdl_train.data._table import CategoryColumn, NumericColumn, TableTransform
from bdl_train.errors import UsageError
from bdl_train.evaluation.features import sample_rows, take
from bdl_train.evaluation.section import Section, read_section, write_section
from bdl_train.evaluation.sensitivity import sensitivity_section
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.atoms import Atoms
from bdl_train.predictive.differentiable import MixtureModule

LINEAR = {**MLP, "hidden": []}
TRANSFORM = TableTransform(
    (
        NumericColumn("age", 40.0, 8.0, False),
        CategoryColumn("colour", ("blue", "green", "red")),
        NumericColumn("height", 1.7, 0.1, True),
        NumericColumn("planet", 3.0, 0.0, False),
    )
)
COLUMNS = {"age": 0, "colour": slice(1, 4), "height": 4, "flag": 5, "planet": 6}


def artefact_of(likelihood: str, num_members: int = 3, **settings) -> Artefact:
    artefact = small_artefact(
        likelihood, num_members=num_members, inputs=TRANSFORM.input_spec, **{"dtype": "float64", **settings}
    )
    return dataclasses.replace(artefact, transform=TRANSFORM)


def part_of(count: int = 40) -> Part:
    generator = np.random.default_rng(0)
    x = np.zeros((count, 7), np.float32)
    x[:, [0, 4]] = generator.normal(size=(count, 2))
    x[np.arange(count), 1 + generator.integers(0, 3, count)] = 1
    x[:5, 4], x[:5, 5] = 0, 1  # five missing heights
    x[5, 1:4] = 0  # a colour never seen
    return Part(x, np.zeros(count, np.float32), np.arange(count))


def section_of(artefact: Artefact, part: Part, **settings) -> Section:
    return sensitivity_section(
        MixtureModule(artefact, device="cpu"),
        part,
        inputs=artefact.inputs,
        transform=artefact.transform,
        target=artefact.target,
        **{"seed": 0, "max_rows": 1000, **settings},
    )


def weights_of(artefact: Artefact) -> np.ndarray:
    """Weights `[M, D]` of linear members with one output."""
    (draws,) = artefact.posterior.draw(chunk_size=100)
    return artefact.layout.unflatten(draws.flat)["0.weight"].numpy()[:, 0]


def test_linear_gaussian_members_show_their_weights():
    artefact = artefact_of("gaussian", architecture=LINEAR)
    part, target = part_of(), artefact.target
    weights = weights_of(artefact)
    table = section_of(artefact, part).tables["features"].set_index("feature")
    slope = np.abs(weights.mean(0)) * target.scale
    for name in ("age", "height"):
        row = table.loc[name]
        expected = slope[COLUMNS[name]]
        assert row["gradient"] == pytest.approx(expected)
        assert row["gradient_raw"] == pytest.approx(expected / {"age": 8.0, "height": 0.1}[name])
        assert row["finite_difference"] == pytest.approx(expected, rel=1e-6)
        assert row["disagreement"] < 1e-6
        assert (row["low"], row["high"]) == (pytest.approx(expected), pytest.approx(expected))
    assert table.loc["height", "n"] == 35  # rows where it is missing have no height to move
    assert table.loc["age", "n"] == 40

    # d std / dx of the members' means, by numpy: std = sqrt(mean of squared deviations).
    outputs = part.x.astype(np.float64) @ weights.T + biases_of(artefact)
    deviations, slopes = outputs - outputs.mean(1, keepdims=True), weights - weights.mean(0)
    derivative = (deviations @ slopes) / 3 / outputs.std(1)[:, None] * target.scale
    assert table.loc["age", "epistemic_gradient"] == pytest.approx(np.abs(derivative[:, 0]).mean(), rel=1e-6)
    assert table.loc["planet", ["gradient", "gradient_raw", "effect", "n"]].tolist() == [0, 0, 0, 0]


def biases_of(artefact: Artefact) -> np.ndarray:
    (draws,) = artefact.posterior.draw(chunk_size=100)
    return artefact.layout.unflatten(draws.flat)["0.bias"].numpy()[:, 0]


def test_switching_a_category_is_enumerated():
    artefact = artefact_of("gaussian", architecture=LINEAR)
    part = part_of()
    by_level = weights_of(artefact).mean(0)[COLUMNS["colour"]] * artefact.target.scale
    changes = []
    for own in part.x[:, COLUMNS["colour"]]:
        here = own @ by_level
        others = [by_level[level] for level in range(3) if own[level] == 0]  # all three where none was known
        changes.append(np.mean(np.abs(others - here)))
    section = section_of(artefact, part)
    row = section.tables["features"].set_index("feature").loc["colour"]
    assert row["finite_difference"] == row["effect"] == pytest.approx(np.mean(changes))
    assert row["low"] < row["effect"] < row["high"]
    assert (row["kind"], row["n"]) == ("category", 40)
    assert np.isnan(row["gradient"])
    assert "per switch of a category" in section.verdict


def test_the_probability_of_the_predicted_class_is_differentiated():
    artefact = artefact_of("categorical", num_members=1, architecture=LINEAR)
    part = part_of()
    (draws,) = artefact.posterior.draw(chunk_size=10)
    params = artefact.layout.unflatten(draws.flat[0])
    weight, bias = params["0.weight"].numpy(), params["0.bias"].numpy()
    logits = part.x.astype(np.float64) @ weight.T + bias
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    top = probs.argmax(1)
    p = probs[np.arange(40), top]
    derivative = p[:, None] * (weight[top] - probs @ weight)  # of softmax
    section = section_of(artefact, part)
    row = section.tables["features"].set_index("feature").loc["age"]
    assert row["gradient"] == pytest.approx(np.abs(derivative[:, 0]).mean())
    assert row["epistemic_gradient"] == pytest.approx(0, abs=1e-12)  # one member has no doubts
    assert section.verdict.startswith("The probability of the predicted class moves most with")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "heteroscedastic_gaussian"])
def test_smooth_networks_agree_with_finite_differences(likelihood: str, dtype: str):
    section = section_of(artefact_of(likelihood, dtype=dtype), part_of())
    table = section.tables["features"]
    numbers = table[(table["kind"] == "number") & (table["n"] > 0)]
    tolerance = 1e-3 if dtype == "float32" else 1e-7
    np.testing.assert_allclose(numbers["gradient"], numbers["finite_difference"], rtol=tolerance, atol=1e-4)
    assert section.warnings == ("Never moved, being constant or missing in all rows: planet.",)
    assert table["rank"].tolist() == sorted(table["rank"]) == [1, 2, 3, 4]
    assert f"{table['feature'][0]} (" in section.verdict


def test_a_kink_is_told():
    # One hidden ReLU unit with its kink at age 0: half of each difference sees the slope.
    artefact = artefact_of(
        "gaussian", num_members=1, architecture={**MLP, "hidden": [1], "activation": "relu"}
    )
    params = artefact.layout.unflatten(torch.zeros(artefact.layout.num_params, dtype=torch.float64))
    params["0.weight"][0, 0] = params["2.weight"][:] = 1
    member = Atoms(artefact.layout.flatten(params)[None], {})
    artefact = dataclasses.replace(
        artefact, posterior=dataclasses.replace(artefact.posterior, members=[member])
    )
    part = part_of()
    part.x[:, 0] = 0
    section = section_of(artefact, part)
    row = section.tables["features"].set_index("feature").loc["age"]
    assert row["finite_difference"] == pytest.approx(artefact.target.scale / 2)
    assert row["disagreement"] == pytest.approx(
        artefact.target.scale / 2
    )  # torch takes the slope 0 at the kink
    assert any("disagree by more than 5% for age" in one for one in section.warnings)


def test_images_give_a_map():
    artefact = small_artefact("categorical", architecture=RESNET, inputs=PIXELS, dtype="float64")
    x = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8)).astype(np.uint8)
    part = Part(x, np.zeros(6, np.int64), np.arange(6))
    section = section_of(artefact, part, max_rows=4)
    table = section.tables["pixels"]
    assert table.shape == (64, 5)
    assert table[["channel", "row", "column"]].to_numpy()[9].tolist() == [0, 1, 1]
    assert section.warnings == ("4 of 6 rows, taken at random.",)

    # One pixel by finite differences through the stored path's scaling.
    module = MixtureModule(artefact, device="cpu")
    pixels = torch.from_numpy(sample_rows(part, 4, 0).x).double() / 255
    with torch.no_grad():
        label = module.log_probs(module.from_pixels(pixels)).argmax(1)
        step = torch.zeros_like(pixels)
        step[:, 0, 3, 4] = 1e-6
        above, below = (
            module.log_probs(module.from_pixels(one)).exp().gather(1, label[:, None])
            for one in (pixels + step, pixels - step)
        )
    expected = ((above - below) / 2e-6).abs().mean().item()
    assert table["gradient"].to_numpy().reshape(8, 8)[3, 4] == pytest.approx(expected, rel=1e-6)


def test_a_sample_of_rows_is_said():
    section = section_of(artefact_of("gaussian"), part_of(100), max_rows=30)
    assert section.warnings[0] == "30 of 100 rows, taken at random."


def test_rows_that_overflow_are_left_out():
    artefact = artefact_of("poisson", architecture=LINEAR)
    part = part_of()
    part.x[7, 0] = 1e30
    section = section_of(artefact, part)
    assert "Left out, their prediction being not finite: 1 of the rows." in section.warnings
    assert section.tables["features"]["n"].tolist().count(39) == 2  # age and colour


def test_wrong_use_is_refused(tmp_path):
    artefact = artefact_of("gaussian")
    with pytest.raises(UsageError, match="max_rows=0"):
        section_of(artefact, part_of(), max_rows=0)
    with pytest.raises(UsageError, match="this part has 0"):
        section_of(artefact, take(part_of(), np.arange(0)))
    section = section_of(artefact, part_of())
    write_section(tmp_path, section)
    assert read_section(tmp_path, "sensitivity").verdict == section.verdict

import numpy as np
import pytest
import torch

from bdl_train.config import compose
from bdl_train.evaluation.prior_check import check_prior, prior_predictive, summarise
from bdl_train.runs import RunDir, read_json
from bdl_train.training.problem import Recipe
from bdl_train.verbs._runs import load_data

LINEAR = ["data.name=diabetes", "likelihood=gaussian", "likelihood.learn_noise=false", "model.hidden=[]"]


def recipe_and_data(*overrides):
    config = compose("train", list(overrides))
    data = load_data(config)
    return Recipe.of(config, data), data


def test_prior_predictive_variance_of_a_linear_model_is_the_closed_form():
    scale, noise, num_draws = 0.4, 0.3, 4000
    recipe, data = recipe_and_data(*LINEAR, f"prior.scale={scale}", f"likelihood.noise_std={noise}")
    components, y = prior_predictive(recipe, data, num_draws)
    got = components.mean.double().var(0) + noise**2
    # Rows come back as targets only: match those whose target is unique. Var = scale² (|x|² + 1) + noise².
    x, targets = data.train.x.astype(np.float64), data.train.y.tolist()
    expected = {
        t: scale**2 * (np.square(row).sum() + 1) + noise**2 for t, row in zip(targets, x, strict=True)
    }
    unique = [i for i, t in enumerate(y.tolist()) if targets.count(t) == 1]
    assert len(unique) > 50
    # A variance from n draws is off by sqrt(2 / n) of itself; allow five times that.
    closed = [expected[y[i].item()] for i in unique]
    np.testing.assert_allclose(got[unique].numpy(), closed, rtol=5 * np.sqrt(2 / num_draws))


@pytest.mark.parametrize(("scale", "word"), [(1e-3, "too narrow"), (0.3, "plausible"), (50.0, "very wide")])
def test_verdict_on_numbers_follows_the_width(scale, word):
    recipe, data = recipe_and_data(*LINEAR, f"prior.scale={scale}", "likelihood.noise_std=0.05")
    check = summarise(*prior_predictive(recipe, data), data.target)
    assert check.summary["verdict"].startswith(word), check.summary


@pytest.mark.parametrize(("scale", "word"), [(0.05, "plausible"), (5.0, "overconfident")])
def test_verdict_on_classes_follows_the_confidence(scale, word):
    recipe, data = recipe_and_data("data.name=wine", f"prior.scale={scale}")
    check = summarise(*prior_predictive(recipe, data), data.target)
    assert check.summary["verdict"].startswith(word), check.summary
    assert sum(check.summary["class_probs"].values()) == pytest.approx(1)


def test_files_are_written_and_the_global_generator_is_untouched(tmp_path, capsys):
    recipe, data = recipe_and_data("data.name=wine")
    before = torch.random.get_rng_state()
    check_prior(RunDir(tmp_path), recipe, data)
    assert torch.equal(before, torch.random.get_rng_state())
    assert read_json(tmp_path / "prior_check" / "summary.json")["verdict"] in capsys.readouterr().out
    assert (tmp_path / "prior_check" / "prior_predictive.png").read_bytes().startswith(b"\x89PNG")

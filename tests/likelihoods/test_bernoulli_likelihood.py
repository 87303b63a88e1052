import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from bdl_train.errors import UsageError
from bdl_train.likelihoods.bernoulli import Bernoulli
from bdl_train.likelihoods.categorical import Categorical
from bdl_train.specs import TargetKind, TargetSpec

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=3, size=(4, 25))
Y = RNG.integers(0, 2, size=(4, 25))


def test_log_prob_is_scipys():
    expected = scipy.stats.bernoulli.logpmf(Y, scipy.special.expit(LOGITS))
    log_prob = Bernoulli().log_prob(torch.tensor(LOGITS)[..., None], torch.tensor(Y), {})
    np.testing.assert_allclose(log_prob, expected, rtol=1e-12)


def test_both_labels_together_have_probability_one():
    outputs = torch.tensor(LOGITS)[..., None]
    both = [Bernoulli().log_prob(outputs, torch.full((4, 25), y), {}).exp() for y in (0, 1)]
    np.testing.assert_allclose(both[0] + both[1], 1, rtol=1e-12)


def test_equals_categorical_with_the_first_logit_at_zero():
    outputs = torch.tensor(LOGITS)[..., None]
    two = torch.cat([torch.zeros_like(outputs), outputs], dim=-1)
    y = torch.tensor(Y)
    torch.testing.assert_close(Bernoulli().log_prob(outputs, y, {}), Categorical().log_prob(two, y, {}))


def test_a_certain_wrong_label_costs_its_logit():
    log_prob = Bernoulli().log_prob(torch.tensor([[1e4], [-1e4]]), torch.tensor([0, 1]), {})
    assert log_prob.tolist() == [-1e4, -1e4]


def test_mean_and_variance_of_the_component():
    component = Bernoulli().distribution(torch.tensor(LOGITS)[..., None], {})
    scipys = scipy.stats.bernoulli(scipy.special.expit(LOGITS))
    np.testing.assert_allclose(component.mean, scipys.mean(), rtol=1e-12)
    np.testing.assert_allclose(component.variance, scipys.var(), rtol=1e-12)


def test_one_output():
    assert Bernoulli().num_outputs(TargetSpec(TargetKind.CLASS, "y", ("a", "b"))) == 1


@pytest.mark.parametrize("classes", [("a",), ("a", "b", "c")])
def test_other_than_two_classes_are_sent_to_categorical(classes: tuple[str, ...]):
    with pytest.raises(UsageError, match=rf"'y' has {len(classes)}\. Use likelihood=categorical"):
        Bernoulli().check(TargetSpec(TargetKind.CLASS, "y", classes))

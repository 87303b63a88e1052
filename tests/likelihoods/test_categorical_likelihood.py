import numpy as np
import pytest
import scipy.special
import torch

from bdl_train.errors import UsageError
from bdl_train.likelihoods.categorical import Categorical
from bdl_train.specs import TargetKind, TargetSpec

RNG = np.random.default_rng(0)


def test_log_prob_is_log_softmax_of_the_label():
    logits = RNG.normal(scale=4, size=(3, 20, 5))
    y = RNG.integers(0, 5, size=(3, 20))
    expected = np.take_along_axis(scipy.special.log_softmax(logits, axis=-1), y[..., None], -1)[..., 0]
    log_prob = Categorical().log_prob(torch.tensor(logits), torch.tensor(y), {})
    np.testing.assert_allclose(log_prob, expected, rtol=1e-12)


def test_probabilities_sum_to_one_and_ignore_a_constant_added_to_the_logits():
    logits = torch.tensor(RNG.normal(scale=4, size=(6, 4)))
    every = torch.arange(4).expand(6, 4)
    log_probs = Categorical().log_prob(logits[:, None, :].expand(6, 4, 4), every, {})
    torch.testing.assert_close(
        log_probs.exp().sum(-1), torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(Categorical().distribution(logits + 100, {}).probs, log_probs.exp())


def test_as_many_outputs_as_classes():
    assert Categorical().num_outputs(TargetSpec(TargetKind.CLASS, "y", ("a", "b", "c"))) == 3


def test_one_class_is_refused():
    with pytest.raises(UsageError, match=r"two classes or more.*'y' has 1 \(\['only'\]\)"):
        Categorical().check(TargetSpec(TargetKind.CLASS, "y", ("only",)))

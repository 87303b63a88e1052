"""What each draw of a chain predicts, against networks whose weights are put in by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_chains import chain_artefact, some_rows
from small_posteriors import small_artefact
from torch.nn.utils import vector_to_parameters

from bdl_train.errors import UsageError
from bdl_train.evaluation import chain_values as module
from bdl_train.evaluation.chain_values import chain_values, no_chains
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.chain import Chain
from bdl_train.predictive.predict import Predictor


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def outputs_by_hand(artefact: Artefact, x: np.ndarray) -> torch.Tensor:
    """`[M, K, B, O]` float64, one network at a time."""
    network, found = artefact.network(), []
    size = sum(one.numel() for one in network.parameters())
    for member in artefact.posterior.members:
        assert isinstance(member, Chain)
        for flat in member.flat:
            vector_to_parameters(flat[:size], network.parameters())
            with torch.no_grad():
                found.append(network(torch.from_numpy(x)).double())
    return torch.stack(found).unflatten(0, (artefact.posterior.num_members, -1))


@pytest.mark.parametrize(
    "likelihood", ["heteroscedastic_gaussian", "gaussian", "poisson", "categorical", "bernoulli"]
)
def test_values_are_what_each_network_predicts(likelihood: str):
    artefact = chain_artefact(likelihood)
    part = some_rows(artefact)
    found = chain_values(artefact, Predictor(artefact), part)
    out = outputs_by_hand(artefact, part.x)
    params = [name for name in artefact.layout.names if name.startswith("likelihood.")]
    if likelihood == "heteroscedastic_gaussian":
        std = torch.nn.functional.softplus(out[..., 1]) + 1e-3
        expected = {"mean": out[..., 0], "log std": std.log()}
    elif likelihood == "categorical":
        logs = out.log_softmax(-1)
        expected = {"log p(versicolor)": logs[..., 1], "log p(virginica)": logs[..., 2]}
    elif likelihood == "bernoulli":
        expected = {"log p(malign)": torch.sigmoid(out[..., 0]).log()}
    else:
        expected = {"mean": out[..., 0].exp() if likelihood == "poisson" else out[..., 0]}
    assert set(found.names) == {*expected, *params}
    assert len(found.names) == len(found.rows) == len(found.values) == len(expected) * len(part) + len(params)
    for value, row, name in zip(found.values, found.rows, found.names, strict=True):
        if row >= 0:
            by_hand = expected[name][..., row - 1000].numpy()
        else:
            chains = [one for one in artefact.posterior.members if isinstance(one, Chain)]
            by_hand = np.stack([one.flat[:, artefact.layout.columns([name])][:, 0].numpy() for one in chains])
        np.testing.assert_allclose(value, by_hand, rtol=1e-5, atol=1e-6)


def test_rows_are_spread_evenly_and_values_are_few(monkeypatch: pytest.MonkeyPatch):
    artefact = chain_artefact("categorical")
    part = some_rows(artefact, 1001)
    found = chain_values(artefact, Predictor(artefact), part)
    assert len(found.values) == 400  # 200 rows, two classes beside the first
    assert sorted(set(found.rows.tolist()))[:3] == [1000, 1005, 1010]
    assert max(found.rows) == 2000
    monkeypatch.setattr(module, "MOST_VALUES", 50)
    few = chain_values(artefact, Predictor(artefact), part)
    assert len(few.values) == 50
    assert set(few.names) == set(found.names)
    all_of = {
        (row, name): value for row, name, value in zip(found.rows, found.names, found.values, strict=True)
    }
    for row, name, value in zip(few.rows, few.names, few.values, strict=True):
        np.testing.assert_array_equal(value, all_of[row, name])


def test_rows_in_blocks_and_a_share_of_the_draws_change_nothing():
    artefact = chain_artefact()
    part = some_rows(artefact)
    whole = chain_values(artefact, Predictor(artefact), part)
    blocks, fewer = Predictor(artefact), Predictor(artefact, num_draws=5)
    blocks.block_rows = 7
    for predictor in (blocks, fewer):
        again = chain_values(artefact, predictor, part)
        assert again.names == whole.names
        np.testing.assert_allclose(again.values, whole.values, rtol=1e-5, atol=1e-6)


def test_traces_are_those_of_all_members():
    artefact = chain_artefact(traces=("potential", "step_size"))
    first = artefact.posterior.members[0]
    assert isinstance(first, Chain)
    members = [
        replace(first, traces={"potential": first.traces["potential"]}),
        *artefact.posterior.members[1:],
    ]
    lacking = replace(artefact, posterior=replace(artefact.posterior, members=members))
    found = chain_values(lacking, Predictor(lacking), some_rows(artefact))
    assert set(found.traces) == {"potential"}
    np.testing.assert_array_equal(found.traces["potential"][0], first.traces["potential"].numpy())


def test_other_posteriors_have_no_chains_and_the_reason_says_what_they_are():
    assert no_chains(chain_artefact()) is None
    for method, words in (("ensemble", "single weight vectors"), ("swag", "distributions")):
        artefact = small_artefact("gaussian", method)
        assert words in str(no_chains(artefact))
        with pytest.raises(UsageError, match="There is no R-hat"):
            chain_values(artefact, Predictor(artefact), some_rows(artefact))
    artefact = chain_artefact()
    two = artefact.posterior.members[:2]
    short = chain_artefact(num_draws=3)
    assert "3 draws, 4 or more" in str(no_chains(short))
    uneven = replace(artefact.posterior, members=[*two, short.posterior.members[2]])
    assert "3 to 40 draws" in str(no_chains(replace(artefact, posterior=uneven)))

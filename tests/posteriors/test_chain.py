"""Chains: atoms with the numbers that the sampler gave to each."""

import pytest
import torch

from bdl_train.posteriors.chain import Chain

FLAT = torch.arange(12.0).reshape(4, 3)
TRACES = {"potential": torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64)}


def test_a_chain_comes_back_whole_from_its_tensors():
    chain = Chain(FLAT, {"running": torch.ones(4, 2)}, TRACES)
    back = Chain.from_tensors(chain.tensors())
    assert torch.equal(back.flat, FLAT)
    assert list(back.buffers) == ["running"]
    assert torch.equal(back.traces["potential"], TRACES["potential"])
    assert back.num_atoms == 4


def test_a_trace_of_another_length_is_refused():
    tensors = {**Chain(FLAT, {}, TRACES).tensors(), "trace:step_size": torch.ones(3)}
    with pytest.raises(ValueError, match=r"step_size.*4 states"):
        Chain.from_tensors(tensors)


def test_its_states_are_drawn_in_the_order_in_which_they_were_visited():
    drawn = [flat for flat, _ in Chain(FLAT, {}, TRACES).draw(4, seed=0)]
    assert torch.equal(torch.stack(drawn), FLAT)

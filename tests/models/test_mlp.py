"""The multilayer perceptron against matrix products in numpy."""

import numpy as np
import pytest
import torch

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.models.mlp import Mlp
from bdl_train.specs import InputSpec

torch.set_num_threads(1)

ACTIVATIONS = {
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
    "silu": lambda z: z / (1 + np.exp(-z)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_are_the_chain_of_matrix_products(activation):
    network = Mlp(hidden=[7, 5], activation=activation, dropout=0.0).network(InputSpec((4,)), 2).double()
    x = np.random.default_rng(0).normal(size=(6, 4))
    weights = [value.detach().numpy() for value in network.parameters()]
    h = x
    for weight, bias in zip(weights[0:4:2], weights[1:4:2], strict=True):
        h = ACTIVATIONS[activation](h @ weight.T + bias)
    np.testing.assert_allclose(
        network(torch.tensor(x)).detach().numpy(), h @ weights[4].T + weights[5], rtol=1e-12
    )


def test_parameter_count_of_the_benchmark_network():
    # 13 → 50 → 2: 13·50 + 50 + 50·2 + 2
    network = Mlp(hidden=[50], activation="relu", dropout=0.0).network(InputSpec((13,)), 2)
    assert sum(value.numel() for value in network.parameters()) == 802


def test_no_hidden_layer_is_a_linear_model_and_images_are_flattened():
    network = Mlp(hidden=[], activation="relu", dropout=0.0).network(InputSpec((3, 4, 5)), 10)
    assert [tuple(value.shape) for value in network.parameters()] == [(10, 60), (10,)]
    assert network(torch.zeros(2, 3, 4, 5)).shape == (2, 10)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("hidden", [0], "model.hidden.0"),
        ("activation", "rleu", "model.activation"),
        ("dropout", 1.0, "model.dropout"),
    ],
)
def test_bad_settings_are_refused_by_key(key, value, word):
    node = {
        "_target_": "bdl_train.models.mlp.Mlp",
        "hidden": [5],
        "activation": "relu",
        "dropout": 0.0,
        key: value,
    }
    with pytest.raises(UsageError, match=word):
        build(node, Mlp, key="model")

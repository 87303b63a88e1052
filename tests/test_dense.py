import pytest
import torch
from torch import nn

from bdl_train.dense import DenseNetwork
from bdl_train.stack import StackedNetwork, build_stack


def make(*layers):
    return nn.Sequential(*layers)


NETWORKS = {
    "mlp": (lambda: make(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)), (4,)),
    "linear": (lambda: make(nn.Linear(4, 1)), (4,)),
    "image": (lambda: make(nn.Flatten(), nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 3)), (3, 2, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shared", [False, True])
def test_hand_batching_equals_a_loop_over_plain_modules(name, shared):
    factory, shape = NETWORKS[name]
    template, stack = build_stack(factory, [1, 2, 3], dtype=torch.float64)
    x = torch.randn(
        *(() if shared else (3,)), 6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    outputs, _ = StackedNetwork(template, "vmap")(stack.params, {}, x, train=True, shared=shared)
    for m in range(3):
        module = factory().double()
        module.load_state_dict({key: value[m] for key, value in stack.params.items()})
        torch.testing.assert_close(outputs[m], module(x if shared else x[m]), rtol=1e-12, atol=1e-13)


TWICE = nn.ReLU()


class OtherLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize(
    "network",
    [
        make(nn.Linear(3, 3, bias=False)),
        make(nn.Linear(3, 3), nn.Dropout(0.1)),
        make(nn.Linear(3, 3), nn.LayerNorm(3)),
        make(OtherLinear(3, 3)),
        make(nn.Flatten(2), nn.Linear(3, 3)),
        nn.Linear(3, 3),
        make(nn.Linear(3, 3), TWICE, nn.Linear(3, 3), TWICE),
    ],
    ids=["no bias", "dropout", "norm", "subclass", "other flatten", "no sequential", "a module twice"],
)
def test_anything_else_is_left_to_vmap(network):
    assert DenseNetwork.of(network) is None

"""Wide residual networks: published sizes, pre-activation blocks, dropout's place."""

import pytest
import torch
from torch import nn

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.models._dropout import Dropout
from bdl_train.models.wide_resnet import Block, WideResNet
from bdl_train.specs import InputSpec

torch.set_num_threads(1)


def hand_count(depth: int, k: int, channels: int, classes: int) -> int:
    """Weights of WRN-depth-k from Table 1 of the paper, batch norm's two numbers a channel included."""
    n = (depth - 4) // 6
    total, width = 9 * channels * 16, 16
    for out in (16 * k, 32 * k, 64 * k):
        for _ in range(n):
            total += 2 * width + 9 * width * out + 2 * out + 9 * out * out
            total += width * out if width != out else 0
            width = out
    return total + 2 * width + width * classes + classes


@pytest.mark.parametrize(
    ("depth", "k", "expected", "millions"),
    [(16, 4, 2_748_890, 2.7), (16, 8, 10_961_370, 11.0), (40, 4, 8_949_210, 8.9), (28, 10, 36_479_194, 36.5)],
)
def test_parameter_count(depth, k, expected, millions):
    with torch.device("meta"):
        network = WideResNet(depth=depth, widen_factor=k, norm="batch", dropout=0.3).network(
            InputSpec((3, 32, 32)), 10
        )
    actual = sum(value.numel() for value in network.parameters())
    assert actual == expected == hand_count(depth, k, 3, 10)
    assert round(actual / 1e6, 1) == millions  # as the paper's Tables 4 and 5 round it
    convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) == depth  # 6n + 1 of 3×3 and three 1×1 shortcuts
    assert all(layer.bias is None for layer in convs)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("norm", ["batch", "group", "filter_response"])
def test_output_shape(shape, norm):
    network = WideResNet(depth=10, widen_factor=1, norm=norm, dropout=0.2).network(InputSpec(shape), 10)
    assert network(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 2), (8, 1)])
def test_a_block_without_branch_is_its_shortcut(channels, stride):
    block = Block(4, channels, stride, "batch", 0.0).eval()
    nn.init.zeros_(block.branch[-1].weight)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 4, 6, 6)
    y = block(x)
    if channels == 4:
        assert block.project is None
        assert torch.equal(y, x)
    else:
        # In eval mode a fresh batch norm only divides by √(1 + 1e-5).
        entered = (x / (1 + 1e-5) ** 0.5).relu()[:, :, ::stride, ::stride]
        assert block.project is not None
        weight = block.project.weight[:, :, 0, 0]
        torch.testing.assert_close(y, torch.einsum("oc,bchw->bohw", weight, entered))


def test_dropout_stands_in_front_of_the_second_convolution():
    block = Block(4, 4, 1, "batch", 0.3)
    assert [type(layer).__name__ for layer in block.branch] == [
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Dropout",
        "Conv2d",
    ]
    network = WideResNet(depth=16, widen_factor=1, norm="group", dropout=0.3).network(InputSpec((1, 8, 8)), 3)
    assert sum(isinstance(layer, Dropout) for layer in network.modules()) == 6


@pytest.mark.parametrize("depth", [12, 20, 27])
def test_depths_other_than_6n_plus_4_are_refused(depth):
    node = {
        "_target_": "bdl_train.models.wide_resnet.WideResNet",
        "depth": depth,
        "widen_factor": 1,
        "norm": "batch",
        "dropout": 0.0,
    }
    with pytest.raises(UsageError, match=rf"model: .*6n \+ 4.*got {depth}"):
        build(node, WideResNet, key="model")

"""ResNet-20: its published size, its shortcuts, and its output by torch's functions alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdl_train.models.resnet20 import Block, ResNet20
from bdl_train.specs import InputSpec

torch.set_num_threads(1)


def count(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize(
    ("channels", "norm", "expected"),
    [
        # 9(3·16 + 6·16² + 16·32 + 5·32² + 32·64 + 5·64²) in convolutions, 2·688 in norms of
        # 7·16 + 6·32 + 6·64 channels, 650 in the last layer: 267,696 + 1,376 + 650, the paper's 0.27M
        (3, "batch", 269_722),
        (3, "group", 269_722),
        (1, "batch", 269_434),  # 9·16·2 fewer weights in the first layer
        (3, "filter_response", 270_410),  # one threshold a channel, 688 more
    ],
)
def test_parameter_count(channels, norm, expected):
    with torch.device("meta"):
        network = ResNet20(width=16, norm=norm).network(InputSpec((channels, 32, 32)), 10)
    assert count(network) == expected
    convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) + 1 == 20
    assert all(layer.bias is None for layer in convs)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("norm", ["batch", "group", "filter_response"])
def test_output_shape(shape, norm):
    network = ResNet20(width=4, norm=norm).network(InputSpec(shape), 10)
    assert network(torch.randn(2, *shape)).shape == (2, 10)


def test_a_block_without_branch_passes_on_its_input_subsampled_and_zero_filled():
    block = Block(4, 8, stride=2, norm="batch").eval()
    nn.init.zeros_(block.branch[-1].weight)  # pyright: ignore[reportArgumentType]
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()


def test_outputs_by_torch_functions_and_a_flat_list_of_weights():
    torch.manual_seed(0)
    network = ResNet20(width=4, norm="batch").network(InputSpec((3, 16, 16)), 10).double().train()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    weights = iter([value.detach() for value in network.parameters()])

    def conv_norm(h: torch.Tensor, stride: int) -> torch.Tensor:
        h = F.conv2d(h, next(weights), stride=stride, padding=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        return (h - mean) / (var + 1e-5).sqrt() * next(weights)[:, None, None] + next(weights)[:, None, None]

    h = conv_norm(x, 1).relu()
    for channels, stride in [(4, 1), (4, 1), (4, 1), (8, 2), (8, 1), (8, 1), (16, 2), (16, 1), (16, 1)]:
        branch = conv_norm(conv_norm(h, stride).relu(), 1)
        shortcut = torch.zeros_like(branch)
        shortcut[:, : h.shape[1]] = h[:, :, ::stride, ::stride]
        assert branch.shape[1] == channels
        h = (branch + shortcut).relu()
    expected = h.mean((2, 3)) @ next(weights).T + next(weights)
    torch.testing.assert_close(network(x).detach(), expected)
    assert next(weights, None) is None


def test_weights_start_with_variance_two_over_fan_in():
    torch.manual_seed(0)
    network = ResNet20(width=16, norm="batch").network(InputSpec((3, 32, 32)), 10)
    last = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)][-1].weight
    # 36,864 draws: the variance estimate has a relative standard error of 0.0074.
    assert last.var().item() == pytest.approx(2 / (64 * 9), rel=0.037)


def test_without_batch_norm_an_example_alone_has_the_output_it_has_in_a_batch():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    for norm in ("group", "filter_response"):
        network = ResNet20(width=4, norm=norm).network(InputSpec((1, 28, 28)), 10).double()
        torch.testing.assert_close(network(x)[1:2], network(x[1:2]))

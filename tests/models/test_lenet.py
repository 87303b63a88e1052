"""LeNet-5: its published size, and which images it takes."""

import pytest
import torch
from torch import nn

from bdl_train.errors import UsageError
from bdl_train.models._dropout import Dropout
from bdl_train.models.lenet import LeNet
from bdl_train.specs import InputSpec

torch.set_num_threads(1)

LENET = LeNet(activation="relu", dropout=0.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # 6(25·1+1) + 16(25·6+1) + 120(400+1) + 84(120+1) + 10(84+1) = 156 + 2416 + 48120 + 10164 + 850
        ((1, 28, 28), 61_706),
        ((1, 32, 32), 61_706),
        # the first layer sees three channels: 6·25·2 more weights
        ((3, 32, 32), 62_006),
    ],
)
def test_parameter_count(shape, expected):
    network = LENET.network(InputSpec(shape), 10)
    assert sum(value.numel() for value in network.parameters()) == expected
    assert network(torch.zeros(2, *shape)).shape == (2, 10)


def test_a_28_pixel_image_is_a_32_pixel_image_with_a_margin_of_zeros():
    torch.manual_seed(0)
    small = LENET.network(InputSpec((1, 28, 28)), 10)
    large = LENET.network(InputSpec((1, 32, 32)), 10)
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(small(x), large(nn.functional.pad(x, (2, 2, 2, 2))))


def test_dropout_follows_both_hidden_linear_layers():
    network = LeNet(activation="tanh", dropout=0.5).network(InputSpec((1, 28, 28)), 10)
    kinds = [type(layer).__name__ for layer in network.modules()][1:]
    assert kinds[-7:] == ["Linear", "Tanh", "Dropout", "Linear", "Tanh", "Dropout", "Linear"]
    assert not any(
        isinstance(layer, Dropout) for layer in LENET.network(InputSpec((1, 28, 28)), 10).modules()
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 32), (3, 64, 64)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(
        UsageError, match=rf"28×28 or 32×32, the data has \[{shape[0]}, {shape[1]}, {shape[2]}\]"
    ):
        LENET.check(InputSpec(shape))


def test_tables_are_refused():
    with pytest.raises(UsageError, match=r"model=lenet takes image examples.*table examples of shape \[13\]"):
        LENET.check(InputSpec((13,)))
    LENET.check(InputSpec((1, 28, 28)))

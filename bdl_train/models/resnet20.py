"""ResNet-20, the small residual network for CIFAR."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bdl_train.models import Architecture
from bdl_train.models._conv import GlobalMean, conv
from bdl_train.models._norm import Norm, make_activation, make_norm
from bdl_train.specs import InputSpec

BLOCKS_PER_STAGE = 3  # n of 6n + 2 = 20 layers


@dataclass(frozen=True, kw_only=True)
class ResNet20(Architecture):
    """One 3×3 convolution, three stages of three residual blocks, global mean, one linear layer.

    Stages have `width`, 2 `width` and 4 `width` channels; the second and third halve height and width.

    Source:
        He et al. (2016), arXiv:1512.03385, Section 4.2, shortcuts of option A (no parameters).

    Attributes:
        width: Channels of the first stage, 16 in the paper.
        norm: Normalisation in front of each activation.
    """

    width: Annotated[int, Field(ge=1)]
    norm: Norm

    takes: ClassVar[str] = "image"

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        layers: list[nn.Module] = [
            conv(inputs.shape[0], self.width, 3),
            make_norm(self.norm, self.width),
            make_activation(self.norm, self.width),
        ]
        channels = self.width
        for stage in range(3):
            for block in range(BLOCKS_PER_STAGE):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(channels, channels * stride, stride, self.norm))
                channels *= stride
        return nn.Sequential(*layers, GlobalMean(), nn.Linear(channels, num_outputs))


class Block(nn.Module):
    """activation(branch(x) + shortcut(x)); the shortcut subsamples x and fills new channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(in_channels, out_channels, 3, stride),
            make_norm(norm, out_channels),
            make_activation(norm, out_channels),
            conv(out_channels, out_channels, 3),
            make_norm(norm, out_channels),
        )
        self.activation = make_activation(norm, out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(self.branch(x) + shortcut)

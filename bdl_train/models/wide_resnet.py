"""Wide residual networks."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from bdl_train.models import Architecture
from bdl_train.models._conv import GlobalMean, conv
from bdl_train.models._dropout import make_dropout
from bdl_train.models._norm import Norm, make_activation, make_norm
from bdl_train.specs import InputSpec

FIRST_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class WideResNet(Architecture):
    """WRN-depth-widen_factor: pre-activation residual blocks, `widen_factor` times as wide as a ResNet's.

    One 3×3 convolution, three stages of (depth − 4) / 6 blocks with 16k, 32k and 64k channels, norm and
    activation, global mean, one linear layer. The second and third stage halve height and width.

    Source:
        Zagoruyko & Komodakis (2016), arXiv:1605.07146, Table 1 and Figure 1(c, d).

    Attributes:
        depth: Convolutional layers, 6n + 4 with n ≥ 1 blocks a stage.
        widen_factor: k.
        norm: Normalisation in front of each activation.
        dropout: Rate between the two convolutions of a block; 0 = none.
    """

    depth: Annotated[int, Field(ge=10)]
    widen_factor: Annotated[int, Field(ge=1)]
    norm: Norm
    dropout: Annotated[float, Field(ge=0, lt=1)]

    takes: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        if (self.depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 34, 40, ...), got {self.depth}.")

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        layers: list[nn.Module] = [conv(inputs.shape[0], FIRST_CHANNELS, 3)]
        channels = FIRST_CHANNELS
        for stage in range(3):
            width = FIRST_CHANNELS * self.widen_factor * 2**stage
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(channels, width, stride, self.norm, self.dropout))
                channels = width
        return nn.Sequential(
            *layers,
            make_norm(self.norm, channels),
            make_activation(self.norm, channels),
            GlobalMean(),
            nn.Linear(channels, num_outputs),
        )


class Block(nn.Module):
    """shortcut + conv(dropout(a₂(conv(a₁(x))))) with aᵢ a norm and its activation.

    The shortcut is x itself, or a 1×1 convolution of a₁(x) where channels or stride change.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Sequential(make_norm(norm, in_channels), make_activation(norm, in_channels))
        self.branch = nn.Sequential(
            conv(in_channels, out_channels, 3, stride),
            make_norm(norm, out_channels),
            make_activation(norm, out_channels),
            make_dropout(dropout),
            conv(out_channels, out_channels, 3),
        )
        same = in_channels == out_channels and stride == 1
        self.project = None if same else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        return self.branch(entered) + (x if self.project is None else self.project(entered))

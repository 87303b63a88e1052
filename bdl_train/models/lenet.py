"""LeNet-5 for small images."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from bdl_train.errors import UsageError
from bdl_train.models import Architecture
from bdl_train.models._activation import ACTIVATIONS, Activation
from bdl_train.models._dropout import make_dropout
from bdl_train.specs import InputSpec


@dataclass(frozen=True, kw_only=True)
class LeNet(Architecture):
    """Two 5×5 convolutions with max pooling, then three linear layers (6, 16, 120 and 84 wide).

    Source:
        LeCun et al. (1998), Section II.B. As is usual today, pooling takes the maximum, every map of the
        second convolution sees all of the first, and the last layer is linear. 28×28 images are padded to
        32×32 by the first convolution.

    Attributes:
        activation: After each layer but the last.
        dropout: Rate after each hidden linear layer; 0 = none.
    """

    activation: Activation
    dropout: Annotated[float, Field(ge=0, lt=1)]

    takes: ClassVar[str] = "image"

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        channels, side, _ = inputs.shape
        activation = ACTIVATIONS[self.activation]
        return nn.Sequential(
            nn.Conv2d(channels, 6, kernel_size=5, padding=(32 - side) // 2),
            activation(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            activation(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            activation(),
            make_dropout(self.dropout),
            nn.Linear(120, 84),
            activation(),
            make_dropout(self.dropout),
            nn.Linear(84, num_outputs),
        )

    def check(self, inputs: InputSpec) -> None:
        super().check(inputs)
        if inputs.shape[1:] not in ((28, 28), (32, 32)):
            raise UsageError(
                f"model=lenet takes images of 28×28 or 32×32, the data has {list(inputs.shape)} "
                "(channels, height, width). Choose model=resnet20 or model=wide_resnet."
            )

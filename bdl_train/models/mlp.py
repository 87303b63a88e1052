"""Multilayer perceptron for tables."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from bdl_train.models import Architecture
from bdl_train.models._activation import ACTIVATIONS, Activation
from bdl_train.models._dropout import Dropout
from bdl_train.specs import InputSpec


@dataclass(frozen=True, kw_only=True)
class Mlp(Architecture):
    """Linear layers with an activation and optional dropout after each hidden one; images are flattened.

    Attributes:
        hidden: Widths of the hidden layers; empty for a linear model.
        activation: Of the hidden layers.
        dropout: Rate after each hidden activation; 0 = none.
    """

    hidden: list[Annotated[int, Field(ge=1)]]
    activation: Activation
    dropout: Annotated[float, Field(ge=0, lt=1)]

    takes: ClassVar[str] = "any"

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()] if len(inputs.shape) > 1 else []
        width = math.prod(inputs.shape)
        for size in self.hidden:
            layers += [nn.Linear(width, size), ACTIVATIONS[self.activation]()]
            if self.dropout > 0:
                layers.append(Dropout(self.dropout))
            width = size
        return nn.Sequential(*layers, nn.Linear(width, num_outputs))

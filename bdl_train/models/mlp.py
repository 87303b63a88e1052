"""Multilayer perceptron for tables."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from bdl_train.models import Architecture
from bdl_train.models._dropout import Dropout
from bdl_train.specs import InputSpec

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


@dataclass(frozen=True, kw_only=True)
class Mlp(Architecture):
    """Linear layers with an activation and optional dropout after each hidden one.

    Attributes:
        hidden: Widths of the hidden layers; empty for a linear model.
        activation: Of the hidden layers.
        dropout: Rate after each hidden activation; 0 = none.
    """

    hidden: list[Annotated[int, Field(ge=1)]]
    activation: Literal["relu", "tanh", "gelu", "silu"]
    dropout: Annotated[float, Field(ge=0, lt=1)]

    takes: ClassVar[str] = "any"

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()] if len(inputs.shape) > 1 else []
        width = 1
        for size in inputs.shape:
            width *= size
        for size in self.hidden:
            layers += [nn.Linear(width, size), ACTIVATIONS[self.activation]()]
            if self.dropout > 0:
                layers.append(Dropout(self.dropout))
            width = size
        return nn.Sequential(*layers, nn.Linear(width, num_outputs))

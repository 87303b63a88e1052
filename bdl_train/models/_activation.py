"""The activations that networks offer by name."""

from typing import Literal

from torch import nn

Activation = Literal["relu", "tanh", "gelu", "silu"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}

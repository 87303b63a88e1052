"""Architectures. One module and one YAML a choice; any other `nn.Module` by its `_target_`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from bdl_train.build import build, resolve
from bdl_train.errors import UsageError
from bdl_train.specs import InputSpec


class Architecture(ABC):
    """A network's settings; `network` builds one freshly initialised member.

    Random initial values come from torch's global generator, which the caller has seeded for this member.
    """

    takes: ClassVar[str]  # "table", "image" or "any"

    @abstractmethod
    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        """A network from `[B, *inputs.shape]` to `[B, num_outputs]`."""

    def check(self, inputs: InputSpec) -> None:
        """Refuse data of the wrong form.

        Raises:
            UsageError: names both forms.
        """
        form = "image" if inputs.is_image else "table"
        if self.takes not in (form, "any"):
            raise UsageError(
                f"model={type(self).__module__.rsplit('.', 1)[-1]} takes {self.takes} examples, "
                f"the data has {form} examples of shape {list(inputs.shape)}. "
                "Choose another `model` or `data`."
            )


@dataclass(frozen=True)
class ModuleArchitecture(Architecture):
    """Any `nn.Module`, constructed from its config node anew for every member.

    Attributes:
        node: The module's `_target_` and its arguments; nested nodes may have `_target_`s.
    """

    node: Mapping[str, Any]

    takes: ClassVar[str] = "any"

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        """As the base says, checked on one batch of two zero examples.

        Raises:
            UsageError: the module refuses such a batch, or gives outputs of another shape.
        """
        network = build(self.node, nn.Module, key="model")
        target = self.node["_target_"]
        zeros = torch.zeros(2, *inputs.shape)
        network.eval()
        try:
            with torch.no_grad():
                outputs = network(zeros)
        except Exception as error:  # foreign code: whatever it raises is its answer to this input
            raise UsageError(
                f"model._target_={target} cannot take a float32 batch of shape {list(zeros.shape)}: {error}"
            ) from error
        received = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        if received != [2, num_outputs]:
            raise UsageError(
                f"model._target_={target} must turn a batch of shape {list(zeros.shape)} into outputs "
                f"of shape [2, {num_outputs}], because the likelihood asks for {num_outputs} outputs an "
                f"example; it gave {received}. Change the model's last layer or choose another `likelihood`."
            )
        return network.train()


def architecture_from(node: Mapping[str, Any]) -> Architecture:
    """The architecture that a resolved `model` node describes: a shipped one, or any `nn.Module`.

    Args:
        node: A plain mapping with `_target_` and settings.

    Raises:
        UsageError: no `_target_`, one outside the allow-list or of another kind, or a bad setting.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UsageError(f"model must be a mapping with a '_target_', got {node!r}.")
    target = resolve(node["_target_"], (Architecture, nn.Module), key="model")
    return (
        build(node, Architecture, key="model")
        if issubclass(target, Architecture)
        else ModuleArchitecture(node)
    )

"""Architectures. One module and one YAML a choice."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from bdl_train.errors import UsageError
from bdl_train.specs import InputSpec


class Architecture(ABC):
    """A network's settings; `network` builds one freshly initialised member.

    Random initial values come from torch's global generator, which the caller has seeded for this member.
    """

    takes: ClassVar[str]  # "table" or "image"

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
                f"model={type(self).__module__.rsplit('.', 1)[-1]} takes a {self.takes} per example, "
                f"the data has a {form} of shape {list(inputs.shape)}. Choose another `model` or `data`."
            )

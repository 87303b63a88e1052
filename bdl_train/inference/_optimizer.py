"""torch optimisers over a stack: proven elementwise by trial, and masked per member."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bdl_train.build import resolve
from bdl_train.errors import UsageError

MakeOptimizer = Callable[[list[Tensor]], Optimizer]


def optimizer_from(node: Mapping[str, Any]) -> MakeOptimizer:
    """The optimiser of a config node, if it treats every element on its own.

    Members share one flat tensor, so an optimiser that mixes elements (a trust ratio, a factored moment, a line
    search, an orthogonalised update) would mix members. It is tried on a small stack and refused with the reason.

    Raises:
        UsageError: not an optimiser, settings it refuses, or not elementwise.
    """
    cls = resolve(node.get("_target_", ""), Optimizer, key="optimizer")
    given = {name: value for name, value in node.items() if name != "_target_"}
    settings = dict(given)
    accepted = inspect.signature(cls).parameters
    unknown = [name for name in settings if name not in accepted]
    if unknown:
        raise UsageError(f"Unknown key 'optimizer.{unknown[0]}': {cls.__name__} has {', '.join(accepted)}.")
    for name, value in settings.items():
        if _is_number(accepted[name].default) and not (_is_number(value) and math.isfinite(value)):
            raise UsageError(f"optimizer.{name} must be a finite number, got {value!r}.")
    if "fused" in accepted and "foreach" not in settings:
        settings.setdefault("fused", True)

    def make(tensors: list[Tensor]) -> Optimizer:
        return cls(tensors, **settings)

    try:
        make([torch.zeros(1, 1)])
    except (ValueError, TypeError) as error:
        raise UsageError(f"optimizer: {cls.__name__} refused its settings {given}: {error}") from error
    reason = _why_not_elementwise(make)
    if reason:
        raise UsageError(
            f"optimizer={cls.__name__} cannot train a stack of members: {reason}. "
            "Use sgd, adam, adamw, rmsprop or another elementwise optimiser of torch.optim."
        )
    return make


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _why_not_elementwise(make: MakeOptimizer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    grads = torch.randn(4, 3, 6, dtype=torch.float64, generator=generator)

    def run(rows: slice) -> Tensor:
        param = start[rows].clone()
        optimizer = make([param])
        for grad in grads:
            param.grad = grad[rows].clone()
            optimizer.step()
        return param

    try:
        together = run(slice(0, 3))
        alone = torch.cat([run(slice(m, m + 1)) for m in range(3)])
    except Exception as error:  # an optimiser may fail in any way: closures, sparse gradients, shapes
        return str(error).strip().splitlines()[0].rstrip(".")
    if not torch.allclose(together, alone, rtol=1e-12, atol=1e-14):
        return "its update of one member depends on the other members"
    return None


class FlatOptimizer:
    """One elementwise optimiser over the flat parameters `[M, P]` of a stack.

    Members that are not active keep their parameters and their optimiser state: a zero gradient would not freeze
    Adam, whose moments go on moving the weights.
    """

    def __init__(self, make: MakeOptimizer, flat: Tensor) -> None:
        self.flat = flat
        self.optimizer = make([flat])
        self._lr = float(self.optimizer.param_groups[0]["lr"])

    def step(self, grad: Tensor, lr_factor: float, active: Tensor | None) -> None:
        """Move the parameters in place.

        Args:
            grad: `[M, P]`.
            lr_factor: On the configured learning rate.
            active: `[M]` bool, or None when every member is.
        """
        self.optimizer.param_groups[0]["lr"] = self._lr * lr_factor
        self.flat.grad = grad
        if active is None:
            self.optimizer.step()
        else:
            before = [tensor.clone() for tensor in self._per_member()]
            self.optimizer.step()
            # State that this step created was zero before it.
            now = self._per_member()
            before += [torch.zeros_like(tensor) for tensor in now[len(before) :]]
            keep = active[:, None]
            for new, old in zip(now, before, strict=True):
                new.copy_(torch.where(keep, new, old))
        self.flat.grad = None

    def _per_member(self) -> list[Tensor]:
        state = self.optimizer.state.get(self.flat, {})
        return [self.flat, *(v for v in state.values() if torch.is_tensor(v) and v.shape == self.flat.shape)]

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(stored)
        # torch casts scalars such as NAdam's product of momenta to the parameters' dtype; they go on as they were.
        state = self.optimizer.state[self.flat]
        for name, value in stored["state"].get(0, {}).items():
            if torch.is_tensor(value):
                state[name] = state[name].to(value.dtype)

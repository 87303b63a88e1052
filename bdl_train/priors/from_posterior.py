"""Yesterday's posterior as today's prior: a diagonal Gaussian by moments of an earlier run.

Shape letters: M members of the earlier run, P parameters of one member.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.priors import BoundGaussian, Prior
from bdl_train.specs import PREFIX
from bdl_train.stack import Layout

MOMENTS_FILE = "moments.safetensors"


@dataclass(frozen=True, kw_only=True)
class FromPosterior(Prior):
    """θ ~ N(mean, var / tempering), floored at `min_std`, with moments of an earlier run's posterior.

    A Gaussian to the power τ is, up to its normaliser, a Gaussian of variance var / τ: τ below 1 trusts
    yesterday less. Members start at a draw from this prior.

    Attributes:
        run: The earlier run's directory.
        moments: `per_member`: member i has the moments of the earlier member i mod M. `pooled`: all members
            have the moments of the mixture over the earlier members.
        tempering: The power τ.
        min_std: A floor under the standard deviation, applied last.
    """

    run: str
    moments: Literal["per_member", "pooled"]
    tempering: Annotated[FiniteFloat, Field(gt=0, le=1)]
    min_std: Annotated[FiniteFloat, Field(gt=0)]

    starts_members: ClassVar[bool] = True

    def bind(self, layout: Layout, members: Sequence[int]) -> BoundGaussian:
        """Means and standard deviations are `[len(members), P]` for `per_member`, `[P]` for `pooled`.

        Raises:
            UsageError: the run is missing, unreadable or changed since it was written; its network differs
                from this one; its posterior has no spread to take.
        """
        mean_MP, var_MP = read_moments(Path(self.run), layout)
        if self.moments == "per_member":
            pinned = (var_MP == 0).all(-1).nonzero().flatten().tolist()
            if pinned:
                raise UsageError(
                    f"prior.moments=per_member, but in prior.run={self.run} the posterior of members {pinned}"
                    " is one point without spread. Use prior.moments=pooled: the spread between members."
                )
            rows = torch.tensor(members) % len(mean_MP)
            mean, var = mean_MP[rows], var_MP[rows]
        else:
            # Law of total variance. Population variance: the members are the whole mixture.
            mean, var = mean_MP.mean(0), var_MP.mean(0) + mean_MP.var(0, correction=0)
            if (var == 0).all():
                raise UsageError(
                    f"prior.moments=pooled, but the posterior in prior.run={self.run} is one single point "
                    f"({len(mean_MP)} member(s)), without spread. Name a run of more members."
                )
        std = (var / self.tempering).sqrt().clamp_min(self.min_std)
        return BoundGaussian(mean.float(), std.float())


def read_moments(run: Path, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and variance of every member's weights, `[M, P]` in float64, without the likelihood's parameters.

    Args:
        run: A run directory with `posterior/posterior.json` and `posterior/moments.safetensors`.
        layout: Of today's network; the stored one must be equal.

    Raises:
        UsageError: a missing, unreadable or changed file, another layout, numbers that are no moments.
    """
    folder = run / "posterior"
    stored, sha256 = _read_header(run, folder / "posterior.json")
    try:
        content = (folder / MOMENTS_FILE).read_bytes()
    except OSError as error:
        raise UsageError(
            f"prior.run={run}: cannot read posterior/{MOMENTS_FILE}: {error.strerror}."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UsageError(
            f"prior.run={run}: posterior/{MOMENTS_FILE} was changed after it was written "
            f"(sha256 {found[:12]}…, expected {sha256[:12]}…). Restore the run or train it again."
        )
    weights = [name for name in stored.names if not name.startswith(PREFIX)]
    _check_layout(run, stored.select(weights), layout)
    columns = stored.columns(weights)
    try:
        tensors = load(content)
        mean, var = (tensors[name].double() for name in ("mean", "var"))
    except (SafetensorError, KeyError) as error:
        raise UsageError(
            f"prior.run={run}: posterior/{MOMENTS_FILE} holds no mean and var: {error}."
        ) from error
    if (
        mean.ndim != 2
        or len(mean) == 0
        or mean.shape != (len(mean), stored.num_params)
        or var.shape != mean.shape
    ):
        raise UsageError(
            f"prior.run={run}: posterior/{MOMENTS_FILE} must hold mean and var of shape "
            f"[M, {stored.num_params}], got {list(mean.shape)} and {list(var.shape)}."
        )
    mean, var = mean[:, columns], var[:, columns]
    if not (mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()):
        raise UsageError(f"prior.run={run}: its moments are not finite, or a variance is negative.")
    return mean, var


def _read_header(run: Path, path: Path) -> tuple[Layout, str]:
    """The stored layout, and the hash that the moments must have."""
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shapes = tuple(tuple(int(size) for size in shape) for shape in header["layout"]["shapes"])
        stored = Layout(tuple(header["layout"]["names"]), shapes)
        if len(stored.names) != len(shapes):
            raise ValueError(f"{len(stored.names)} names for {len(shapes)} shapes")
        return stored, str(header["files"][MOMENTS_FILE]["sha256"])
    except OSError as error:
        raise UsageError(
            f"prior.run={run} is not a run with a posterior: cannot read {path}: {error.strerror}."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"prior.run={run}: posterior/posterior.json is unreadable: {type(error).__name__}: {error}."
        ) from error


def _check_layout(run: Path, stored: Layout, today: Layout) -> None:
    pairs = zip_longest(
        zip(stored.names, stored.shapes, strict=True), zip(today.names, today.shapes, strict=True)
    )
    for then, now in pairs:
        if then != now:
            raise UsageError(
                f"prior.run={run} was trained with another network. The first parameter that differs: "
                f"there {_described(then)}, today {_described(now)}. Use the same model and data columns."
            )


def _described(parameter: tuple[str, tuple[int, ...]] | None) -> str:
    return f"'{parameter[0]}' {list(parameter[1])}" if parameter else "none"

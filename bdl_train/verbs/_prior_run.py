"""Whether yesterday's posterior can be today's prior: weights mean something only for the same inputs and target."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdl_train.data import Data
from bdl_train.errors import UsageError
from bdl_train.runs import read_json

log = logging.getLogger(__name__)

SHIFT = 0.1
"""Change of a standardisation, in its own standard deviations, from which it is worth a warning."""


def check_prior_run(config: Mapping[str, Any], data: Data) -> None:
    """Hold the run behind `prior.run` against today's model and data.

    Args:
        config: Of today's run; without `prior.run` there is nothing to check.
        data: Today's.

    Raises:
        UsageError: another architecture, other input columns or another target.
    """
    run = config["prior"].get("run")
    if run is None:
        return
    header = Path(run) / "posterior" / "posterior.json"
    if not header.is_file():
        return  # the prior itself says what is wrong with its run
    stored = read_json(header)
    try:
        then = {
            "model": stored["architecture"],
            "the input columns": [
                stored["inputs"]["names"],
                stored["inputs"]["groups"],
                stored["inputs"]["shape"],
            ],
            "the target": [stored["target"]["name"], stored["target"]["kind"], stored["target"]["classes"]],
        }
        target, transform = stored["target"], stored["transform"]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"prior.run={run}: posterior.json is damaged: {type(error).__name__} {error}."
        ) from error
    inputs = data.inputs.to_json()
    today = {
        "model": dict(config["model"]),
        "the input columns": [list(inputs["names"]), list(inputs["groups"]), list(inputs["shape"])],
        "the target": [data.target.name, str(data.target.kind), list(data.target.classes)],
    }
    for what, now in today.items():
        if then[what] != now:
            raise UsageError(
                f"prior.run={run} was trained with another choice of {what}: {then[what]} there, {now} today. "
                "Its weights mean nothing here: use the same, or another prior."
            )
    changed = [] if transform is None else _moved(transform, data)
    if _shifted(target["loc"], target["scale"], data.target.loc, data.target.scale):
        changed.append(f"the target '{data.target.name}'")
    if changed:
        log.warning(
            "prior.run=%s standardised %s differently: its weights live in those units, so the prior is off by as much",
            run, ", ".join(changed[:5]),
        )  # fmt: skip


def _moved(stored: list[dict[str, Any]], data: Data) -> list[str]:
    assert data.transform is not None
    pairs = zip(stored, data.transform.to_json(), strict=True)
    return [
        f"column '{now['name']}'"
        for then, now in pairs
        if "mean" in then and "mean" in now and _shifted(then["mean"], then["std"], now["mean"], now["std"])
    ]


def _shifted(loc: float, scale: float, other_loc: float, other_scale: float) -> bool:
    if scale == 0 or other_scale == 0:
        return scale != other_scale
    return abs(other_loc - loc) > SHIFT * scale or abs(other_scale / scale - 1) > SHIFT

"""Which settings a trial gets: of a grid, at random, or by what earlier trials gave (TPE, by Optuna).

A suggestion is a function of (seed, number of the trial, record), so that a sweep which is taken up again asks for the
same trials as if it had never stopped.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from bdl_train.errors import UsageError
from bdl_train.overrides import Axis
from bdl_train.sweeps.record import Trial

Sampler = Literal["grid", "random", "tpe"]

MOST_REDRAWS = 10_000
"""Of settings that were tried already."""


def check_axes(axes: Sequence[Axis], sampler: Sampler, num_trials: int | None) -> None:
    """Refuse what the sampler cannot do.

    Raises:
        UsageError: nothing to sweep, an interval in a grid, a search without an end, Optuna missing.
    """
    if not axes:
        raise UsageError(
            "Nothing to sweep: give a key several values, optimizer.lr=0.1,0.01, or for a search "
            "'optimizer.lr=tag(log,interval(1e-4,1e-1))'."
        )
    if sampler == "grid":
        for axis in axes:
            if not axis.words:
                raise UsageError(
                    f"'{axis.word}' is an interval, and sampler=grid tries listed values: {axis.key}=1,2,3. "
                    "sampler=random and sampler=tpe take intervals."
                )
    elif num_trials is None:
        raise UsageError(f"sampler={sampler} needs to know how many trials to try: num_trials=20.")
    if sampler == "tpe":
        _optuna()


def grid_size(axes: Sequence[Axis]) -> int:
    """Combinations of all values."""
    return math.prod(len(axis.words) for axis in axes)


def suggest(
    axes: Sequence[Axis],
    sampler: Sampler,
    seed: int,
    number: int,
    record: Mapping[int, Trial],
    *,
    maximize: bool,
) -> list[str]:
    """One override for each axis.

    Args:
        axes: What is swept.
        sampler: How.
        seed: Of the sweep.
        number: Of the trial, from 0; in a grid the last axis is the fastest.
        record: The other trials by number; `tpe` learns from them, and no search asks for the settings of one again
            as long as others are left.
        maximize: Whether a larger objective is better.
    """
    if sampler == "grid":
        places = np.unravel_index(number, [len(axis.words) for axis in axes])
        return [axis.words[place] for axis, place in zip(axes, places, strict=True)]
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    tried = {trial.words for other, trial in record.items() if other != number}
    if sampler == "tpe":
        words = _suggest_tpe(axes, seed, number, record, maximize=maximize)
    else:
        words = [_drawn(axis, generator.random()) for axis in axes]
    for _ in range(MOST_REDRAWS):
        if tuple(words) not in tried:
            break
        words = [_drawn(axis, generator.random()) for axis in axes]
    return words


def space_size(axes: Sequence[Axis]) -> int | None:
    """Different settings, or None where an interval of numbers has them without end."""
    if any(not axis.words and isinstance(axis.low, float) for axis in axes):
        return None
    return math.prod(len(axis.words) or int(axis.high) - int(axis.low) + 1 for axis in axes)


def probes(axes: Sequence[Axis]) -> list[list[str]]:
    """Settings in which every listed value stands once, the other axes at their first: for a check before any work."""
    first = [axis.first for axis in axes]
    rest = [[*first[:i], word, *first[i + 1 :]] for i, axis in enumerate(axes) for word in axis.words[1:]]
    return [first, *rest]


def _drawn(axis: Axis, share: float) -> str:
    """The override at a share from 0 to 1 of an axis."""
    if axis.words:
        return axis.words[int(share * len(axis.words))]
    is_int = isinstance(axis.low, int)
    # The ends of an interval of integers are as likely as what lies between them.
    low, high = (axis.low - 0.5, axis.high + 0.5) if is_int else (axis.low, axis.high)
    value = low * (high / low) ** share if axis.log else low + share * (high - low)
    value = min(max(value, axis.low), axis.high)
    return f"{axis.key}={round(value) if is_int else float(value)!r}"


# --- Optuna -----------------------------------------------------------------------------------------------------


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "sampler=tpe needs Optuna, which is not installed: pip install 'bdl_train[sweep]', or sampler=random."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest_tpe(
    axes: Sequence[Axis], seed: int, number: int, record: Mapping[int, Trial], *, maximize: bool
) -> list[str]:
    """Optuna's suggestion in a study in memory, made anew from the record: no database to share or to lock."""
    optuna = _optuna()
    sequence = np.random.SeedSequence(seed, spawn_key=(number,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options that Optuna calls experimental
        # Trials that still run count as bad ones, so that others do not gather where they are (constant liar).
        sampler = optuna.samplers.TPESampler(
            seed=int(sequence.generate_state(1)[0]), multivariate=True, constant_liar=True
        )
        study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=sampler)
        spaces = {axis.key: _space(optuna, axis) for axis in axes}
        for _, trial in sorted(record.items()):
            if trial.number != number:
                study.add_trial(_told(optuna, trial, axes, spaces))
        asked = study.ask(spaces)
    return [_word(axis, asked.params[axis.key]) for axis in axes]


def _space(optuna: Any, axis: Axis) -> Any:
    if axis.ordered:
        return optuna.distributions.IntDistribution(0, len(axis.words) - 1)
    if axis.words:
        return optuna.distributions.CategoricalDistribution(axis.words)
    if isinstance(axis.low, int):
        return optuna.distributions.IntDistribution(axis.low, axis.high, log=axis.log)
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _word(axis: Axis, value: Any) -> str:
    if axis.ordered:
        return axis.words[value]
    return value if axis.words else f"{axis.key}={value!r}"


def _told(optuna: Any, trial: Trial, axes: Sequence[Axis], spaces: Mapping[str, Any]) -> Any:
    state = optuna.trial.TrialState
    values: dict[str, Any] = {}
    for axis, word in zip(axes, trial.words, strict=True):
        text = word.partition("=")[2]
        number = int if isinstance(axis.low, int) else float
        values[axis.key] = axis.words.index(word) if axis.ordered else word if axis.words else number(text)
    words: dict[str, Any] = {"params": values, "distributions": dict(spaces)}
    if trial.objective is not None:
        return optuna.trial.create_trial(state=state.COMPLETE, value=trial.objective, **words)
    if trial.is_open:
        return optuna.trial.create_trial(state=state.RUNNING, **words)
    # Also a trial that failed: without a value it counts as worse than every other.
    return optuna.trial.create_trial(state=state.PRUNED, intermediate_values=dict(trial.curve), **words)

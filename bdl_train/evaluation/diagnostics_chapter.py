"""The chapter `diagnostics`: whether the chains of a sampler have mixed, and how alike members are.

Shape letters: M members, K draws of each, V values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.data import Part
from bdl_train.evaluation.chain_values import ChainValues, chain_values, no_chains
from bdl_train.evaluation.likeness import pairs_of, told_of_pairs
from bdl_train.evaluation.members import MemberScores
from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.mixing import MIXED, Mixing, mixing_metrics, over_known
from bdl_train.evaluation.section import Level, Section
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive.predict import Predictor

KEY, TITLE = "diagnostics", "Chains and diversity"
CYCLE = "cycle"
"""A trace of this name numbers the cycles in which a chain starts anew."""
MOST_NAMED = 5


@dataclass(frozen=True)
class Diagnosis:
    """What is known of the chains and of pairs of members.

    Attributes:
        metrics: Of the whole posterior, without intervals.
        section: The chapter.
        has_chains: Whether the members are chains.
    """

    metrics: list[Metric]
    section: Section
    has_chains: bool


def diagnose(artefact: Artefact, predictor: Predictor, part: Part, scores: MemberScores) -> Diagnosis:
    """Diagnose chains by what they predict for some rows, and pairs of members by their scores.

    Args:
        artefact: What was trained.
        predictor: Of it.
        part: The scored rows.
        scores: Of the members on them.
    """
    pairs, alike = pairs_of(scores, artefact.target.name)
    reason = no_chains(artefact)
    if reason is not None:
        verdict = " ".join([f"There is no R-hat: {reason}.", *told_of_pairs(alike)])
        level: Level = "note" if alike else "empty"
        return Diagnosis(alike, Section(KEY, TITLE, verdict, level, {"pairs": pairs} if alike else {}), False)
    found, ids = chain_values(artefact, predictor, part), artefact.posterior.ids
    predictions = Mixing.of(found.values)
    energy = Mixing.of(found.traces["potential"][None]) if "potential" in found.traces else None
    tables = {
        "chains": _chains(found, predictions, energy, ids),
        "values": _values(found, predictions),
        "traces": _traces(found, ids),
    } | ({"pairs": pairs} if alike else {})
    words, level = _verdict(found, predictions, energy, ids, artefact.meta.get("method", {}))
    section = Section(KEY, TITLE, " ".join([*words, *told_of_pairs(alike)]), level, tables, _remarks(found))
    return Diagnosis([*mixing_metrics(predictions, energy), *alike], section, True)


# --- chains -------------------------------------------------------------------------------------------------------


def _verdict(
    found: ChainValues, of: Mixing, energy: Mixing | None, ids: Sequence[int], method: Mapping[str, Any]
) -> tuple[list[str], Level]:
    """Sentences, the first of which says whether the chains have mixed."""
    few = ", which are few" if of.limit > MIXED else ""
    told = (
        f"R-hat within members is {_short(over_known(np.nanmedian, of.rhat))} in the median, "
        f"{_short(over_known(np.nanmax, of.by_member))} for the worst member (up to {_short(of.limit)} counts as mixed "
        f"with {of.num_draws} draws{few})"
    )
    late = of.unmixed | (energy.unmixed if energy is not None else False)
    worth = _worth(of, bool(late.any()))
    if not late.any():
        return [f"The chains have mixed: {told}.", *worth], "good"
    if CYCLE in found.traces:
        why = "they start anew in cycles to visit several modes, and between modes R-hat is large on purpose"
        return [f"The chains do not mix, and need not: {told}; {why}.", *worth], "note"
    whose = "The chains" if late.all() else f"{late.sum()} of {len(late)} chains ({_members(ids, late)})"
    words = [f"{whose} have not mixed: {told}."]
    if of.is_still.any():
        words.append(f"Some never move ({_members(ids, of.is_still)}).")
    elif energy is not None and not of.unmixed.any():
        words.append(
            f"The potential still drifts: its R-hat is {_short(over_known(np.nanmax, energy.rhat))}."
        )
    return [*words, advice(method), *worth], "warn"


def _worth(of: Mixing, is_late: bool) -> list[str]:
    """How many independent draws there are, and whether members predict alike."""
    size, across = over_known(np.nanmedian, of.bulk), over_known(np.nanmedian, of.rhat_across)
    words = []
    if math.isfinite(size):
        words.append(f"The {of.num_draws} draws of a member are worth {size:.3g} independent ones.")
    if of.num_members > 1:
        if is_late:
            meaning = "it says little as long as single chains have not mixed"
        elif across <= of.limit:
            meaning = "they predict alike"
        else:
            meaning = (
                "they stand in different modes, as members of an ensemble of networks do, which is no failure"
            )
        words.append(f"R-hat across members is {_short(across)}: {meaning}.")
    return words


def _members(ids: Sequence[int], mask: np.ndarray) -> str:
    """Their numbers, the first few."""
    named = ", ".join(str(ids[m]) for m in np.flatnonzero(mask)[:MOST_NAMED])
    more = f" and {mask.sum() - MOST_NAMED} more" if mask.sum() > MOST_NAMED else ""
    return f"member {named}" if mask.sum() == 1 else f"members {named}{more}"


def advice(method: Mapping[str, Any]) -> str:
    """What to do for chains that have not mixed, by the settings that their method has.

    Args:
        method: The settings, as `conf/inference` names them.
    """

    def named(*parts: str) -> str:
        return ", ".join(f"inference.{key}" for key in method if any(part in key for part in parts))

    start, apart = named("burn_in", "warmup"), named("thin")
    step = "" if "warmup" in start else named("lr", "step_size")  # a warm-up tunes the steps by itself
    ways = [f"discard more of their start ({start})"] if start else []
    ways += [f"put more steps between draws ({apart})"] if apart else []
    if not ways:
        ways = ["let the chains run longer"]
    epochs = ", for which trainer.max_epochs must grow" if "epoch" in start else ""
    larger = f"; larger steps ({step}) mix faster, as long as the test scores hold" if step else ""
    return f"What helps: {' and '.join(ways)}{epochs}{larger}."


def _remarks(found: ChainValues) -> tuple[str, ...]:
    is_finite = np.isfinite(found.values).all((1, 2))
    is_same = (found.values == found.values[:, :1, :1]).all((1, 2))
    count = len(found.names)
    broken = f"{count - is_finite.sum()} of {count} values are not finite in some draw and left out."
    same = f"{is_same.sum()} of {count} values are the same in every draw and left out."
    return tuple(
        text for text, is_there in ((broken, not is_finite.all()), (same, is_same.any())) if is_there
    )


def _chains(found: ChainValues, of: Mixing, energy: Mixing | None, ids: Sequence[int]) -> pd.DataFrame:
    """One row a member; of the traces their mean over the kept draws."""
    columns: dict[str, Any] = {
        "member": list(ids),
        "rhat_median": of.by_member,
        "rhat_max": over_known(np.nanmax, of.rhat, axis=0),
        "ess_bulk_median": over_known(np.nanmedian, of.bulk, axis=0),
        "ess_bulk_min": over_known(np.nanmin, of.bulk, axis=0),
        "ess_tail_median": over_known(np.nanmedian, of.tail, axis=0),
        "ess_tail_min": over_known(np.nanmin, of.tail, axis=0),
    }
    if energy is not None:
        columns |= {"potential_rhat": energy.rhat[0], "potential_ess_bulk": energy.bulk[0]}
    return pd.DataFrame(columns | {f"mean_{name}": trace.mean(1) for name, trace in found.traces.items()})


def _values(found: ChainValues, of: Mixing) -> pd.DataFrame:
    """One row a value; `row` is empty for a parameter of the likelihood."""
    return pd.DataFrame(
        {
            "row": pd.array([None if row < 0 else int(row) for row in found.rows], dtype="Int64"),
            "value": found.names,
            "rhat_within_median": over_known(np.nanmedian, of.rhat, axis=1),
            "rhat_within_max": over_known(np.nanmax, of.rhat, axis=1),
            "rhat_across": of.rhat_across,
            "ess_bulk_min": over_known(np.nanmin, of.bulk, axis=1),
            "ess_bulk_total": of.bulk_total,
        }
    )


def _traces(found: ChainValues, ids: Sequence[int]) -> pd.DataFrame:
    """One row a member and draw."""
    num_members, num_draws = found.values.shape[1:]
    columns = {
        "member": np.repeat(np.asarray(ids), num_draws),
        "draw": np.tile(np.arange(num_draws), num_members),
    }
    return pd.DataFrame(columns | {name: trace.ravel() for name, trace in found.traces.items()})


def _short(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "unknown" if math.isnan(value) else "infinite"

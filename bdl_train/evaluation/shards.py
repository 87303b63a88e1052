"""Scoring in shards of rows and members, by whatever carries out a list of tasks; merged in any order.

The tasks are carried out by a `map`: one after another here, or by the processes of a cluster that the caller knows.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdl_train.build import allowing
from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.members import MOST_NLL, MemberScores, score_members
from bdl_train.evaluation.rows import RowScores, score_rows
from bdl_train.posteriors.artefact import Artefact, read_artefact
from bdl_train.predictive.predict import Predictor, TilePrediction
from bdl_train.specs import TargetSpec

Scores = tuple[RowScores, MemberScores]
ROWS_FOR_THREADS = 20_000
"""Rows from which the threads of a process share them."""


@dataclass(frozen=True)
class Shard:
    """One task: some rows, and the members whose components are computed; None = all."""

    rows: slice
    members: tuple[int, ...] | None


@dataclass(frozen=True)
class Posterior:
    """Where a task finds the posterior, and how it predicts with it.

    Attributes:
        folder: Of the artefact.
        device: Where to compute.
        num_draws: Draws a member; None = the method's own number.
        threads: Of one task; None = as they are.
        allow: Packages whose classes the artefact may name.
    """

    folder: Path
    device: str
    num_draws: int | None
    threads: int | None = None
    allow: tuple[str, ...] = ()


Map = Callable[[Callable[..., Any], tuple[Any, ...], Sequence[Shard]], Iterable[Any]]
"""Calls `function(*shared, task)` for every task; yields the results in any order."""


def one_after_another(
    function: Callable[..., Any], shared: tuple[Any, ...], tasks: Sequence[Shard]
) -> Iterable[Any]:
    """The map of a single process."""
    return (function(*shared, task) for task in tasks)


def plan_shards(num_rows: int, ids: Sequence[int], row_shards: int, member_shards: int) -> list[Shard]:
    """Contiguous shares of rows times shares of members, whose sizes differ by at most one.

    Raises:
        UsageError: more shards than members.
    """
    if member_shards > len(ids):
        raise UsageError(
            f"member_shards={member_shards}, but the posterior has {len(ids)} members: set it to that at most."
        )
    row_shards = min(row_shards, num_rows)
    edges = [num_rows * i // row_shards for i in range(row_shards + 1)]
    shares: list[tuple[int, ...] | None] = [None]
    if member_shards > 1:
        cuts = [len(ids) * i // member_shards for i in range(member_shards + 1)]
        shares = [tuple(sorted(ids)[cuts[i] : cuts[i + 1]]) for i in range(member_shards)]
    return [Shard(slice(edges[i], edges[i + 1]), share) for i in range(row_shards) for share in shares]


def score_part(
    predictor: Predictor,
    part: Part,
    target: TargetSpec,
    *,
    keep_nll: bool = True,
    tick: Callable[[int], None] | None = None,
) -> Scores:
    """Scores of all rows of a part, and of every member on them, in this process.

    Args:
        predictor: Of the run.
        part: Encoded rows with targets.
        target: Brings scores to its units.
        keep_nll: Whether to keep the NLL of every member and row.
        tick: Called with the number of rows that are done.
    """
    threads = torch.get_num_threads() if predictor.device.type == "cpu" else 1
    if threads == 1 or len(part) < ROWS_FOR_THREADS:
        return _joined(_score_rows(predictor, part, target, keep_nll, tick or (lambda done: None)))
    # A share of rows a thread: the many small operations of a tile gain little from threads of their own.
    edges = [len(part) * i // threads for i in range(threads + 1)]
    shares = [Part(part.x[i:j], part.y[i:j], part.rows[i:j]) for i, j in itertools.pairwise(edges)]
    done = [0] * threads

    def work(place: int) -> list[Scores]:
        def tell(rows: int) -> None:
            done[place] = rows
            if tick is not None:
                tick(sum(done))

        return _score_rows(predictor.another(), shares[place], target, keep_nll, tell)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(work, range(threads)))
    finally:
        torch.set_num_threads(threads)
    return _joined([one for share in found for one in share])


def _joined(scores: Sequence[Scores]) -> Scores:
    """Scores of neighbouring rows as one; once, since each joining copies all rows."""
    return RowScores.concatenate([rows for rows, _ in scores]), MemberScores.concatenate(
        [m for _, m in scores]
    )


def _score_rows(
    predictor: Predictor, part: Part, target: TargetSpec, keep_nll: bool, tick: Callable[[int], None]
) -> list[Scores]:
    x, y = torch.from_numpy(part.x), torch.from_numpy(part.y)
    scored = []
    for tile in predictor(x, y, per_component=True):
        scored.append(_score(tile, part.y[tile.rows], target, keep_nll))
        tick(tile.rows.stop)
    return scored


def _score(tile: TilePrediction, y: np.ndarray, target: TargetSpec, keep_nll: bool) -> Scores:
    return score_rows(tile, y, target), score_members(tile, y, target, keep_nll=keep_nll)


def score_shard(part: Part, posterior: Posterior, shard: Shard) -> tuple[slice, Scores | TilePrediction]:
    """Carry out one task, in any process that sees the artefact.

    Returns:
        The rows, and their scores; or, of some of the members only, what they predict.
    """
    if posterior.threads is not None:
        torch.set_num_threads(posterior.threads)
    with allowing(posterior.allow):
        artefact = read_artefact(posterior.folder)
    rows = Part(part.x[shard.rows], part.y[shard.rows], part.rows[shard.rows])
    if shard.members is None:
        keep = len(part) * artefact.posterior.num_members <= MOST_NLL
        predictor = Predictor(artefact, device=posterior.device, num_draws=posterior.num_draws)
        return shard.rows, score_part(predictor, rows, artefact.target, keep_nll=keep)
    some = replace(artefact, posterior=artefact.posterior.only(*shard.members))
    predictor = Predictor(some, device=posterior.device, num_draws=posterior.num_draws)
    # A copy: a table from shared memory cannot be written to, which torch would warn of.
    x, y = torch.from_numpy(rows.x.copy()), torch.from_numpy(rows.y.copy())
    return shard.rows, TilePrediction.of_rows(list(predictor(x, y, per_component=True)))


def score_in_shards(
    part: Part,
    artefact: Artefact,
    posterior: Posterior,
    shards: Sequence[Shard],
    run: Map,
    tick: Callable[[int], None] | None = None,
) -> Scores:
    """All rows, scored by tasks that may end in any order.

    Args:
        part: All rows.
        artefact: As the tasks read it.
        posterior: Where they find it.
        shards: From `plan_shards`.
        run: Carries out the tasks.
        tick: Called with the number of rows that are done.
    """
    found: dict[int, list[tuple[slice, Scores | TilePrediction]]] = {}
    expected = {shard.rows.start: sum(one.rows == shard.rows for one in shards) for shard in shards}
    scores: dict[int, Scores] = {}
    keep = len(part) * artefact.posterior.num_members <= MOST_NLL
    for rows, result in run(score_shard, (part, posterior), shards):
        waiting = found.setdefault(rows.start, [])
        waiting.append((rows, result))
        if len(waiting) < expected[rows.start]:
            continue
        results = [one for _, one in found.pop(rows.start)]
        tiles = [one for one in results if isinstance(one, TilePrediction)]
        if tiles:
            scores[rows.start] = _score(TilePrediction.joined(tiles), part.y[rows], artefact.target, keep)
        else:
            (scores[rows.start],) = (one for one in results if not isinstance(one, TilePrediction))
        if tick is not None:
            tick(sum(len(done) for done, _ in scores.values()))
    return _joined([scores[start] for start in sorted(scores)])

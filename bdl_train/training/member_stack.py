"""The LightningModule of one stack: hands batches to the method, and aggregates what the members predict.

Shape letters: M members, N training examples of one member, B batch, K steps of one call.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bdl_train.data._augment import augment
from bdl_train.inference import Method, State
from bdl_train.likelihoods import PREFIX
from bdl_train.potential import Batch
from bdl_train.predictive.stats import PredictiveStats, stats_of
from bdl_train.specs import InputSpec
from bdl_train.training.early_stopping import EarlyStopping
from bdl_train.training.feed import PhaseFeed
from bdl_train.training.problem import DevicePart
from bdl_train.training.ranks import ALONE, Ranks

log = logging.getLogger(__name__)


class RowTiles:
    """The rows of a part as slices of at most `size`."""

    def __init__(self, num_rows: int, size: int) -> None:
        self._slices = [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[slice]:
        return iter(self._slices)


class MemberStack(pl.LightningModule):
    """Trains the members of one stack side by side, under manual optimisation.

    Steps are counted in the method's state: `trainer.global_step` means nothing here.

    Attributes:
        state: The method's state.
        member_rows: Positions in the train part of each member's own examples, `[M, N]`; None = all see all of it.
        timeline: The phases of the method.
        traces: What the last step reported beside it, `[M]` each.
        nll_sum, num_logged: Training NLL `[M]` summed over the steps of the current epoch, and their number.
        val_nll: Mean validation NLL of each member `[M]` after the last epoch, nats; None before the first.
        val_ensemble_nll: The same of the mixture of the stack's members that did not diverge.
        val_disagreement: Mean epistemic part of that mixture: mutual information in nats, or variance of the means in
            units of the standardised target.
    """

    def __init__(
        self,
        method: Method[Any],
        state: State,
        feed: PhaseFeed,
        inputs: InputSpec,
        train: DevicePart,
        val: DevicePart,
        *,
        tile_rows: int,
        early_stopping: EarlyStopping | None,
        augment: bool = False,
        ranks: Ranks = ALONE,
        member_rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.method, self.state, self.feed, self.inputs = method, state, feed, inputs
        self.timeline = feed.timeline
        self.traces: Mapping[str, Tensor] = {}
        self._all_rows: Batch | None = None
        self.train_part, self.val_part, self.member_rows = train, val, member_rows
        self.early_stopping = early_stopping
        self.augment = augment
        self.ranks = ranks
        self.tile_rows = tile_rows
        self.nll_sum = torch.zeros(state.stack.num_members, dtype=torch.float64, device=train.y.device)
        self.num_logged = 0
        self.val_nll: Tensor | None = None
        self.val_ensemble_nll: float | None = None
        self.val_disagreement: float | None = None
        self._uses_torch_dropout = any(
            isinstance(one, nn.modules.dropout._DropoutNd)
            for one in state.potential.network.template.modules()
        )
        if self._uses_torch_dropout:
            log.warning(
                "torch.nn dropout: its masks depend on the stack, so a member alone differs from one in a stack"
            )
        self._val_sums: list[tuple[Tensor, PredictiveStats | None]] = []

    @property
    def epoch(self) -> int:
        """Epochs finished, by the method's own count, over all its phases."""
        return self.timeline.epoch(self.state)

    @property
    def at_epoch_end(self) -> bool:
        return self.timeline.at_epoch_end(self.state)

    def configure_optimizers(self) -> None:
        """The method owns its optimiser; Lightning's clipping and accumulation would mix members."""

    def settle(self) -> bool:
        """Go on to the next phase where the present one is over.

        Returns:
            Whether there is anything left to train.
        """
        state, timeline = self.state, self.timeline
        while timeline.is_over(state):
            if timeline.phase(state).early_stopping and self.early_stopping is not None:
                self.early_stopping.restore(state)
            if timeline.is_last(state) or bool(state.failed.all()):
                return False
            state.phase, state.step, state.active = state.phase + 1, 0, ~state.failed
            self.method.enter(state)
            self._all_rows = None
        return True

    def train_dataloader(self) -> PhaseFeed:
        return self.feed

    def val_dataloader(self) -> RowTiles:
        return RowTiles(len(self.val_part.y), self.tile_rows)

    def on_train_epoch_start(self) -> None:
        self.nll_sum.zero_()
        self.num_logged = 0

    def training_step(self, steps: Tensor | int, batch_idx: int) -> None:
        """Take K steps, on batches `[K, M, B]` or on all rows; one by one, Lightning's work would be half of the time.

        Args:
            steps: One call of the feed.
            batch_idx: Lightning's.
        """
        with torch.random.fork_rng(enabled=self._uses_torch_dropout):
            if isinstance(steps, int):
                for _ in range(steps):
                    self._step(self._whole())
            else:
                for index_MB in steps.to(self.train_part.y.device):
                    self._step(self._batch(index_MB))

    def _step(self, batch: Batch) -> None:
        if self._uses_torch_dropout:
            # torch's own dropout draws from the global generator: its masks follow (stack, step) alone.
            seed = self.feed.shuffled.seeds[0] + self.timeline.step(self.state)
            torch.manual_seed(seed & ((1 << 63) - 1))
        log = self.method.step(self.state, batch)
        self.nll_sum += log.nll
        self.num_logged += 1
        self.traces = log.traces

    def _batch(self, index_MB: Tensor) -> Batch:
        part = self.train_part
        rows_MB = index_MB if self.member_rows is None else self.member_rows.gather(1, index_MB)
        x = part.x[rows_MB]
        if self.augment:
            x = augment(x, self.feed.shuffled.generators(self.timeline.shuffled_step(self.state)))
        if self.ranks.world > 1:
            mine = self.ranks.share(index_MB.shape[1])
            x, index_MB, rows_MB = x[:, mine], index_MB[:, mine], rows_MB[:, mine]
        return Batch(self.inputs.prepare(x, self.state.stack.flat.dtype), part.y[rows_MB], index_MB)

    def _whole(self) -> Batch:
        """All rows, the same tensors at each step; where all members have the same rows, once for all of them."""
        if self._all_rows is None:
            part, rows = self.train_part, self.member_rows
            index = torch.arange(self.feed.shuffled.num_data, device=part.y.device)
            if rows is None:
                mine = self.ranks.share(len(index))
                x = self.inputs.prepare(part.x[mine], self.state.stack.flat.dtype)
                self._all_rows = Batch(x, part.y[mine], index[mine], shared=True)
            else:
                self._all_rows = self._batch(index.expand(len(rows), -1))
        return self._all_rows

    def on_train_epoch_end(self) -> None:
        if not self.settle():
            self.trainer.should_stop = True

    def validation_step(self, rows: slice, batch_idx: int) -> None:
        stack, potential = self.state.stack, self.state.potential
        x = self.inputs.prepare(self.val_part.x[rows], stack.flat.dtype)
        y = self.val_part.y[rows]
        params = stack.params
        outputs, _ = potential.network(params, stack.buffers, x, train=False, shared=True)
        log_prob_MB = potential.likelihood.log_prob(outputs, y.expand(outputs.shape[:-1]), params)
        # Members that diverged are no components of the mixture.
        valid = ~self.state.failed
        mixture = None
        if bool(valid.any()):
            of_valid = {name: params[name][valid] for name in params if name.startswith(PREFIX)}
            components = potential.likelihood.distribution(outputs[valid], of_valid)
            log_weights = torch.full_like(outputs[valid, 0, 0], -math.log(int(valid.sum())))
            mixture = stats_of(components, log_weights, y)
        self._val_sums.append((log_prob_MB.double().sum(1), mixture))

    def on_validation_epoch_end(self) -> None:
        num_val = len(self.val_part.y)
        # Every rank has scored all rows; one decides, since another device may round otherwise.
        summed = reduce(Tensor.add, [log_prob for log_prob, _ in self._val_sums])
        self.val_nll = self.ranks.of_first(-summed / num_val)
        mixtures = [stats.nll.sum() for _, stats in self._val_sums if stats is not None]
        self.val_ensemble_nll = float(sum(mixtures)) / num_val if mixtures else None
        epistemic = [stats.epistemic.sum() for _, stats in self._val_sums if stats is not None]
        self.val_disagreement = float(sum(epistemic)) / num_val if epistemic else None
        self._val_sums = []
        # A stop in the middle of an epoch also validates; it must not count, or a resumed run would differ.
        stops = self.timeline.phase(self.state).early_stopping
        if self.early_stopping is not None and stops and self.at_epoch_end:
            self.early_stopping.update(self.state, self.val_nll, self.epoch)

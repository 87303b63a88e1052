"""MC dropout: the masks that regularise training, drawn again for predictions (Gal & Ghahramani, 2016)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from bdl_train.inference import Method, Problem, StepLog
from bdl_train.inference._descent import DescentState, descend
from bdl_train.models._dropout import dropout_names
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.dropout_masks import DropoutMasks
from bdl_train.potential import Batch


@dataclass(frozen=True, kw_only=True)
class McDropout(Method[DescentState]):
    """Each member minimises the expectation of its potential over dropout masks; a draw is its weights under one mask.

    With a Gaussian prior of standard deviation s as penalty, this is the variational bound of the paper for a prior of
    s / √(1 − rate) on the weights behind a dropout layer, whose units are scaled by 1 / (1 − rate) when kept. The
    spread of the draws is a matter of the rate and of the weights alone: it does not shrink as N grows.
    Validation curves and early stopping look at the network without masks.

    Source:
        Gal & Ghahramani (2016), arXiv:1506.02142, Section 3 for the objective and Section 4 for the predictive.

    Attributes:
        patience: Epochs without a better validation NLL after which a member stops and takes back its best
            weights; null = train to `trainer.max_epochs` and keep the last.
        num_draws: Masks a member contributes to the predictive.
    """

    patience: Annotated[int, Field(ge=1)] | None
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]

    needs_dropout: ClassVar[bool] = True

    @property
    def early_stopping(self) -> int | None:
        return self.patience

    def init(self, problem: Problem) -> DescentState:
        return DescentState(problem)

    def step(self, state: DescentState, batch: Batch) -> StepLog:
        problem = state.problem
        return descend(state, batch, problem.schedule.factor(state.step, problem.num_steps))

    def posterior(self, state: DescentState) -> list[MemberPosterior]:
        return DropoutMasks.of_stack(state.stack, list(dropout_names(state.potential.network.template)))

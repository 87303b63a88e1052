"""Deep ensembles: independent MAP estimates from different starts (Lakshminarayanan et al., 2017)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bdl_train.inference import Method, Problem, StepLog
from bdl_train.inference._descent import DescentState, descend
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.atoms import Atoms
from bdl_train.potential import Batch


@dataclass(frozen=True, kw_only=True)
class DeepEnsemble(Method[DescentState]):
    """Each member minimises its potential; the posterior is one atom a member, equally weighted.

    Source:
        Lakshminarayanan et al. (2017), arXiv:1612.01474, Algorithm 1, without adversarial training; with the
        prior as penalty instead of none.

    Attributes:
        patience: Epochs without a better validation NLL after which a member stops and takes back its best
            weights; null = train to `trainer.max_epochs` and keep the last.
    """

    patience: Annotated[int, Field(ge=1)] | None

    num_draws = 1

    @property
    def early_stopping(self) -> int | None:
        return self.patience

    def init(self, problem: Problem) -> DescentState:
        return DescentState(problem)

    def step(self, state: DescentState, batch: Batch) -> StepLog:
        problem = state.problem
        return descend(state, batch, problem.schedule.factor(state.step, problem.num_steps))

    def posterior(self, state: DescentState) -> list[MemberPosterior]:
        return Atoms.of_stack(state.stack)

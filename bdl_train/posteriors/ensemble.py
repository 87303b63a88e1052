"""The posterior of an ensemble: an equally weighted mixture over its members."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bdl_train.errors import UsageError
from bdl_train.posteriors import Draws, MemberPosterior, stack_draws
from bdl_train.seeds import Stream, member_seed


@dataclass(frozen=True)
class EnsemblePosterior:
    """Members that finished, each with weight 1/M: an ensemble of M−1 is still a valid mixture.

    Attributes:
        ids: Ensemble indices of the members.
        members: Their posteriors, in the same order.
        num_draws: Draws a member contributes by default.
        seed: Of the draws (stream `DRAWS` of the run).
    """

    ids: Sequence[int]
    members: Sequence[MemberPosterior]
    num_draws: int
    seed: int

    @property
    def num_members(self) -> int:
        return len(self.members)

    def num_components(self, num_draws: int | None = None) -> int:
        """Components of the predictive mixture, C.

        Raises:
            UsageError: `num_draws` below 1, or above the atoms of a member.
        """
        return sum(self._count(member, num_draws) for member in self.members)

    def draw(self, num_draws: int | None = None, *, chunk_size: int) -> Iterator[Draws]:
        """Yield all weighted draws of one pass, member after member, in chunks of at most `chunk_size`.

        The same call gives the same draws, whatever the chunk size. Atoms are enumerated.

        Args:
            num_draws: Draws a member; None = the method's own number.
            chunk_size: Most draws in memory at a time.

        Raises:
            UsageError: as `num_components`.
        """
        drawn, log_weights, owners, centres = [], [], [], []
        for index, member in zip(self.ids, self.members, strict=True):
            count = self._count(member, num_draws)
            for one in member.draw(count, member_seed(self.seed, index, Stream.DRAWS)):
                drawn.append(one)
                log_weights.append(-math.log(self.num_members * count))
                owners.append(index)
                centres.append(member.centre)
                if len(drawn) == chunk_size:
                    yield stack_draws(drawn, log_weights, owners, centres)
                    drawn, log_weights, owners, centres = [], [], [], []
        if drawn:
            yield stack_draws(drawn, log_weights, owners, centres)

    def _count(self, member: MemberPosterior, num_draws: int | None) -> int:
        if num_draws is None:
            return self.num_draws if member.num_atoms is None else member.num_atoms
        if num_draws < 1:
            raise UsageError(f"num_draws must be 1 or more, got {num_draws}.")
        if member.num_atoms is not None and num_draws > member.num_atoms:
            raise UsageError(
                f"num_draws={num_draws} draws a member were asked for, this posterior holds {member.num_atoms} atoms "
                f"a member: lower num_draws to {member.num_atoms} at most. Atoms are enumerated, never resampled."
            )
        return num_draws

    def only(self, *indices: int) -> "EnsemblePosterior":
        """The posterior of one member, or of some, alone."""
        members = [self.members[list(self.ids).index(index)] for index in indices]
        return EnsemblePosterior(list(indices), members, self.num_draws, self.seed)

"""What the trainer of a slot writes: the step that it claims, the one it fills, how far it is."""

from __future__ import annotations

from dataclasses import dataclass

from snapshotd.errors import RequestError
from snapshotd.metadata import TrainerFacts, Unsealed, Version
from snapshotd.wire.protocol import ErrorCode


@dataclass(frozen=True, slots=True)
class Claim:
    """The trainer waits for a buffer, until then."""

    step: int
    image_bytes: int
    until_s: float


class Writing:
    """Of one trainer.

    Args:
        passed: every due step below it was sealed or given up.

    Attributes:
        claim: what it waits for.
        filling: granted to it, or being sealed.
        lends: it is to be lent memory, and there is none.
    """

    def __init__(self, passed: int = 0) -> None:
        self.claim: Claim | None = None
        self.filling: Version | None = None
        self._stands: tuple[Version, int] | None = None  # whose image others may read, its bytes
        self.lends = False
        self._passed = passed  # but for what is filled

    @property
    def passed(self) -> int:
        """Every due step below it was sealed or given up."""
        return self.filling.step if self.filling else self._passed

    def unsealed(self, trainer: TrainerFacts | None) -> Unsealed | None:
        """What others may read of the image that `trainer` fills."""
        if trainer is None or self._stands is None or self._stands[0] != self.filling:
            return None
        return Unsealed(trainer.job, trainer.shard, *self._stands)

    def begin_at(self, step: int) -> None:
        """It was restored, and goes on with `step`."""
        self._passed = step

    def want(self, claim: Claim) -> None:
        """It wants a buffer.

        Raises:
            RequestError: it waits for one, or the step is not newer than the last.
        """
        newest = max(self._passed, self.filling.step + 1 if self.filling else 0)
        if claim.step < newest:
            raise RequestError(
                ErrorCode.STEP_BACKWARDS,
                f"step {claim.step} comes after step {newest - 1}",
                "Give step() each step once, in growing order",
            )
        if self.claim is not None:
            raise RequestError(ErrorCode.OUT_OF_ORDER, f"step {self.claim.step} is still claimed")
        self.claim = claim
        self._passed = claim.step
        self.lends = False

    def grant(self, version: Version) -> None:
        """It has the buffer that it claimed."""
        self.claim = None
        self.filling = version

    def stands(self, version: Version, image_bytes: int) -> None:
        """Part of an image is written; nothing changes where it is not the one that is filled."""
        if self.filling == version:
            self._stands = version, image_bytes

    def give_up(self, step: int) -> None:
        """It goes on without a snapshot of `step`."""
        if self.claim is not None and self.claim.step == step:
            self.claim = None
        if self.filling is not None and self.filling.step == step:
            self.filling = None
        self._passed = max(self._passed, step + 1)

    def sealed(self, version: Version) -> None:
        """A generation is complete; nothing changes where it is of another trainer."""
        if self.filling == version:
            self.filling = None
            self._passed = max(self._passed, version.step + 1)

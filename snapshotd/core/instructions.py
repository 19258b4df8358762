"""What a slot machine tells its SMP to do; frozen, so that tests can compare them."""

from __future__ import annotations

from dataclasses import dataclass

from snapshotd.metadata import DataHolding, Decision, Group, ParityHolding, Version


@dataclass(frozen=True, slots=True)
class Stage:
    """Bring this slot's shard of the decided version into this slot's memory and verify it.

    Where other ranks saved the version, nothing is brought: try that this slot's part of their
    shards can be read. Which bytes are needed, the trainers say once they have the answer.
    """

    decision: Decision

    def to_try(self, shard: int) -> range:
        """The shards of others that the slot of `shard` tries."""
        return range(shard, self.decision.saved_world, self.decision.world)


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the trainer's restore()."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class Grant:
    """Give the trainer a buffer for a step, by a time after which it does not wait any more.

    Its group codes the image in `blocks`, each in another stripe.
    """

    job: str
    shard: int
    version: Version
    image_bytes: int
    blocks: int
    until_s: float


@dataclass(frozen=True, slots=True)
class Deny:
    """No snapshot of this step; training goes on."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Free:
    """These bytes are no longer needed by anyone."""

    holding: DataHolding | ParityHolding
    reason: str


@dataclass(frozen=True, slots=True)
class Encode:
    """Gather a stripe, compute parity rows, keep row 0 and hand on the others.

    The members' shards are sealed, or (`early`) some still written: then what stands is coded as it
    comes, and counts once all are sealed. `shard_bytes`: lengths of their images, in group order.
    """

    job: str
    epoch: int
    version: Version
    group: Group
    stripe: int
    rows: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    early: bool = False


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Bring this slot's shard of the restore point back: its bytes did not verify, and are gone."""

    job: str
    shard: int
    version: Version


Instruction = Stage | Answer | Grant | Deny | Free | Encode | Rebuild

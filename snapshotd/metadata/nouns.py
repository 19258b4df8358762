"""What snapshots, groups and decisions are: versions, places, holdings, decisions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """The training state after `step`, as made in `epoch`. Names bytes for ever, with the shard."""

    epoch: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} (epoch {self.epoch})"


@dataclass(frozen=True, slots=True, order=True)
class Home:
    """Where a shard lives: a node, and the local rank there."""

    node: str
    slot: int

    def __str__(self) -> str:
        return f"{self.node}/{self.slot}"


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One shard of a group, and its home."""

    shard: int
    home: Home


@dataclass(frozen=True)
class Group:
    """n members, ordered by shard, that keep each other's state with m parity blocks a stripe.

    `unkept` of these m rows, the last ones, are not stored now: memory is short.
    """

    members: tuple[Member, ...]
    parity: int
    unkept: int = 0

    @property
    def rows(self) -> int:
        """Parity blocks a stripe that are to be stored: nodes whose loss is survived."""
        return self.parity - self.unkept

    @property
    def size(self) -> int:
        """Number of members, n."""
        return len(self.members)

    @property
    def data(self) -> int:
        """Number of data blocks a stripe, k = n - m."""
        return self.size - self.parity

    @cached_property
    def shards(self) -> tuple[int, ...]:
        return tuple(m.shard for m in self.members)

    def position(self, shard: int) -> int:
        """Index of `shard` in the group; ValueError where it is no member."""
        return self.shards.index(shard)


@dataclass(frozen=True, slots=True, order=True)
class ParityPlace:
    """Which parity block: of which shards, which stripe, which row."""

    shards: tuple[int, ...]
    parity: int
    stripe: int
    row: int


@dataclass(frozen=True, slots=True)
class DataHolding:
    """A sealed, verified shard in some slot's memory; one of `world` (0: it is not told)."""

    job: str
    shard: int
    version: Version
    image_bytes: int
    content_digest: bytes
    world: int = 0


@dataclass(frozen=True, slots=True)
class Unsealed:
    """A shard that its trainer still writes; what stands of it may be read as it comes."""

    job: str
    shard: int
    version: Version
    image_bytes: int


@dataclass(frozen=True, slots=True)
class ParityHolding:
    """A stored, verified parity block in some slot's memory.

    `content_digests` and `shard_bytes` are those of the images of the group's shards it was
    computed from, in group order; `world` ranks saved them (0: it is not told).
    """

    job: str
    version: Version
    place: ParityPlace
    image_bytes: int
    content_digests: tuple[bytes, ...]
    shard_bytes: tuple[int, ...]
    world: int = 0


class Tier(Enum):
    """Where a restore came from, for the whole job; values as in the wire's enum."""

    NONE = 1
    LOCAL = 2
    GROUP = 3
    PERSISTENT = 4


class RefusalKind(Enum):
    """What would have to change for a refused restore; values as in the wire's enum."""

    LOST = 1
    CANNOT_PROTECT = 2
    OTHER_WORLD = 3


@dataclass(frozen=True, slots=True, order=True)
class DecisionId:
    """Decisions of a job are totally ordered: by epoch, then by the node that stated them."""

    epoch: int
    node: str


@dataclass(frozen=True)
class Decision:
    """The one answer to the restore() of every rank of an epoch.

    Exactly one of these holds: `restore` is a version; `refusal` says why nothing can be done, and
    `refusal_kind` which sort of why; neither: a fresh start. `incarnations[i]` is the trainer of
    shard i.

    Where another number of ranks saved what is restored, `saved_world` is that number (else 0),
    and `saved_groups` keep it until the ranks of this decision have a restore point of their own.
    """

    id: DecisionId
    job: str
    world: int
    groups: tuple[Group, ...]
    incarnations: tuple[str, ...]
    restore: Version | None = None
    refusal: str = ""
    tier: Tier = Tier.NONE
    committed: Version | None = None
    refusal_kind: RefusalKind | None = None
    saved_world: int = 0
    saved_groups: tuple[Group, ...] = ()

    def group_of(self, shard: int) -> Group | None:
        return next((g for g in self.groups if shard in g.shards), None)

    def home_of(self, shard: int) -> Home | None:
        group = self.group_of(shard)
        return group.members[group.position(shard)].home if group else None


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A whole step of a job in the persistent tier; `number` counts them, from 0."""

    version: Version
    world: int
    number: int = 0
    unix_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stored:
    """What the persistent tier holds of a job: whole steps, and versions that are not whole.

    `damaged` are steps that were whole, and why their index cannot be read.
    """

    steps: tuple[StoredStep, ...] = ()
    unfinished: tuple[Version, ...] = ()
    damaged: tuple[tuple[Version, str], ...] = ()

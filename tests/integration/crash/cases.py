"""Which point is struck where, when, and on what way: at least one case for each point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from snapshotd.wire.points import POINTS, Action

WORLD = 4
#: The nodes of the three ranks that take up what WORLD ranks saved; rank r reads at node r first.
REGROUPED = (1, 2, 3)

#: Kinds of clusters: without a persistent tier, the same over gRPC, and with one.
MEMORY, GRPC, TIER = "memory", "grpc", "tier"
_KINDS = {
    "regroup_grpc": GRPC, "written": TIER, "stored": TIER, "regroup_stored": TIER,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kill.

    Attributes:
        point: where.
        path: what is made to happen, so that the point is reached; see `paths`.
        victim: the node on which it is armed, and the rank that is armed.
        goes_on: the trainers that live go on, and must be protected again; else all are killed
            and started again, as torchrun does.
    """

    point: str
    path: str
    victim: int = 0
    occurrence: int = 1
    action: Action = Action.KILL
    goes_on: bool = False

    @property
    def role(self) -> str:
        return self.point.partition(".")[0]

    @property
    def kind(self) -> str:
        """Of the cluster that it is struck in."""
        return _KINDS.get(self.path, MEMORY)

    @property
    def alike(self) -> bool:
        """Whether all ranks train the same, so that any number of them can take it up."""
        return self.path in {"regroup", "regroup_grpc", "regroup_stored"}

    @property
    def early(self) -> bool:
        """Whether trainers say of each image, however small, that it stands before it is whole."""
        return self.path == "early"

    @property
    def name(self) -> str:
        """Unique among all cases, and fit to be a job's."""
        then = "-goes-on" if self.goes_on else ""
        return f"{self.path}-{self.point}-{self.occurrence}-{self.action}-n{self.victim}{then}"


#: Path, whether trainers go on, and the points (with an occurrence) that are struck on it.
_TRAINER: list[tuple[str, str]] = [
    (
        "first",
        "lock.taken find.sent find.answered attach.sent attach.answered restore.sent "
        "restore.answered restore.finished claim.granted buffer.mapped",
    ),
    (
        "step",
        "step.planned claim.sent claim.granted buffer.mapped piece.copied piece.copied:4 "
        "piece.copied:5 image.copied written.sent written.answered",
    ),
    (
        "restart",
        "lock.taken find.sent attach.sent attach.answered restore.sent restore.answered "
        "restore.mapped restore.checked restore.piece restore.piece:3 restore.compared "
        "restore.finished",
    ),
    ("early", "copied.sent image.copied written.sent"),
    ("replace", "restore.answered restore.mapped restore.piece:2"),
    ("away", "claim.skipped"),
    ("regroup", "manifests.answered fill.answered fill.answered:2"),
    ("stored", "restore.answered restore.piece:2"),
    ("regroup_stored", "manifests.answered fill.answered:2 restore.piece:2"),
    ("close", "detach.sent detach.answered lock.released"),
]

_SMP: list[tuple[str, str]] = [
    (
        "first",
        "start.begun attach.taken restore.heard answer.begun answer.sent claim.heard "
        "allocate.created allocate.filled allocate.named allocate.touched allocate.created:2 "
        "allocate.touched:3 begin.headed grant.begun orders.heard facts.sent",
    ),
    (
        "step",
        "claim.heard begin.headed grant.begun grant.sent written.heard seal.digested "
        "seal.recorded seal.headed seal.entered facts.sent orders.heard encode.begun "
        "encode.gathered encode.coded encode.forwarded encode.recorded parity.digested "
        "seal.recorded:2 seal.headed:2 encode.kept encode.acknowledged store.opened "
        "store.written store.sealed store.replaced store.finished read.begun read.sent "
        "free.forgotten free.headed free.forgotten:2 free.headed:3 trim.begun",
    ),
    (
        "early",
        "copied.heard read.begun read.sent encode.begun encode.gathered encode.coded "
        "encode.forwarded encode.recorded encode.kept store.opened store.written written.heard "
        "seal.digested seal.headed seal.entered",
    ),
    ("forget", "trainer.forgotten"),
    (
        "restart",
        "attach.taken restore.heard stage.begun stage.verified stage.done answer.begun "
        "answer.sent facts.sent orders.heard encode.begun encode.acknowledged store.replaced",
    ),
    (
        "adopt",
        "start.begun arena.owned arena.cleaned adopt.opened adopt.opened:3 adopt.verified "
        "adopt.verified:2 adopt.done start.bound facts.sent orders.heard",
    ),
    (
        "replace",
        "allocate.touched begin.headed decode.begun decode.chunk decode.block fetch.sealed "
        "fetch.entered stage.done answer.begun",
    ),
    ("survive", "read.begun read.sent answer.sent"),
    (
        "moved",
        "copy.begun copy.chunk fetch.sealed fetch.entered stage.done free.forgotten",
    ),
    ("damaged", "quarantine.begun quarantine.done decode.chunk fetch.entered"),
    ("rebuild", "rebuild.begun quarantine.begun decode.block rebuild.done"),
    ("away", "claim.denied"),
    ("close", "detach.heard"),
    ("stop", "stop.begun"),
    ("drop", "free.forgotten free.headed trim.begun trim.removed"),
    (
        "regroup",
        "manifests.gathered fill.begun fill.gathered fill.gathered:2 ranges.begun ranges.sent",
    ),
    ("regroup_grpc", "ranges.begun ranges.sent"),
    ("written", "persist.begun persist.written persist.published"),
    ("stored", "load.begun load.chunk load.sealed load.entered stage.done"),
    ("regroup_stored", "stored.known stored.taken stored.taken:10 fill.begun fill.gathered"),
]

_TIER: list[tuple[str, str]] = [
    (
        "written",
        "write.part write.closed write.verified write.recorded put.half publish.begun "
        "publish.indexed remove.unlisted remove.done",
    ),
    ("stored", "look.done read.known read.chunk"),
    ("regroup_stored", "ranges.piece ranges.piece:4"),
]

#: The errand and its SMP die at once.
_TIER_BOTH = [
    ("written", "write.part write.verified put.half publish.indexed remove.unlisted"),
    ("stored", "read.chunk"),
    ("regroup_stored", "ranges.piece:4"),
]

_SUPERVISOR: list[tuple[str, str]] = [
    (
        "first",
        "find.heard record.begun record.half record.done record.begun:2 record.half:2 "
        "record.done:2 record.begun:3 record.half:3 record.done:3 slot.heard peer.heard "
        "spread.ordered spread.told",
    ),
    ("step", "slot.heard peer.heard peer.told spread.ordered spread.told spread.told:3"),
    (
        "restart",
        "find.heard record.begun record.half record.done record.begun:2 record.half:2 "
        "record.done:2 record.begun:3 record.half:3 record.done:3 slot.heard spread.told",
    ),
    (
        "adopt",
        "start.owned records.loaded links.open port.open child.started front.open start.done "
        "link.accepted slot.heard peer.heard peer.told record.begun",
    ),
    ("replace", "link.accepted record.begun record.done"),
    ("survive", "record.half record.half:2 spread.ordered peer.heard"),
    ("orphan", "child.ended child.started link.accepted"),
    ("drop", "drop.heard record.begun record.half spread.told"),
    ("stop", "stop.begun stop.asked"),
    ("stored", "record.begun:2 record.done:2 slot.heard"),
    ("regroup_stored", "record.half:2 spread.told"),
]

#: The SMP and its supervisor die at once, and the trainers go on.
_BOTH = [
    (
        "step",
        "begin.headed written.heard seal.recorded seal.headed seal.entered encode.coded "
        "encode.kept encode.acknowledged store.sealed store.replaced free.forgotten free.headed",
    ),
    ("early", "copied.heard read.sent encode.coded seal.headed"),
    ("first", "allocate.filled"),
    ("restart", "stage.done answer.begun"),
    ("replace", "decode.block fetch.entered"),
    ("stored", "load.sealed"),
    ("regroup_stored", "stored.taken:10"),
]

#: The trainers that live go on, although the SMP died alone.
_GOES_ON = [
    (
        "step",
        "grant.sent seal.digested seal.headed encode.coded encode.acknowledged store.sealed "
        "free.headed",
    ),
    ("early", "copied.heard read.sent encode.coded"),
]

#: The way back is under way while the daemon dies: the trainers that wait must get their answer.
_WAITED_FOR = frozenset(
    {"first", "restart", "adopt", "replace", "survive", "moved", "damaged", "rebuild", "stop"}
    | {"orphan", "regroup", "regroup_grpc", "written", "stored", "regroup_stored"}
)


def _parsed(words: str) -> Iterator[tuple[str, int]]:
    for word in words.split():
        name, _, occurrence = word.partition(":")
        yield name, int(occurrence or "1")


def _cases() -> Iterator[Case]:
    tables = [
        ("trainer", _TRAINER, Action.KILL, frozenset[str]()),
        ("smp", _SMP, Action.KILL, _WAITED_FOR),
        ("supervisor", _SUPERVISOR, Action.KILL, _WAITED_FOR | {"step"}),
        ("smp", _BOTH, Action.BOTH, _WAITED_FOR | {"step", "early"}),
        ("smp", _GOES_ON, Action.KILL, frozenset({"step", "early"})),
        ("tier", _TIER, Action.KILL, _WAITED_FOR),
        ("tier", _TIER_BOTH, Action.BOTH, _WAITED_FOR),
    ]
    turn = count()
    for role, table, action, goes_on in tables:
        for path, words in table:
            for name, occurrence in _parsed(words):
                victim = _victim(role, path, name, next(turn) % WORLD)
                yield Case(f"{role}.{name}", path, victim, occurrence, action, path in goes_on)


def _victim(role: str, path: str, name: str, turn: int) -> int:
    """The node, or the rank, that can be struck there."""
    # The first node states decisions, and has a record of each of them.
    if name.startswith("record.") and path != "adopt":
        return 0
    # The home of shard 0 leads what is written to the tier, who states decisions looks there.
    if name.startswith(("publish.", "remove.", "persist.published", "look.")):
        return 0
    if path.startswith("regroup"):
        if role == "trainer" or (role == "smp" and name.startswith("ranges.")):
            return turn % len(REGROUPED)
        return REGROUPED[turn % len(REGROUPED)]
    return turn


CASES: tuple[Case, ...] = tuple(_cases())


def uncovered() -> set[str]:
    """Points that no case strikes."""
    return set(POINTS) - {case.point for case in CASES}

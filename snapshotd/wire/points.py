"""Named fault points: places where a test has a process die, at every boundary of the protocol.

Inert unless TEST_SNAPSHOTD_ARM names a file when the process starts. While that file exists its
line, "POINT [OCCURRENCE [ACTION]]", says where to strike; it is removed by the one that strikes,
so that a test sees that it did. Both sides use this, so it is part of the wire.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

ARM_VARIABLE: Final = "TEST_SNAPSHOTD_ARM"

#: Every point and what has just happened when it is passed; the role is what its name begins with.
POINTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "trainer.lock.taken": "it holds its slot's lock, nobody knows of it",
        "trainer.find.sent": "it has asked the front door for its SMP",
        "trainer.find.answered": "it knows where its SMP listens",
        "trainer.attach.sent": "it has asked to attach",
        "trainer.attach.answered": "it is attached",
        "trainer.restore.sent": "it has asked to restore",
        "trainer.restore.answered": "it knows what to restore, and has read none of it",
        "trainer.manifests.answered": "the manifests of all shards are there, none is read",
        "trainer.fill.answered": "the ranges it asked for are there, not yet mapped",
        "trainer.restore.mapped": "the image is mapped",
        "trainer.restore.checked": "the snapshot fits, nothing live is changed",
        "trainer.restore.piece": "one of its states is restored, or about to be",
        "trainer.restore.compared": "all is restored but the random generators",
        "trainer.restore.finished": "restore() is about to return",
        "trainer.step.planned": "the state is surveyed, no buffer is asked for",
        "trainer.claim.sent": "it has asked for a buffer",
        "trainer.claim.granted": "it has a buffer, not yet mapped",
        "trainer.claim.skipped": "it was denied a buffer",
        "trainer.buffer.mapped": "the buffer is mapped and empty",
        "trainer.piece.copied": "one piece of the state is in the buffer",
        "trainer.copied.sent": "it has said what of the buffer stands",
        "trainer.image.copied": "the whole state is in the buffer, nobody knows",
        "trainer.written.sent": "it has said that the buffer is written",
        "trainer.written.answered": "the SMP has taken the buffer over",
        "trainer.detach.sent": "it has said that it leaves",
        "trainer.detach.answered": "its SMP has let it go",
        "trainer.lock.released": "it has given up its lock, the connection stands",
        "smp.start.begun": "the process runs and owns nothing",
        "smp.arena.owned": "it owns the slot's directory",
        "smp.arena.cleaned": "what was half made is removed",
        "smp.adopt.opened": "one segment of a predecessor is mapped",
        "smp.adopt.verified": "one of them is verified, not yet in the books",
        "smp.adopt.done": "all are in the books, nobody is told",
        "smp.start.bound": "its sockets are bound",
        "smp.facts.sent": "its facts are on the way to the supervisor",
        "smp.orders.heard": "orders have come, nothing follows from them yet",
        "smp.attach.taken": "the trainer is attached, and not told",
        "smp.trainer.forgotten": "the trainer is gone, its open buffer not yet given back",
        "smp.claim.heard": "the claim is known to the machine",
        "smp.claim.denied": "no buffer is to be had, the trainer is not told",
        "smp.allocate.created": "an unfinished, empty file is there",
        "smp.allocate.filled": "its pages are there, it has its name not yet",
        "smp.allocate.named": "it is a free segment, not yet mapped",
        "smp.allocate.touched": "it is mapped and claimed",
        "smp.begin.headed": "a header says WRITING",
        "smp.grant.begun": "the buffer is begun, the trainer is not told",
        "smp.grant.sent": "the trainer is told",
        "smp.copied.heard": "part of the buffer may be read by peers, nobody is told",
        "smp.written.heard": "the buffer is the SMP's, the trainer is not told",
        "smp.seal.digested": "a shard's digests are computed, not yet written",
        "smp.parity.digested": "a parity block's digests are computed, not yet written",
        "smp.seal.recorded": "a record is written, the header says WRITING",
        "smp.seal.headed": "the header says SEALED, the books do not",
        "smp.seal.entered": "the shard is in the books, nobody is told",
        "smp.encode.begun": "a stripe is to be coded",
        "smp.encode.gathered": "a chunk of each of its blocks is here",
        "smp.encode.coded": "a chunk of each parity row is computed",
        "smp.encode.forwarded": "a chunk of a row is on its way to its holder",
        "smp.encode.recorded": "what the group sealed is known and agrees",
        "smp.encode.kept": "this slot's own row is sealed",
        "smp.encode.acknowledged": "all holders have their rows",
        "smp.store.opened": "a segment is begun for a block that is to come",
        "smp.store.written": "a chunk of it is here",
        "smp.store.sealed": "it is sealed, not yet compared with what the coder computed",
        "smp.store.replaced": "it is in the books, nobody is told",
        "smp.store.finished": "it is about to be acknowledged",
        "smp.read.begun": "a reader may have a segment, and has nothing of it",
        "smp.read.sent": "a reader has a chunk of it",
        "smp.ranges.begun": "a reader wants ranges of a segment, and has none",
        "smp.ranges.sent": "a reader has a chunk of them",
        "smp.free.forgotten": "a segment is out of the books, and still SEALED",
        "smp.free.headed": "its header says FREE",
        "smp.trim.begun": "free segments are to be removed",
        "smp.trim.removed": "one is removed",
        "smp.quarantine.begun": "damage is found, the file is still there",
        "smp.quarantine.done": "the file is removed, nobody is told",
        "smp.restore.heard": "the trainer waits for a restore",
        "smp.stage.begun": "the decision is adopted",
        "smp.stage.verified": "the slot's own shard is verified",
        "smp.stage.done": "the shard is here, nobody is told",
        "smp.copy.begun": "a buffer is begun for a shard of another slot",
        "smp.copy.chunk": "a chunk of it is here",
        "smp.decode.begun": "a buffer is begun for a lost shard",
        "smp.decode.chunk": "a chunk of it is decoded",
        "smp.decode.block": "a block of it is decoded",
        "smp.fetch.sealed": "a fetched shard is sealed, not yet compared with its record",
        "smp.fetch.entered": "it is in the books, nobody is told",
        "smp.load.begun": "a buffer is begun for a shard out of the persistent tier",
        "smp.load.chunk": "a chunk of it is here",
        "smp.load.sealed": "it is sealed, not yet compared with its record",
        "smp.load.entered": "it is in the books, nobody is told",
        "smp.stored.known": "records of shards in the persistent tier are known, no byte is here",
        "smp.stored.taken": "some grains of such a shard are where they are wanted",
        "smp.answer.begun": "the trainer is to be told of the restore",
        "smp.answer.sent": "it is told",
        "smp.manifests.gathered": "the manifests are in memory to lend, the trainer is not told",
        "smp.fill.begun": "memory is lent for ranges, and empty",
        "smp.fill.gathered": "all ranges are there, the trainer is not told",
        "smp.persist.begun": "its shard is to be written to the persistent tier",
        "smp.persist.written": "the shard is there, verified, nobody is told",
        "smp.persist.published": "a step is whole there, nobody is told",
        "smp.rebuild.begun": "a lost shard is to be rebuilt",
        "smp.rebuild.done": "it is rebuilt, nobody is told",
        "smp.detach.heard": "the trainer leaves, and is still in the books",
        "smp.stop.begun": "it was told to stop, or its supervisor is gone",
        "tier.look.done": "what is there is seen, the daemon is not told",
        "tier.write.part": "a chunk of a shard is written",
        "tier.write.closed": "the whole image is there, not yet read back",
        "tier.write.verified": "it was read back and is right, its record is not there",
        "tier.write.recorded": "its record is there, the daemon is not told",
        "tier.put.half": "a small object is written beside its place",
        "tier.publish.begun": "all records of a step are read, its index is not there",
        "tier.publish.indexed": "the step is whole, nothing older is deleted",
        "tier.remove.unlisted": "an older step has no index any more, its images are there",
        "tier.remove.done": "it is gone",
        "tier.read.known": "a record is on its way to the daemon, no byte of the image",
        "tier.read.chunk": "a chunk of an image is on its way",
        "tier.ranges.piece": "a piece of some ranges is on its way",
        "supervisor.start.owned": "the directories are its own",
        "supervisor.records.loaded": "the job records are read",
        "supervisor.links.open": "SMPs may link",
        "supervisor.port.open": "peers may ask, no SMP is started",
        "supervisor.child.started": "an SMP process is started",
        "supervisor.child.ended": "an SMP process has ended",
        "supervisor.front.open": "trainers may ask",
        "supervisor.start.done": "all is up",
        "supervisor.find.heard": "a trainer asks for its SMP",
        "supervisor.link.accepted": "an SMP has linked",
        "supervisor.slot.heard": "an SMP's facts are on the board, nobody is told",
        "supervisor.peer.heard": "a peer's facts are on the board, nobody is told",
        "supervisor.peer.told": "a peer has answered with its facts",
        "supervisor.spread.ordered": "orders are laid out for the SMPs, not yet on the disk",
        "supervisor.spread.told": "all that is to be told is on its way",
        "supervisor.record.begun": "what is known of a job has changed, its record has not",
        "supervisor.record.half": "the new record is written beside the old one",
        "supervisor.record.done": "the new record is in place",
        "supervisor.drop.heard": "a job is given up here, nobody is told",
        "supervisor.stop.begun": "it was told to stop",
        "supervisor.stop.asked": "its SMPs were told to stop",
    }
)


class Action(StrEnum):
    """What happens at a point."""

    KILL = "kill"  # SIGKILL to this process
    BOTH = "both"  # SIGKILL to its parent, too: an SMP and its supervisor; an errand and its SMP
    STOP = "stop"  # SIGSTOP to this process


@dataclass(frozen=True, slots=True)
class Arming:
    """Where to strike, and how."""

    name: str
    occurrence: int = 1
    action: Action = Action.KILL

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the line of an arm file.

        Raises:
            ValueError: it names no point, or makes no sense; says what was expected.
        """
        words = text.split()
        name, occurrence, action = [*words, "", "", ""][:3]
        if name not in POINTS:
            raise ValueError(f"{name!r} is no fault point; all of them stand in {__name__}.POINTS")
        number, act = occurrence or "1", action or Action.KILL
        if len(words) > 3 or not number.isdigit() or int(number) < 1 or act not in [*Action]:
            raise ValueError(f"{text!r}: expected POINT [OCCURRENCE [{' | '.join(Action)}]]")
        if act == Action.BOTH and not name.startswith(("smp.", "tier.")):
            raise ValueError(f"{text!r}: only an SMP or an errand dies together with its parent")
        return cls(name, int(number), Action(act))

    def __str__(self) -> str:
        return f"{self.name} {self.occurrence} {self.action}"


class Watch:
    """Looks for the arm file whenever a point is passed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._text = ""
        self._passed = 0
        self._look()

    def passed(self, name: str) -> None:
        """Strike, if this is the place and the time."""
        arming = self._look()
        if arming is None or arming.name != name:
            return
        self._passed += 1
        if self._passed == arming.occurrence:
            self._strike(arming.action)

    def _look(self) -> Arming | None:
        """What is armed now; passes are counted anew for each arming."""
        try:
            text = self._file.read_text(encoding="ascii")
        except FileNotFoundError:
            text = ""
        if text != self._text:
            self._text, self._passed = text, 0
        return Arming.parse(text) if text else None

    def _strike(self, action: Action) -> None:
        try:
            self._file.unlink()
        except FileNotFoundError:
            return  # another process was faster
        if action is Action.BOTH:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if action is Action.STOP else signal.SIGKILL)


_watch: Watch | None = None


def watch(environ: Mapping[str, str]) -> None:
    """Take the arm file from an environment; without one all points are inert.

    Raises:
        ValueError: the file names no point.
    """
    global _watch  # noqa: PLW0603  # one for the process, so that `point` costs a look at it
    file = environ.get(ARM_VARIABLE)
    _watch = Watch(Path(file)) if file else None


def point(name: str) -> None:
    """A fault point: nothing happens here unless a test has armed it."""
    if _watch is not None:
        _watch.passed(name)


watch(os.environ)

"""One stripe on its way: read, some of it while it is still written; coded; handed to its holders.

As `flow` does it: what can be read of a member that still writes is read, and its record awaited;
rows are stored only if all that was read is what the records name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from snapshotd.core.instructions import Encode
from snapshotd.metadata import DataHolding, Home, ParityHolding

from . import memory
from .memory import Key, LostBytes
from .network import BLOCKS

if TYPE_CHECKING:
    from .slot import Slot

SEAL_TIMEOUT_S = 2.0
STORE_TIMEOUT_S = 0.6
#: How coding ends that began before all was sealed, where the coder lives.
ENDINGS = (
    "stored", "not stored", "given up", "not sealed in time", "of another size", "of other bytes",
    "not there any more",
)  # fmt: skip


class Buffer:
    """A buffer that a trainer fills.

    Attributes:
        standing: the image as far as others may read it; None before anything of it stands.
        sealing: the trainer has done its part.
    """

    def __init__(self) -> None:
        self.standing: bytes | None = None
        self.sealing = False
        self._readers: list[Callable[[bool], None]] = []

    def when_over(self, tell: Callable[[bool], None]) -> None:
        """Tell a reader once it is over: whether it is sealed; if not, it was given up."""
        self._readers.append(tell)

    def over(self, *, sealed: bool) -> None:
        for tell in self._readers:
            tell(sealed)


class Reading:
    """The members of a stripe's group until all are sealed: at once where nobody still writes."""

    def __init__(self, coder: Slot, task: Encode) -> None:
        self._coder, self._task, self._life = coder, task, coder.life
        self._early: dict[int, bytes] = {}  # what was read before it was sealed, by position
        self._written: set[int] = set()  # positions of those who still write
        self._ended = False
        coder.cluster.oracle.codes(task)
        for position, member in enumerate(task.group.members):
            self._ask(position, member.home, (task.job, task.version, member.shard))
        if self._written:
            self._saw("begun")
            coder.cluster.clock.after(SEAL_TIMEOUT_S, lambda: self._fail("not sealed in time"))
        else:
            self._code()

    def _ask(self, position: int, home: Home, key: Key) -> None:
        """What a member still writes is read as it is now; what it has sealed, later."""
        coder = self._coder
        slot = coder.cluster.slot(home)
        reached = coder.cluster.network.reaches(coder.node.name, home.node, BLOCKS)
        buffer = slot.buffers.get(key) if slot is not None and reached else None
        if buffer is None:
            return
        self._written.add(position)
        if buffer.standing is not None:
            self._early[position] = buffer.standing
        buffer.when_over(lambda sealed: self._tell(home, lambda: self._over(position, sealed)))

    def _tell(self, home: Home, hear: Callable[[], None]) -> None:
        """The member's word to the coder."""
        coder = self._coder
        if home == coder.home:
            coder.cluster.clock.after(0.0, hear)
        else:
            coder.cluster.network.send(home.node, coder.node.name, BLOCKS, hear)

    def _over(self, position: int, sealed: bool) -> None:
        if self._ended or self._coder.life != self._life:
            return
        self._written.discard(position)
        if not sealed:
            self._fail("given up")
        elif not self._written:
            self._code(early=True)
            self._coder.happened()

    def _code(self, *, early: bool = False) -> None:
        coder, task = self._coder, self._task
        try:
            records = memory.records(task, self._record)
            rows = memory.encode(task, records, self._early, coder.read)
        except LostBytes as lost:
            self._end(str(lost) or "not there any more", early=early)
        else:
            self._ended = True
            Handover(coder, task, rows, self._saw if early else lambda _: None)

    def _record(self, home: Home, key: Key) -> DataHolding:
        """What a member has sealed, by its own word: not read again for that."""
        coder = self._coder
        slot = coder.cluster.slot(home)
        block = slot.memory.get(key) if slot is not None and slot.machine is not None else None
        if block is None or not coder.cluster.network.reaches(coder.node.name, home.node, BLOCKS):
            raise LostBytes
        assert isinstance(block.holding, DataHolding), "the key is of a shard"
        return block.holding

    def _fail(self, why: str) -> None:
        if not self._ended and self._coder.life == self._life:
            self._end(why, early=True)
            self._coder.happened()

    def _end(self, why: str, *, early: bool) -> None:
        machine, self._ended = self._coder.machine, True
        assert machine is not None, "the coder lives"
        if early:
            self._saw(why)
        machine.encode_failed(self._task, self._coder.cluster.clock.now_s)

    def _saw(self, what: str) -> None:
        """Counted: one of ENDINGS, or that it began."""
        self._coder.cluster.seen[f"coded early: {what}"] += 1


class Handover:
    """The rows of one stripe on their way to their holders."""

    def __init__(
        self, coder: Slot, task: Encode, rows: dict[ParityHolding, bytes],
        saw: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._coder, self._task, self._saw = coder, task, saw
        self._life = coder.life
        self._left = set(task.rows)
        self._ended = False
        for holding, row in rows.items():
            holder = task.group.members[(task.stripe + holding.place.row) % task.group.size].home
            self._hand(holder, holding, row)
        coder.cluster.clock.after(STORE_TIMEOUT_S, lambda: self._end(stored=False))

    def _hand(self, home: Home, holding: ParityHolding, row: bytes) -> None:
        coder, task = self._coder, self._task
        cluster = coder.cluster

        def arrive() -> None:
            slot = coder if home == coder.home else cluster.slot(home)
            if slot is None or (slot is coder and coder.life != self._life):
                return
            taken = slot.store(task.epoch, holding, row) if slot is not coder else slot.store_own(
                holding, row
            )  # fmt: skip
            if taken and cluster.network.passes(home.node, coder.node.name, BLOCKS):
                self._left.discard(holding.place.row)
                if not self._left:
                    self._end(stored=True)
            elif not taken:
                self._end(stored=False)

        cluster.network.send(coder.node.name, home.node, BLOCKS, arrive)

    def _end(self, *, stored: bool) -> None:
        coder = self._coder
        if self._ended or coder.life != self._life or coder.machine is None:
            return
        self._ended = True
        self._saw("stored" if stored else "not stored")
        if stored:
            coder.machine.encoded(self._task)
        else:
            coder.machine.encode_failed(self._task, coder.cluster.clock.now_s)
        coder.happened()

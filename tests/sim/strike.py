"""How a fault strikes: its numbers choose a target among what is there now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from snapshotd.metadata import DataHolding, ParityHolding

from .faults import Fault
from .network import BLOCKS, FACTS
from .node import Node
from .slot import Slot
from .trainer import Trainer

if TYPE_CHECKING:
    from .cluster import Cluster

_T = TypeVar("_T")
AGAIN_S = 0.02  # a fault that finds no target yet may look again


def choose(among: Sequence[_T], chosen: float) -> _T | None:
    """The item that a number between 0 and 1 chooses, if there is any."""
    return among[min(int(chosen * len(among)), len(among) - 1)] if among else None


class Striker:
    """Carries out faults."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._acts: dict[str, Callable[[Fault], bool]] = {
            "messages dropped": self._haze,
            "messages delayed": self._haze,
            "messages duplicated": self._haze,
            "messages reordered": self._haze,
            "partition": self._partition,
            "one-way partition": self._partition,
            "partition of facts": self._partition,
            "partition of blocks": self._partition,
            "SMP killed": self._kill_smp,
            "supervisor killed": self._kill_supervisor,
            "supervisor killed, records lost": self._kill_supervisor,
            "node crashed": self._crash_node,
            "node rebooted, memory lost": self._crash_node,
            "node rebooted, memory and records lost": self._crash_node,
            "node replaced, old name": self._replace_node,
            "node replaced, new name": self._replace_node,
            "slow node": self._slow,
            "trainer killed": self._kill_trainer,
            "snapshot torn": self._tear,
            "snapshot skipped": self._skip,
            "job relaunched": self._relaunch,
            "trainer left over": self._leave_one,
            "world size changed": self._resize,
            "launcher and daemons restarted": self._restart_all,
            "out of memory": self._fill,
            "bit flipped in data": self._flip,
            "bit flipped in parity": self._flip,
            "job left alone": self._leave_alone,
            "newest generation damaged": self._damage_newest,
            "memory short everywhere": self._fill_all,
        }

    def strike(self, fault: Fault) -> None:
        """Do it, and count it where it found a target."""
        if self._acts[fault.kind](fault):
            self._cluster.injected[fault.kind] += 1

    # -- targets

    def _node(self, chosen: float) -> Node | None:
        return choose([n for n in self._cluster.nodes.values() if not n.gone], chosen)

    def _slot(self, chosen: float) -> Slot | None:
        nodes = [n for n in self._cluster.nodes.values() if not n.gone]
        return choose([s for n in nodes for s in n.slots], chosen)

    def _trainer(self, chosen: float) -> Trainer | None:
        gang = self._cluster.launcher.gang
        return choose([t for t in gang.trainers if not t.dead] if gang else [], chosen)

    # -- the network

    def _haze(self, fault: Fault) -> bool:
        node = self._node(fault.where)
        if node is not None:
            rate = 0.1 + 0.6 * fault.other
            self._cluster.network.haze(fault.kind, node.name, rate, fault.for_s)
            self._cluster.injected[fault.kind] -= 1  # each message counts instead
        return node is not None

    def _partition(self, fault: Fault) -> bool:
        """Some nodes next to each other, from the next or from all others."""
        names = [n.name for n in self._cluster.nodes.values() if not n.gone]
        if len(names) < 2:
            return False
        first = int(fault.where * len(names))
        names = names[first:] + names[:first]
        size = 1 + int(fault.other * (len(names) - 1))
        here, rest = names[:size], names[size:]
        if int(fault.other * 97) % 3 == 0:
            rest = rest[:1]  # a pair of sets; everybody else hears both
        planes = {
            "partition of facts": (FACTS,),
            "partition of blocks": (BLOCKS,),
        }.get(fault.kind, (FACTS, BLOCKS))
        both = fault.kind != "one-way partition"
        self._cluster.network.cut(here, rest, planes, fault.for_s, both=both)
        return True

    def _slow(self, fault: Fault) -> bool:
        node = self._node(fault.where)
        if node is not None:
            self._cluster.network.slow(node.name, fault.for_s)
        return node is not None

    # -- processes

    def _kill_smp(self, fault: Fault) -> bool:
        slot = self._slot(fault.where)
        if slot is None or slot.machine is None:
            return False
        slot.stop()
        slot.node.restart_slot(slot, fault.for_s * 0.5)
        return True

    def _kill_supervisor(self, fault: Fault) -> bool:
        node = self._node(fault.where)
        if node is None or node.board is None:
            return False
        node.stop()
        if fault.kind.endswith("records lost"):
            self._cluster.lose_records(node)
        self._start_later(node, fault.for_s)
        return True

    def _start_later(self, node: Node, after_s: float) -> None:
        boots = node.boots

        def start() -> None:
            if boots == node.boots and not node.gone and node.board is None:
                node.start()

        self._cluster.clock.after(after_s, start)

    def _crash_node(self, fault: Fault) -> bool:
        """All processes of a node, with what the kind says."""
        node = self._node(fault.where)
        if node is None or node.board is None:
            return False
        loses = "lost" in fault.kind
        if loses and not self._cluster.oracle.spares(node.name):
            return False
        self._cluster.crash(node, memory=loses, records="records" in fault.kind)
        self._start_later(node, fault.for_s)
        return True

    def _replace_node(self, fault: Fault) -> bool:
        node = self._node(fault.where)
        if node is None or not self._cluster.oracle.spares(node.name):
            return False
        self._cluster.crash(node, memory=True, records=True)
        node.gone = True
        old_name = fault.kind.endswith("old name")
        self._cluster.clock.after(
            fault.for_s, lambda: self._cluster.replace(node, old_name=old_name)
        )
        return True

    # -- the job

    def _kill_trainer(self, fault: Fault) -> bool:
        trainer = self._trainer(fault.where)
        if trainer is not None:
            trainer.die()
        return trainer is not None

    def _tear(self, fault: Fault) -> bool:
        trainer = self._trainer(fault.where)
        if trainer is not None:
            trainer.tear_next = True
        return trainer is not None

    def _skip(self, fault: Fault) -> bool:
        trainer = self._trainer(fault.where)
        if trainer is not None:
            trainer.skip_next = True
        return trainer is not None

    def _relaunch(self, fault: Fault) -> bool:
        self._cluster.launcher.launch_soon()
        return True

    def _leave_one(self, fault: Fault) -> bool:
        """Counted when a rank of the old run indeed outlives it."""
        self._cluster.launcher.leave_one = True
        self._cluster.launcher.launch_soon()
        return False

    def _resize(self, fault: Fault) -> bool:
        launcher, setup = self._cluster.launcher, self._cluster.setup
        sizes = [n for n in (setup.nodes - 1, setup.nodes, setup.nodes + setup.spares) if n > 0]
        nodes = choose([n for n in sizes if n != launcher.nodes], fault.where)
        if nodes is None:
            return False
        launcher.resize(nodes, anew=fault.other < 0.5)
        return True

    def _restart_all(self, fault: Fault) -> bool:
        """An upgrade of the daemons while the launcher starts again."""
        some = [n for n in self._cluster.nodes.values() if not n.gone and n.board is not None]
        for i, node in enumerate(some[: 1 + int(fault.where * len(some))]):
            node.stop()
            self._start_later(node, fault.for_s * (0.2 + 0.1 * i))
        self._cluster.launcher.launch_soon()
        return True

    # -- memory

    def _fill(self, fault: Fault) -> bool:
        slot = self._slot(fault.where)
        if slot is not None:
            self._fill_slot(slot, fault)
        return slot is not None

    def _fill_slot(self, slot: Slot, fault: Fault) -> None:
        held = sum(len(b.image) for b in slot.memory.values())
        slot.short_until_s = self._cluster.clock.now_s + 4 * fault.for_s
        slot.limit_bytes = int(1.2 * fault.other * held)

    def _fill_all(self, fault: Fault) -> bool:
        for node in self._cluster.nodes.values():
            for slot in node.slots:
                self._fill_slot(slot, fault)
        return True

    def _flip(self, fault: Fault) -> bool:
        slot = self._slot(fault.where)
        if slot is None:
            return False
        kind = DataHolding if fault.kind.endswith("data") else ParityHolding
        keys = [k for k, b in slot.memory.items() if isinstance(b.holding, kind) and b.image]
        key = choose(keys, fault.other)
        if key is None or not self._cluster.oracle.spares(slot.node.name):
            return False
        slot.memory[key] = slot.memory[key].flipped(fault.for_s)
        self._cluster.oracle.part_lost(slot.home, key)
        return True

    def _damage_newest(self, fault: Fault) -> bool:
        """More of the restore point than its code bears, once an older generation is whole."""
        cluster, promise = self._cluster, self._cluster.oracle.promise
        if promise is None or not promise.older_is_whole(cluster.memories()):
            later = fault._replace(at_s=fault.at_s + AGAIN_S)
            if later.at_s < cluster.setup.faults_s:
                cluster.clock.after(AGAIN_S, lambda: self.strike(later))
            return False
        group = choose(promise.groups, fault.where)
        assert group is not None, "a promise has groups"
        members = group.members[: group.parity + 1]
        if fault.other < 0.5:
            members = group.members
        homes = [m.home for m in members]
        for slot in filter(None, map(cluster.slot, homes)):
            for key, block in slot.memory.items():
                if key[1] == promise.version and block.image:
                    slot.memory[key] = block.flipped(fault.for_s)
        cluster.oracle.memory_lost(homes)
        for trainer in cluster.launcher.gang.trainers if cluster.launcher.gang else ():
            trainer.die()
        cluster.launcher.launch_soon()
        return True

    # -- nobody there

    def _leave_alone(self, fault: Fault) -> bool:
        """A node of the job is lost, and its trainers are not started again for long."""
        cluster, promise = self._cluster, self._cluster.oracle.promise
        if promise is None or cluster.launcher.alone:
            return False
        homes = sorted({h.node for h in promise.parts if h.node in cluster.nodes})
        node = cluster.nodes[choose(homes, fault.where) or homes[0]] if homes else None
        if node is None or node.gone or not cluster.oracle.spares(node.name):
            return False
        cluster.crash(node, memory=True, records=True)
        node.gone = True
        if fault.other < 0.4:
            old_name = fault.other < 0.2
            cluster.clock.after(6 * fault.for_s, lambda: cluster.replace(node, old_name=old_name))
        cluster.launcher.leave_alone()
        return True

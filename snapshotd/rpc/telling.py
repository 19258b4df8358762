"""What nodes tell each other of themselves: all of it once, then what is other than before.

Facts name every member of the cluster and every rank of a job, and most of that changes once a
restore. Each message says what its sender has heard of the receiver, so that the receiver knows
what it need not repeat; a node that was started anew has heard nothing, and is told all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from snapshotd.core.membership import MAX_PEERS
from snapshotd.metadata import JobFacts, NodeFacts, SlotFacts
from snapshotd.rpc.checks import malformed
from snapshotd.rpc.convert import decision_from
from snapshotd.rpc.facts import (
    check_node_counts,
    job_to,
    job_with,
    members_from,
    members_to,
    node_from,
    node_to,
    slot_from,
    slot_to,
)
from snapshotd.wire.v1 import node_pb2 as pb

#: Of this node's own facts, the newest so many: a peer that has heard older ones is told all.
KEPT: Final = 64

Key = TypeVar("Key", int, str)
Part = TypeVar("Part", SlotFacts, JobFacts)


@dataclass(slots=True)
class _Peer:
    """The newest facts that were heard of it, and boot and sequence of those it has heard of us."""

    told: NodeFacts | None = None
    heard: tuple[str, int] | None = None


class Tellings:
    """What this node has published, and what it and its peers have heard of each other."""

    def __init__(self) -> None:
        self._published: OrderedDict[int, NodeFacts] = OrderedDict()
        #: Messages about the newest of these, by what they build on and what they tell.
        self._made: dict[tuple[int, int], pb.Telling] = {}
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def message(self, peer: str, facts: NodeFacts, *, whole: bool = False) -> pb.Telling:
        """This node's facts, for that peer; `whole`: all of them, and to be answered with all."""
        self._publish(facts)
        known = _Peer() if whole else self._peers.get(peer, _Peer())
        base = self._known_to(known, facts)
        if base is not None and base.sequence > facts.sequence:
            facts = base  # it has heard newer ones meanwhile
        key = (base.sequence if base else 0, facts.sequence)
        made = self._made.get(key)
        if made is None:
            made = _difference(base, facts) if base else pb.Telling(whole=node_to(facts))
            self._made[key] = made
        message = pb.Telling()
        message.CopyFrom(made)
        if known.told is not None:
            message.heard.boot, message.heard.sequence = known.told.boot, known.told.sequence
        return message

    def take(self, message: pb.Telling) -> NodeFacts | None:
        """All facts of its sender, the newest heard; None where it builds on what was not heard.

        Raises:
            RequestError: they make no sense.
        """
        node = speaker(message)
        known = self._peers.get(node, _Peer())
        if message.WhichOneof("facts") == "difference":
            facts = _changed(known.told, message.difference)
        else:
            facts = _newer(known.told, node_from(message.whole))
        known.told = facts or known.told
        heard = message.heard
        known.heard = (heard.boot, heard.sequence) if message.HasField("heard") else None
        self._peers[node] = known
        self._peers.move_to_end(node)
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return facts

    def has_heard(self, peer: str, facts: NodeFacts) -> bool:
        """Whether the peer has said that it has heard these, or newer ones."""
        boot, sequence = self._peers.get(peer, _Peer()).heard or ("", 0)
        return boot == facts.boot and sequence >= facts.sequence

    def _publish(self, facts: NodeFacts) -> None:
        if facts.sequence in self._published:
            return
        self._published[facts.sequence] = facts
        self._made.clear()
        if len(self._published) > KEPT:
            self._published.popitem(last=False)

    def _known_to(self, peer: _Peer, facts: NodeFacts) -> NodeFacts | None:
        boot, sequence = peer.heard or ("", 0)
        return self._published.get(sequence) if boot == facts.boot else None


def speaker(message: pb.Telling) -> str:
    """The node that a message is of. Raises RequestError: of none."""
    match message.WhichOneof("facts"):
        case "whole":
            return message.whole.node
        case "difference":
            return message.difference.node
    raise malformed("a telling without facts")


def _difference(base: NodeFacts, facts: NodeFacts) -> pb.Telling:
    slots, old_slots = _by_slot(facts.slots), _by_slot(base.slots)
    jobs, old_jobs = _by_name(facts.jobs), _by_name(base.jobs)
    found = pb.Difference(
        node=facts.node,
        boot=facts.boot,
        base=base.sequence,
        sequence=facts.sequence,
        slots=[slot_to(s) for s in _other(old_slots, slots)],
        slots_gone=sorted(old_slots.keys() - slots.keys()),
        jobs=[_job_difference(old_jobs.get(j.job), j) for j in _other(old_jobs, jobs)],
        jobs_gone=sorted(old_jobs.keys() - jobs.keys()),
    )
    if facts.members != base.members:
        found.members.members.extend(members_to(facts.members))
    return pb.Telling(difference=found)


def _job_difference(old: JobFacts | None, job: JobFacts) -> pb.JobDifference:
    found = pb.JobDifference(
        same_decision=old is not None and old.decision == job.decision,
        same_pending=old is not None and old.pending == job.pending,
        facts=job_to(job),
    )
    if found.same_decision:
        found.facts.ClearField("decision")
    if found.same_pending:
        found.facts.ClearField("pending")
    return found


def _changed(base: NodeFacts | None, told: pb.Difference) -> NodeFacts | None:
    if base is None or base.boot != told.boot:
        return None
    if base.sequence >= told.sequence:
        return base
    if base.sequence != told.base:
        return None
    slots, jobs = _by_slot(base.slots), _by_name(base.jobs)
    for gone in told.slots_gone:
        slots.pop(gone, None)
    slots.update(_by_slot([slot_from(s) for s in told.slots]))
    found = [_changed_job(jobs.get(j.facts.job), j) for j in told.jobs]
    for name in told.jobs_gone:
        jobs.pop(name, None)
    jobs.update(_by_name(found))
    check_node_counts(len(slots), len(jobs))
    return NodeFacts(
        cluster_id=base.cluster_id,
        node=base.node,
        boot=base.boot,
        sequence=told.sequence,
        address=base.address,
        members=members_from(told.members.members) if told.HasField("members") else base.members,
        slots=tuple(slots[s] for s in sorted(slots)),
        jobs=tuple(jobs[j] for j in sorted(jobs)),
        protocol=base.protocol,
    )


def _newer(known: NodeFacts | None, facts: NodeFacts) -> NodeFacts:
    """Messages of one node may overtake each other."""
    if known is not None and known.boot == facts.boot and known.sequence > facts.sequence:
        return known
    return facts


def _changed_job(old: JobFacts | None, told: pb.JobDifference) -> JobFacts:
    if old is None and (told.same_decision or told.same_pending):
        raise malformed(f"job {told.facts.job[:40]!r} is to be as before, and was not told of")
    facts = told.facts
    decision = decision_from(facts.decision) if facts.HasField("decision") else None
    pending = decision_from(facts.pending) if facts.HasField("pending") else None
    return job_with(
        facts,
        old.decision if old and told.same_decision else decision,
        old.pending if old and told.same_pending else pending,
    )


def _by_slot(slots: Sequence[SlotFacts]) -> dict[int, SlotFacts]:
    return {s.slot: s for s in slots}


def _by_name(jobs: Sequence[JobFacts]) -> dict[str, JobFacts]:
    return {j.job: j for j in jobs}


def _other(old: dict[Key, Part], new: dict[Key, Part]) -> list[Part]:
    """Those that are new, or other than before."""
    return [part for key, part in new.items() if key not in old or old[key] != part]

"""Who is there: facts heard from other nodes, when, and what follows from silence.

A node is *live* while it is heard, *suspect* after `suspect_s` of silence, *dead* after `dead_s`.
Facts of dead nodes count for nothing. Configured peers are seeds: any node of the same cluster
that reaches one live member is admitted, and met by the others through that member's facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from snapshotd.metadata import NodeFacts
from snapshotd.wire.protocol import PROTOCOL_VERSION

#: A node that is no seed is forgotten after this many times `dead_s` of silence, and so is a job
#: that was dropped.
FORGET_FACTOR: Final = 100
#: Other nodes that are known, and talked to, at once: beyond some hundred, facts need a hierarchy.
MAX_PEERS: Final = 1024
#: Strangers that are remembered for the operator, the newest.
MAX_REFUSED: Final = 64


class Liveness(Enum):
    """What silence says of a node."""

    LIVE = "live"
    SUSPECT = "suspect"
    DEAD = "dead"
    UNMET = "unmet"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node is not admitted, in words for both sides' operators; `fatal` for the caller."""

    reason: str
    fatal: bool = False


@dataclass(slots=True)
class _Peer:
    address: str
    facts: NodeFacts | None = None
    heard_at_s: float = float("-inf")
    met_at_s: float = float("-inf")


class Membership:
    """The other nodes of the cluster, as this one knows them. Pure: time is passed in."""

    def __init__(
        self,
        *,
        cluster_id: str,
        node: str,
        boot: str,
        address: str,
        seeds: Mapping[str, str],
        suspect_s: float,
        dead_s: float,
        started_s: float = 0.0,
    ) -> None:
        self.cluster_id = cluster_id
        self.node = node
        self.boot = boot
        self.address = address
        self._suspect_s = suspect_s
        self._dead_s = dead_s
        self._started_s = started_s
        self._seeds = frozenset(seeds)
        self._peers = {n: _Peer(a) for n, a in seeds.items() if n != node}
        self._refused: dict[str, str] = {}
        self._live: tuple[float, dict[str, NodeFacts]] | None = None  # as of then

    def hear(self, facts: NodeFacts, now_s: float) -> Refusal | None:
        """Take in the facts of another node; a refusal says why they were not taken."""
        refusal = self._check(facts, now_s)
        if refusal is not None:
            self.note_refusal(facts.address, refusal.reason)
            return refusal
        self._refused.pop(facts.address, None)
        self._make_room(facts.node)
        self.meet([(facts.node, facts.address)], now_s)
        peer = self._peers[facts.node]
        old = peer.facts
        if old is None or (facts.boot, facts.sequence) >= (old.boot, old.sequence):
            peer.facts = facts
            peer.address = facts.address
            peer.heard_at_s = now_s
            self._live = None
        self.meet(facts.members, now_s)
        return None

    def meet(self, members: Iterable[tuple[str, str]], now_s: float) -> None:
        """Learn of nodes that another node knows."""
        for node, address in members:
            # Of each message, so for most of them there is nothing to be made.
            if node not in self._peers and node != self.node and len(self._peers) < MAX_PEERS:
                self._peers[node] = _Peer(address, met_at_s=now_s)

    def _make_room(self, node: str) -> None:
        """Give the place of one that was only heard of to one that speaks."""
        rumours = (n for n, p in self._peers.items() if p.facts is None and n not in self._seeds)
        if node not in self._peers and len(self._peers) >= MAX_PEERS:
            self._peers.pop(next(rumours, ""), None)

    @property
    def memory_s(self) -> float:
        """For how long what is gone is remembered."""
        return FORGET_FACTOR * self._dead_s

    def forget(self, now_s: float) -> None:
        """Drop nodes that were replaced long ago; seeds are never dropped."""
        patience_s = self.memory_s
        for node, peer in list(self._peers.items()):
            last_s = max(peer.heard_at_s, peer.met_at_s)
            if node not in self._seeds and now_s - last_s > patience_s:
                del self._peers[node]
                self._live = None

    def note_refusal(self, address: str, reason: str) -> None:
        """The node at `address` does not take our facts, or we not its."""
        self._refused.pop(address, None)
        self._refused[address] = reason
        while len(self._refused) > MAX_REFUSED:
            self._refused.pop(next(iter(self._refused)))

    def live(self, now_s: float) -> Mapping[str, NodeFacts]:
        """Facts of all nodes that are not dead, this one not among them; not to be changed."""
        if self._live is None or self._live[0] != now_s:
            live = {
                node: peer.facts
                for node, peer in self._peers.items()
                if peer.facts is not None and now_s - peer.heard_at_s < self._dead_s
            }
            self._live = (now_s, live)
        return self._live[1]

    def known(self, node: str, now_s: float) -> NodeFacts | None:
        """Facts of another node, if it is not dead."""
        peer = self._peers.get(node)
        return peer.facts if peer and now_s - peer.heard_at_s < self._dead_s else None

    def dead(self, nodes: Iterable[str], now_s: float) -> frozenset[str]:
        """Those of `nodes` that count as lost."""
        live = self.live(now_s)
        return frozenset(
            node
            for node in nodes
            if node not in live and self.silence_s(node, now_s) >= self._dead_s
        )

    def silence_s(self, node: str, now_s: float) -> float:
        """How long nothing was heard of a node, at most as long as this one listens."""
        if node == self.node:
            return 0.0
        peer = self._peers.get(node)
        return now_s - max(self._started_s, peer.heard_at_s if peer else self._started_s)

    def absent(self, now_s: float) -> tuple[str, ...]:
        """Nodes that are configured or were met, and are not live."""
        live = self.live(now_s)
        return tuple(sorted(set(self._peers) - set(live)))

    def addresses(self) -> dict[str, str]:
        """Every other node's address, dead ones too: they may come back."""
        return {node: peer.address for node, peer in sorted(self._peers.items())}

    def members(self, now_s: float) -> tuple[tuple[str, str], ...]:
        """Live nodes and their addresses, to be told to others."""
        live = self.live(now_s)
        return tuple((n, self._peers[n].address) for n in sorted(live))

    def liveness(self, node: str, now_s: float) -> tuple[Liveness, float, str]:
        """State of another node, its silence in seconds (inf: never heard), and the reason."""
        peer = self._peers[node]
        silent_s = now_s - peer.heard_at_s
        reason = self._refused.get(peer.address, "")
        if reason:
            return Liveness.REFUSED, silent_s, reason
        if peer.facts is None:
            return Liveness.UNMET, silent_s, "never heard of"
        if silent_s < self._suspect_s:
            return Liveness.LIVE, silent_s, ""
        if silent_s < self._dead_s:
            return Liveness.SUSPECT, silent_s, "silent"
        return Liveness.DEAD, silent_s, "silent"

    def _check(self, facts: NodeFacts, now_s: float) -> Refusal | None:
        if facts.protocol != PROTOCOL_VERSION:
            return Refusal(
                f"{facts.node} at {facts.address} speaks protocol {facts.protocol}, "
                f"{self.node} speaks {PROTOCOL_VERSION}. Install the same version on both",
                fatal=False,
            )
        if facts.cluster_id != self.cluster_id:
            return Refusal(
                f"{facts.node} at {facts.address} belongs to cluster {facts.cluster_id!r}, "
                f"{self.node} to {self.cluster_id!r}. Correct cluster_id, or the peers list",
            )
        if facts.node == self.node:
            return self._check_namesake(facts)
        peer = self._peers.get(facts.node)
        if peer is None and self._is_full():
            return Refusal(f"{self.node} knows {MAX_PEERS} nodes already, and can meet no other")
        if peer is None or peer.facts is None or peer.facts.address == facts.address:
            return None
        if now_s - peer.heard_at_s < self._suspect_s and facts.boot != peer.facts.boot:
            return Refusal(
                f"node id {facts.node!r} is in use by a live daemon at {peer.facts.address}; "
                f"the one at {facts.address} needs another node_id",
                fatal=True,
            )
        return None

    def _is_full(self) -> bool:
        spoken = sum(1 for n, p in self._peers.items() if p.facts is not None or n in self._seeds)
        return spoken >= MAX_PEERS

    def _check_namesake(self, facts: NodeFacts) -> Refusal | None:
        if facts.boot == self.boot:
            return Refusal(f"{self.node} was asked to talk to itself at {facts.address}")
        return Refusal(
            f"node id {facts.node!r} is in use by a live daemon at {self.address}; "
            f"the one at {facts.address} needs another node_id",
            fatal=facts.boot > self.boot,  # the elder goes on; the newcomer is told by the others
        )

"""The nodes of a run, and the hosts that are free for new ones."""

from __future__ import annotations

import asyncio
import contextlib

from tests.integration.soak.network import Network
from tests.integration.soak.node import Around, Node, Plan


class Nodes:
    """Makes nodes, and removes them."""

    def __init__(self, network: Network, plan: Plan, around: Around) -> None:
        self._free = list(network.hosts)
        self._plan, self._around = plan, around
        self._made = 0
        self.all: list[Node] = []

    def first(self, count: int) -> list[Node]:
        """Nodes that know each other from the start."""
        names = {f"n{i}": f"{host.address}:7070" for i, host in enumerate(self._free[:count])}
        return [self._make(name, names) for name in names]

    def add(self) -> Node:
        """An empty one that no other node's configuration names; it knows two that run."""
        running = [n for n in self.all if n.pid is not None][:2]
        self._made += 1
        return self._make(f"r{self._made}", {n.name: n.address for n in running})

    def _make(self, name: str, seeds: dict[str, str]) -> Node:
        # Taken from the front, given back at the end: an address rests before it is used again.
        node = Node(name, self._free.pop(0), seeds, self._plan, self._around)
        self.all.append(node)
        return node

    def spare(self) -> int:
        return len(self._free)

    async def remove(self, node: Node) -> None:
        self.all.remove(node)
        await node.remove()
        self._free.append(node.host)

    async def close(self) -> None:
        """Kill what runs, and leave nothing."""
        for node in list(self.all):
            with contextlib.suppress(OSError):
                await node.lose()
                async with asyncio.timeout(10):
                    await self.remove(node)

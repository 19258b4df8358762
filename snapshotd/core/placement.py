"""Who protects whom: shards and their homes in, groups out. A pure function of its arguments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from snapshotd.errors import CallerError
from snapshotd.metadata import Group, Home, Member

#: zfec and ISA-L work in GF(256); groups this large already cost 32 streams a stripe.
MAX_GROUP = 32


def form_groups(homes: Mapping[int, Home], group_size: int, parity: int) -> tuple[Group, ...]:
    """Divide the shards of a job into groups that share no node.

    Shards of the same slot (local rank) on different nodes form groups, nodes in order of their
    ids, so that a node's death costs each group one member. There are `nodes // group_size`
    groups, of sizes that differ by one at most: none is smaller than `group_size` unless the job
    itself is.

    Args:
        homes: shard -> home, all shards of the job.
        group_size: wanted n.
        parity: m; 0 keeps state on its own node only.

    Raises:
        CallerError: a group would have no more members than parity blocks, or too many members.
    """
    by_slot: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for shard, home in homes.items():
        by_slot[home.slot].append((home.node, shard))
    groups: list[Group] = []
    for slot, residents in sorted(by_slot.items()):
        for part in _even_parts(sorted(residents), group_size):
            _check_size(part, slot, parity)
            members = sorted(Member(shard, Home(node, slot)) for node, shard in part)
            groups.append(Group(tuple(members), parity))
    return tuple(groups)


def _even_parts(residents: Sequence[tuple[str, int]], size: int) -> list[Sequence[tuple[str, int]]]:
    count = max(1, len(residents) // size)
    bounds = [len(residents) * i // count for i in range(count + 1)]
    return [residents[a:b] for a, b in pairwise(bounds)]


def _check_size(part: Sequence[tuple[str, int]], slot: int, parity: int) -> None:
    nodes = ", ".join(node for node, _ in part)
    if parity >= len(part):
        raise CallerError(
            f"local rank {slot} runs on {len(part)} node(s) ({nodes}), "
            f"too few to keep {parity} parity block(s) a stripe",
            f"Run the job on at least {parity + 1} nodes, or lower protection.parity "
            "(0 survives the death of processes, but of no node)",
        )
    if len(part) > MAX_GROUP:
        raise CallerError(
            f"a group of {len(part)} nodes exceeds the limit of {MAX_GROUP}",
            f"Set protection.group_size to {MAX_GROUP // 2} or less",
        )

"""What a Snapshotter tells its caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Restored:
    """What `restore` brought back.

    Attributes:
        step: the step after which the state was taken; go on with step + 1.
        tier: where it came from, for the whole job: "local" (every rank from its own node),
            "group" (some shard was copied or decoded from other nodes) or "persistent".
        values: the keyword values given to `step()` then.
        bytes_copied: of the shards that this rank's state was in, brought over from another node.
        bytes_decoded: of these, rebuilt from the erasure code.
        bytes_stored: read for this rank out of the persistent tier, where another number of ranks
            had saved the step there.
        bytes_received: over the network, for what its own shard did not have: by its node for
            another layout, from other nodes or the persistent tier; or by itself from ranks that
            hold the same.
        saved_world: how many ranks saved it.
        skipped: what did not fit and was left as it was, with `strict=False`; sentences.
        rng: "restored", or "seeded" anew, from job, step and rank, after another number of ranks.
        waited_s: from the question to the daemons' answer.
        staged_s: of that, what it took to have this rank's shard on its node, verified.
        loaded_s: from the answer until the state was back.
    """

    step: int
    tier: str
    values: dict[str, Any] = field(default_factory=dict)
    bytes_copied: int = 0
    bytes_decoded: int = 0
    bytes_stored: int = 0
    bytes_received: int = 0
    saved_world: int = 0
    skipped: tuple[str, ...] = ()
    rng: str = "restored"
    waited_s: float = 0.0
    staged_s: float = 0.0
    loaded_s: float = 0.0


@dataclass(frozen=True)
class Status:
    """How far this rank's state is protected, as of the newest word from the daemon.

    Attributes:
        connected: a daemon answers.
        why_not_connected: what was seen last, while none does.
        snapshot_step: newest step handed to the daemon; None before the first.
        committed_step: the job's restore point; None before the first.
        is_protected: the restore point survives the loss of `parity` nodes of every group.
        why_not: what the daemon waits for, or why the newest step was skipped; empty while all is
            well.
        waits_for: who keeps the newest snapshot from being committed.
        skipped: snapshots that were due and not taken, since this process started.
        repeated: newest snapshots, in a row, that hold the very tensors of the one before them; an
            alarm where the model should have changed.
        torn: snapshots that were discarded because the state was written to while it was copied.
        blocked_s: how long the newest `step` that took a snapshot kept training waiting.
        waited_s: how long the newest update of a captured optimizer waited for the copy; 0 where
            it had ended before.
    """

    connected: bool
    why_not_connected: str
    snapshot_step: int | None
    committed_step: int | None
    is_protected: bool
    why_not: str
    waits_for: tuple[str, ...]
    skipped: int
    repeated: int
    torn: int = 0
    blocked_s: float = 0.0
    waited_s: float = 0.0

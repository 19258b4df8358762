"""Which start of the job this process belongs to, as all ranks of that start know it."""

from __future__ import annotations

import uuid

import torch.distributed as dist

_KEY = "snapshotd/launch"


def this_launch() -> str:
    """A name that the ranks of one start share, and those of no other; empty where none is known.

    The ranks that found their process group together have a store of their own, and the first of
    them writes the name there. Trainers left over from an earlier start are told apart by it: the
    environment does not do, since torchrun may use the same port again, and its restart count
    differs between agents.

    Raises:
        RuntimeError: of torch.distributed, where the store cannot be reached.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ""
    # Not every build of torch has it; and there is no public way to the store.
    from torch.distributed.distributed_c10d import _get_default_store  # noqa: PLC0415

    name: bytes = _get_default_store().compare_set(_KEY, "", uuid.uuid4().hex)
    return name.decode()

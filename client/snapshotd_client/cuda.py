"""State on CUDA devices: page-locked segments, and copies beside the training's own stream.

Nothing here waits for a device from the training thread, and nothing synchronises one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import torch

from snapshotd_client.copying import Load, Target

log = logging.getLogger(__name__)

#: One call of cudaHostRegister takes no more; larger ones were seen to fail.
LOCK_BYTES: Final = 64 << 30


def lock_pages(address: int, nbytes: int) -> list[int]:
    """Page-lock memory for CUDA, in chunks; the addresses to unlock, none where it cannot be."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types here
    locked: list[int] = []
    for start in range(address, address + nbytes, LOCK_BYTES):
        length = min(LOCK_BYTES, address + nbytes - start)
        code = int(runtime.cudaHostRegister(start, length, 0))
        if code != 0:
            log.warning(
                "%d bytes of a segment cannot be page-locked (cudaHostRegister returned %d): "
                "copies from the device will be slower; raise `ulimit -l`",
                length,
                code,
            )
            unlock_pages(locked)
            return []
        locked.append(start)
    return locked


def unlock_pages(addresses: Iterable[int]) -> None:
    """Undo `lock_pages`; says where that fails."""
    for address in addresses:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types here
        code = int(runtime.cudaHostUnregister(address))
        if code != 0:
            log.warning("a segment stays page-locked: cudaHostUnregister returned %d", code)


def in_use() -> bool:
    """Whether this process has CUDA state, so that it may be asked about devices."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch has no types here


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured from this thread's stream."""
    return in_use() and bool(torch.cuda.is_current_stream_capturing())


class Stream:
    """The copies of one snapshot on the devices that its pieces are on.

    Made on the training thread when the step has ended: what its streams were given by then is
    what is copied.

    Args:
        devices: of the pieces.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        #: By device: what was asked of it before.
        self._before = {d: torch.cuda.current_stream(d).record_event() for d in devices}
        self._after: dict[torch.device, torch.cuda.Event] = {}
        #: By device: (bytes of each block's start, when it has copied its part of these).
        self._marks: dict[torch.device, list[tuple[int, torch.cuda.Event]]] = {}

    def start(self, target: Target, moving: Load, resting: Load, block_bytes: int) -> None:
        """Give the devices their copies into a page-locked image, and do not wait for them.

        What rests goes side by side into the blocks of `block_bytes`, as `Target.put` does it.
        """
        order = resting.order(block_bytes)
        for device, before in self._before.items():
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # the same
            marks = self._marks[device] = []
            with torch.cuda.stream(side), torch.no_grad():
                side.wait_event(before)
                for offset, source in moving.device:
                    if source.device == device:
                        _copy(target, offset, source)
                begun = 0
                for inside, offset, source, start, length in order.device:
                    if source.device == device:
                        if inside >= begun + order.slice_bytes:
                            begun = inside - inside % order.slice_bytes
                            marks.append((begun, side.record_event()))
                        _copy(target, offset, source[start : start + length])
                self._after[device] = side.record_event()

    def standing(self) -> Iterator[int]:
        """Waits for the copies, and says of how many bytes of each block's start they are done."""
        for stands in sorted({mark for marks in self._marks.values() for mark, _ in marks}):
            for device, after in self._after.items():
                events = (event for mark, event in self._marks[device] if mark >= stands)
                next(events, after).synchronize()
            yield stands

    @property
    def devices(self) -> Collection[torch.device]:
        """Those that copy."""
        return self._before.keys()

    def hold_back(self) -> None:
        """What this thread asks of the devices from now on comes after the copies."""
        for device, after in self._after.items():
            torch.cuda.current_stream(device).wait_event(after)

    def join(self) -> None:
        """Wait for the copies; other threads run meanwhile."""
        for after in self._after.values():
            after.synchronize()


def _copy(target: Target, offset: int, source: torch.Tensor) -> None:
    target.image[offset : offset + source.numel()].copy_(source, non_blocking=True)

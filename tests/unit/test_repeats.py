"""The alarm of a capture that stands still: what is compared, and what is concluded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from snapshotd.coding.digest import grain_digests
from snapshotd.core.repeats import Fingerprint, Ranges, Repeats, fingerprint, repeated
from snapshotd.errors import RequestError
from snapshotd.metadata import DataHolding, Version
from snapshotd.rpc.convert import ranges_from
from snapshotd.wire.protocol import MIN_GRAIN_BYTES
from snapshotd.wire.v1.segment_pb2 import StorageExtent
from snapshotd_client.capture import plan
from snapshotd_client.trained import trained_ranges

GRAIN = MIN_GRAIN_BYTES
#: The second and third of four grains are whole; the ends of the range share theirs.
RANGES: Ranges = ((GRAIN - 8, 3 * GRAIN + 8),)


def sealed(step: int, image: bytes, ranges: Ranges = RANGES, epoch: int = 1) -> Fingerprint:
    holding = DataHolding("job", 0, Version(epoch, step), len(image), b"")
    return fingerprint(holding, ranges, grain_digests(memoryview(image)))


def image(head: int = 0, tensors: int = 0, tail: int = 0) -> bytes:
    parts = [bytes([value]) * GRAIN for value in (head, tensors, tensors, tail)]
    return b"".join(parts)


def test_only_whole_grains_within_tensors_count() -> None:
    assert repeated(sealed(1, image()), sealed(2, image(head=1, tail=2))) is True
    assert repeated(sealed(1, image()), sealed(2, image(tensors=1))) is False


def test_one_changed_byte_of_a_tensor_is_a_change() -> None:
    changed = bytearray(image())
    changed[3 * GRAIN - 1] = 1
    assert repeated(sealed(1, image()), sealed(2, bytes(changed))) is False


@pytest.mark.parametrize(
    "new",
    [
        sealed(2, image(), epoch=2),
        sealed(1, image()),
        replace(sealed(2, image()), job="other"),
        replace(sealed(2, image()), shard=1),
        sealed(2, image(), ((GRAIN, 3 * GRAIN),)),
        sealed(2, image(), ()),
    ],
    ids=["epoch", "same step", "job", "shard", "layout", "nothing to compare"],
)
def test_what_cannot_be_compared_says_nothing(new: Fingerprint) -> None:
    assert repeated(sealed(1, image()), new) is None


def test_too_short_a_tensor_is_not_compared() -> None:
    short: Ranges = ((GRAIN + 1, 2 * GRAIN + GRAIN - 1),)
    assert repeated(sealed(1, image(), short), sealed(2, image(), short)) is None


def test_repeats_are_counted_in_a_row_and_in_all() -> None:
    watch, seen = Repeats(), []
    for step, tensors in enumerate([0, 0, 0, 1, 1, 2]):
        watch.sealed(sealed(step, image(tensors=tensors)))
        seen.append((watch.in_a_row, watch.total))
    assert seen == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3), (0, 3)]


def test_what_cannot_be_compared_neither_begins_nor_ends_a_row() -> None:
    watch = Repeats()
    watch.sealed(sealed(0, image()))
    watch.sealed(sealed(1, image()))
    watch.sealed(sealed(2, image(), ((GRAIN, 3 * GRAIN),)))
    assert watch.in_a_row == 1


@pytest.mark.parametrize("another", ["epoch", "trainer"])
def test_another_life_begins_anew(another: str) -> None:
    watch = Repeats()
    watch.sealed(sealed(0, image()))
    watch.sealed(sealed(1, image()))
    if another == "trainer":
        watch.forget()
    watch.sealed(sealed(2, image(), epoch=2))
    assert (watch.in_a_row, watch.total) == (0, 1)


@pytest.mark.parametrize(
    "extents", [[(8, 4), (0, 4)], [(0, 9), (8, 4)], [(96, 8)]], ids=["order", "overlap", "end"]
)
def test_ranges_that_no_image_has_are_refused(extents: list[tuple[int, int]]) -> None:
    message = [StorageExtent(image_offset=start, bytes=count) for start, count in extents]
    with pytest.raises(RequestError, match="out of order or beyond"):
        ranges_from(message, 100)


def test_the_trainer_names_the_tensors_that_training_changes() -> None:
    class Loader:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"order": torch.rand(5000)}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 64)).sum().backward()
    optimizer.step()
    states = {"model": model, "optimizer": optimizer, "loader": Loader(), "seen": torch.arange(9e3)}
    captured = plan(
        "job", 0, 1, 1, {**states, "count": torch.arange(9000)}, {"x": torch.rand(5000)}
    )
    buffer = bytearray(captured.image_bytes)
    captured.write(memoryview(buffer))
    ranges = trained_ranges(captured.manifest, captured.image_bytes)
    assert ranges == sorted(ranges, key=lambda r: r.image_offset)
    inside = {
        tensor.name
        for tensor in captured.manifest.tensors
        for where in [captured.manifest.extents[tensor.extent].image_offset + tensor.extent_offset]
        if any(r.image_offset <= where < r.image_offset + r.bytes for r in ranges)
    }
    large = {"0.weight", "0.bias", "1.weight", "1.bias"}  # one range: neighbours in the image
    assert {f"model.{name}" for name in large} < inside
    assert "seen" in inside
    assert sum("exp_avg" in name for name in inside) >= 4
    assert not [
        n for n in inside if n.startswith(("loader", "count", "<", "optimizer.state.0.step"))
    ]

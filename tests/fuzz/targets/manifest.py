"""The trainer's side: the manifest of an image says anything, and live state is what it was."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import strategies as st

from snapshotd.wire.v1 import segment_pb2 as seg
from tests.fuzz.harness import Parts, Target
from tests.fuzz.messages import changed, messages, spoiled


@cache
def _image() -> tuple[bytes, int]:
    """A snapshot of a small model, and the length of its manifest."""
    from snapshotd_client import capture

    plan = capture.plan("job", 0, 1, 3, {"model": _model(1.0)}, {"loss": 0.5})
    image = bytearray(plan.image_bytes)
    with memoryview(image) as view:
        plan.write(view)
    return bytes(image), plan.manifest_bytes


def _model(value: float) -> Any:
    import torch

    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def manifest(parts: Parts) -> None:
    """It is restored right, or refused by name and nothing was changed."""
    import torch

    from snapshotd_client.apply import apply
    from snapshotd_client.errors import InexactRestore, SnapshotdClientError

    image, length = _image()
    for part in parts[:1]:
        # The bytes behind the manifest stay where the true manifest says that they are.
        data = part.ljust(length, b"\0")[:length] if len(part) <= length else part
        model = _model(2.0)
        try:
            apply(
                memoryview(data + image[length:] if len(data) == length else data + image),
                len(part),
                job="job",
                world=1,
                shard=0,
                states={"model": model},
                on_rng=False,
            )
        except InexactRestore:
            return  # found out afterwards, which is what the comparison is for
        except SnapshotdClientError:
            assert all(bool(torch.all(p == 2.0)) for p in model.parameters())


@st.composite
def _manifests(draw: Any) -> list[bytes]:
    image, length = _image()
    true = seg.Manifest.FromString(image[:length])
    made = draw(changed(st.just(true)) | changed(st.just(true)) | messages(seg.Manifest, 3))
    return [draw(spoiled(st.just(made.SerializeToString()), 1))]


TARGETS = [Target("manifest", _manifests(), manifest, 80)]

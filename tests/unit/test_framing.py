"""Chunks are packed and parsed by hand as protobuf would have done it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.rpc.framing import pack_reply, pack_request, parse_reply, parse_request
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import node_pb2 as pb

KINDS = [(pb.ReadReply, pack_reply, parse_reply), (pb.StoreRequest, pack_request, parse_request)]
LENGTHS = [0, 1, 127, 128, 129, (1 << 14) - 1, 1 << 14, TRANSFER_BYTES - 1, TRANSFER_BYTES]


@pytest.mark.parametrize(("kind", "pack", "parse"), KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_chunk(kind: Any, pack: Any, parse: Any, length: int) -> None:
    chunk = bytes(range(256)) * (length // 256) + bytes(length % 256)
    packed = pack(memoryview(chunk))
    assert packed == kind(chunk=chunk).SerializeToString()
    parsed = parse(packed)
    assert isinstance(parsed, memoryview)
    assert parsed == chunk


def said(kind: Any, data: bytes) -> Any:
    """What protobuf's own parser makes of it."""
    try:
        message = kind.FromString(data)
    except DecodeError:
        return None
    return message.chunk if message.WhichOneof("part") == "chunk" else message


def heard(parse: Any, data: bytes) -> Any:
    try:
        part = parse(data)
    except DecodeError:
        return None
    return bytes(part) if isinstance(part, memoryview) else part


#: The tags of both kinds' chunks, of other fields, lengths said shortly and at length, and bytes.
PIECES = st.sampled_from(
    [
        b"\x1a",
        b"\x12",
        b"\x0a",
        b"\x18",
        b"\x22",
        b"\x00",
        b"\x80",
        b"\x01",
        b"\x03abc",
        b"\x83\x00",
    ]
)


@given(st.lists(PIECES | st.binary(max_size=6), max_size=8).map(b"".join))
def test_any_bytes(data: bytes) -> None:
    for kind, _, parse in KINDS:
        assert heard(parse, data) == said(kind, data)


@pytest.mark.parametrize(("kind", "pack", "parse"), KINDS)
def test_other_ways_to_say_it(kind: Any, pack: Any, parse: Any) -> None:
    tag = bytes([kind.CHUNK_FIELD_NUMBER << 3 | 2])
    for data in (
        tag + b"\x83\x00abc",  # a length that takes more bytes than it needs
        tag + b"\x01x" + tag + b"\x03abc",  # said twice: the last one counts
        b"\x78\x01" + tag + b"\x03abc",  # behind a field that nobody knows
    ):
        assert heard(parse, data) == said(kind, data) == b"abc"

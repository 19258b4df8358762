"""Parts of block streams as bytes: a chunk stays the bytes it is, all else goes through protobuf.

protobuf copies a chunk whenever it makes, writes or reads the message around it. So the few bytes
before it are made and read here: what is sent is, byte for byte, what protobuf would have sent.
"""

from __future__ import annotations

from typing import Final, TypeVar

from snapshotd.wire.v1 import node_pb2 as pb

#: The gRPC service whose streams these are.
BLOCKS_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Blocks"].full_name

_LENGTH_DELIMITED: Final = 2
#: Of a length below 2^32, in groups of seven bits.
_MAX_LENGTH_BYTES: Final = 5

Message = TypeVar("Message", pb.ReadReply, pb.StoreRequest)


def pack_reply(part: pb.ReadReply | memoryview) -> bytes:
    """What a Read answers."""
    if isinstance(part, memoryview):
        return b"".join((chunk_head(pb.ReadReply, len(part)), part))
    return part.SerializeToString()


def pack_request(part: pb.StoreRequest | memoryview) -> bytes:
    """What a Store sends."""
    if isinstance(part, memoryview):
        return b"".join((chunk_head(pb.StoreRequest, len(part)), part))
    return part.SerializeToString()


def parse_reply(data: bytes) -> pb.ReadReply | memoryview:
    """The opposite of `pack_reply`. Raises DecodeError: it is no message."""
    return _parse(pb.ReadReply, data)


def parse_request(data: bytes) -> pb.StoreRequest | memoryview:
    """The opposite of `pack_request`. Raises DecodeError: it is no message."""
    return _parse(pb.StoreRequest, data)


def chunk_head(kind: type[pb.ReadReply | pb.StoreRequest], count_bytes: int) -> bytes:
    """What stands before the bytes of a chunk, in a message of `kind`: its tag and its length."""
    head = bytearray([_tag(kind)])
    while count_bytes > 0x7F:
        head.append(count_bytes & 0x7F | 0x80)
        count_bytes >>= 7
    head.append(count_bytes)
    return bytes(head)


def _tag(kind: type[pb.ReadReply | pb.StoreRequest]) -> int:
    return kind.CHUNK_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


def _parse(kind: type[Message], data: bytes) -> Message | memoryview:
    start = _chunk_start(data, _tag(kind))
    if start:
        return memoryview(data)[start:]
    message = kind.FromString(data)
    if message.WhichOneof("part") == "chunk":  # said in another way than ours, and as valid
        return memoryview(message.chunk)
    return message


def _chunk_start(data: bytes, tag: int) -> int:
    """Where the bytes of a chunk begin that is all of the message; 0 where it is not."""
    if not data or data[0] != tag:
        return 0
    length = 0
    for index, byte in enumerate(data[1 : 1 + _MAX_LENGTH_BYTES]):
        length |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            start = index + 2
            return start if start + length == len(data) else 0
    return 0

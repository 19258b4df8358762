"""Messages of any kind, made from their descriptors; and bytes that are nearly messages."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

F = FieldDescriptor

#: Names that mean something to somebody: of jobs, nodes, files, sockets.
NAMES = [
    *("job", "job", "n0", "n1", "n2", "i0", "i1", "test", "data-0.seg", "127.0.0.1:1"),
    *("", ".", "..", "../../etc/passwd", "/dev/zero", "a\nb", "\0", "x" * 300, "\N{SNOWMAN}" * 90),
    *("unix:/tmp/x", "[::1]:99999", "dns:///x:1"),
]
DIGESTS = [b"A" * 16, b"B" * 16]
SMALL = [0, 0, 1, 1, 2, 3, 4, 5]
BITS_32 = [*SMALL, 63, 64, 255, 256, 2**31 - 1, 2**31, 2**32 - 1]
BITS_64 = [*SMALL, 4096, 9000, 1 << 20, 1 << 48, (1 << 48) + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
SIGNED = [*SMALL, -1, -(2**63), 2**63 - 1, 4096]
REALS = [0.0, 1.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan")]

_PLAIN = {
    F.TYPE_STRING: st.sampled_from(NAMES),
    F.TYPE_BYTES: st.sampled_from([*DIGESTS, b"", b"x", bytes(4096), bytes(9000)]),
    F.TYPE_UINT32: st.sampled_from(BITS_32),
    F.TYPE_UINT64: st.sampled_from(BITS_64),
    F.TYPE_INT64: st.sampled_from(SIGNED),
    F.TYPE_DOUBLE: st.sampled_from(REALS),
    F.TYPE_BOOL: st.booleans(),
    F.TYPE_ENUM: st.sampled_from([0, 1, 2, 3, 4, 1000]),
}
_COUNTS = st.sampled_from([0, 1, 1, 2, 3])


@st.composite
def messages(draw: Any, kind: type[Message], depth: int = 5) -> Message:
    """A message of a kind: any of its fields set, deeper ones less often."""
    made = kind()
    _fill(draw, made, depth)
    return made


@st.composite
def changed(draw: Any, whole: st.SearchStrategy[Message]) -> Message:
    """A message that made sense, with some of its fields set to anything."""
    given = draw(whole)
    made = type(given)()
    made.CopyFrom(given)
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        _spoil(draw, made)
    return made


@st.composite
def spoiled(draw: Any, whole: st.SearchStrategy[bytes], at_most: int = 2) -> bytes:
    """Bytes with some of them flipped, cut off, doubled or put in between; most often none."""
    data = draw(whole)
    for _ in range(draw(st.sampled_from([0, 0, 0, *range(at_most + 1)]))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "double", "drop"]))
        if how == "flip" and data:
            bit = draw(st.integers(0, 7))
            data = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
        elif how == "insert":
            data = data[:at] + draw(st.binary(max_size=20)) + data[at:]
        elif how == "double":
            data = data[:at] + data[at:] * 2
        elif how == "drop":
            data = data[:at] + data[at + draw(st.integers(1, 9)) :]
    return data


def wire(whole: st.SearchStrategy[Message]) -> st.SearchStrategy[bytes]:
    """Messages as bytes, some of them spoiled."""
    return spoiled(changed(whole).map(lambda m: m.SerializeToString(deterministic=True)))


def _spoil(draw: Any, made: Message) -> None:
    """Set one field somewhere in the message to anything."""
    here = made
    while True:
        inner = [
            value
            for field, value in here.ListFields()
            if field.type == F.TYPE_MESSAGE and not _is_map(field)
        ]
        nested = [m for v in inner for m in ([v] if isinstance(v, Message) else list(v))]
        if not nested or draw(st.booleans()):
            break
        here = draw(st.sampled_from(nested))
    fields = here.DESCRIPTOR.fields
    if fields:
        field = draw(st.sampled_from(list(fields)))
        here.ClearField(field.name)
        if draw(st.booleans()):
            _set(draw, here, field, 2)


def _fill(draw: Any, made: Message, depth: int) -> None:
    descriptor: Descriptor = made.DESCRIPTOR
    for field in descriptor.fields:
        if field.containing_oneof is None and draw(st.booleans()):
            _set(draw, made, field, depth)
    for oneof in descriptor.oneofs:
        chosen = draw(st.sampled_from([None, *oneof.fields]))
        if chosen is not None:
            _set(draw, made, chosen, depth)


def _set(draw: Any, made: Message, field: FieldDescriptor, depth: int) -> None:
    if _is_map(field):
        for _ in range(draw(_COUNTS)):
            getattr(made, field.name)[draw(st.sampled_from(NAMES))] = draw(st.sampled_from(NAMES))
    elif field.type == F.TYPE_MESSAGE:
        if depth <= 0:
            return
        target = getattr(made, field.name)
        if _is_repeated(field):
            for _ in range(draw(_COUNTS)):
                _fill(draw, target.add(), depth - 1)
        else:
            target.SetInParent()
            _fill(draw, target, depth - 1)
    elif _is_repeated(field):
        values = [draw(_PLAIN[field.type]) for _ in range(draw(_COUNTS))]
        getattr(made, field.name).extend(values)
    else:
        setattr(made, field.name, draw(_PLAIN[field.type]))


def _is_map(field: FieldDescriptor) -> bool:
    return field.type == F.TYPE_MESSAGE and field.message_type.GetOptions().map_entry


def _is_repeated(field: FieldDescriptor) -> bool:
    known = getattr(field, "is_repeated", None)  # newer runtimes warn of `label`
    return field.label == F.LABEL_REPEATED if known is None else bool(known)

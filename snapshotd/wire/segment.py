"""The header page of a segment file: how a SegmentHeader is framed, checksummed and recognised.

::

    0        8          12            16           24
    | magic  | format   | body length | xxh3-64 of | body: a SegmentHeader | zeros to the end |
    |        | (u32 le) | (u32 le)    | the body   |                       | of the page      |

The page is encoded whole, so that one pwrite replaces it whole and a writer killed at any moment
leaves the older header or the newer one. No file is touched here.
"""

from __future__ import annotations

import struct
from typing import Final

import xxhash
from google.protobuf.message import DecodeError

from snapshotd.wire.protocol import HEADER_BYTES, SEGMENT_FORMAT
from snapshotd.wire.v1.segment_pb2 import SegmentHeader

MAGIC: Final = b"SNAPSEG\0"

_PREFIX: Final = struct.Struct("<8sIIQ")
_MAX_BODY_BYTES: Final = HEADER_BYTES - _PREFIX.size


class SegmentFormatError(ValueError):
    """A page that is not a header this version wrote, or is one that was changed since."""


def encode_header(header: SegmentHeader) -> bytes:
    """The header page, HEADER_BYTES long.

    Raises:
        ValueError: the header does not fit in its page, which only absurdly long names can bring.
    """
    body = header.SerializeToString(deterministic=True)
    if len(body) > _MAX_BODY_BYTES:
        raise ValueError(
            f"segment header of {len(body)} bytes does not fit in {_MAX_BODY_BYTES}: "
            f"job name has {len(header.job)} characters, cluster id {len(header.cluster_id)}; "
            "shorten them"
        )
    prefix = _PREFIX.pack(MAGIC, SEGMENT_FORMAT, len(body), xxhash.xxh3_64_intdigest(body))
    return (prefix + body).ljust(HEADER_BYTES, b"\0")


def decode_header(page: bytes) -> SegmentHeader:
    """The header that stands in `page`, the first HEADER_BYTES of a file.

    Raises:
        SegmentFormatError: what is wrong with the page: cut short, not a segment's, of another
            format version, or damaged.
    """
    if len(page) != HEADER_BYTES:
        raise SegmentFormatError(
            f"header page is {len(page)} bytes, {HEADER_BYTES} expected: the file is cut short"
        )
    magic, version, length, checksum = _PREFIX.unpack_from(page)
    if magic != MAGIC:
        raise SegmentFormatError(f"not a segment file: starts with {magic!r}, not {MAGIC!r}")
    if version != SEGMENT_FORMAT:
        raise SegmentFormatError(
            f"segment format {version}, this program reads format {SEGMENT_FORMAT}"
        )
    if length > _MAX_BODY_BYTES:
        raise SegmentFormatError(
            f"damaged header: length {length} is beyond the page's {_MAX_BODY_BYTES}"
        )
    body = page[_PREFIX.size : _PREFIX.size + length]
    return _decode_body(body, page[_PREFIX.size + length :], checksum)


def _decode_body(body: bytes, padding: bytes, checksum: int) -> SegmentHeader:
    found = xxhash.xxh3_64_intdigest(body)
    if found != checksum:
        raise SegmentFormatError(
            f"damaged header: checksum {found:016x}, {checksum:016x} was written"
        )
    if padding.count(0) != len(padding):
        raise SegmentFormatError("damaged header: bytes behind the header are not zero")
    try:
        return SegmentHeader.FromString(body)
    except DecodeError as error:
        raise SegmentFormatError(f"damaged header: {error}") from error

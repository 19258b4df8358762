"""Writes the tensors of a state as one safetensors file, tensor by tensor, in bounded memory.

The format: eight bytes of length, a header in JSON, and the tensors one behind the other. See
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Final

import torch

from snapshotd_client.errors import UnsupportedState
from snapshotd_client.export.state import State, Tensor

FILE: Final = "state.safetensors"

_LENGTH_BYTES: Final = 8
#: The tensors begin at a multiple of it.
_ALIGNMENT_BYTES: Final = 64

_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(state: State, directory: Path, progress: Callable[[int], None]) -> None:
    """Write `state.safetensors`. What is no tensor goes into its metadata where JSON can hold it.

    Raises:
        UnsupportedState: a dtype that the format does not know.
    """
    # Wide elements first: then each tensor begins at a multiple of its own element.
    tensors = sorted(state.tensors, key=lambda t: -t.dtype.itemsize)
    header = _header(state, tensors)
    start = _LENGTH_BYTES + len(header)
    descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        length = start + sum(map(_bytes, tensors))
        os.posix_fallocate(descriptor, 0, length)
        with mmap.mmap(descriptor, length) as mapping:
            mapping[:start] = len(header).to_bytes(_LENGTH_BYTES, "little") + header
            at = start
            for tensor in tensors:
                _put(tensor, mapping, at)
                at += _bytes(tensor)
                progress(_bytes(tensor))
            mapping.flush()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(tensor: Tensor, mapping: mmap.mmap, at: int) -> None:
    if not _bytes(tensor):
        return
    count = prod(tensor.shape)
    whole = torch.frombuffer(mapping, dtype=tensor.dtype, count=count, offset=at)
    tensor.put(whole.view(tensor.shape))


def _bytes(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _header(state: State, tensors: Sequence[Tensor]) -> bytes:
    objects, left_out = {}, []
    for thing in state.things:
        try:
            objects[thing.name] = json.loads(json.dumps(thing.value))
        except (TypeError, ValueError):
            left_out.append(thing.name)
    told = {
        "job": state.job,
        "step": str(state.step),
        "world": str(state.world),
        "objects": json.dumps(objects),
        "left_out": json.dumps(left_out),
    }
    header: dict[str, object] = {"__metadata__": told}
    at = 0
    for tensor in tensors:
        name = _NAMES.get(tensor.dtype)
        if name is None:
            raise UnsupportedState(
                f"safetensors has no {tensor.dtype}, which {tensor.name} is of",
                "Export it with --format dcp",
            )
        end = at + _bytes(tensor)
        header[tensor.name] = {"dtype": name, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    room = -(-(_LENGTH_BYTES + len(text)) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return text.ljust(room - _LENGTH_BYTES)

"""Writes a state as a checkpoint of torch.distributed.checkpoint, by its own writer."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from snapshotd_client.export.state import Piece, State, Tensor

#: Gives what an item writes, when it is written.
_Source = Callable[[], torch.Tensor | io.BytesIO]
#: Told of bytes that are about to be written.
Progress = Callable[[int], None]


class _Planner(DefaultSavePlanner):
    """Knows where each item's bytes are; the plan itself is made here."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.sources: dict[MetadataIndex, _Source] = {}
        self._progress = progress

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = self.sources[write_item.index]()
        if isinstance(data, torch.Tensor):
            self._progress(data.nbytes)
        return data


def write(state: State, directory: Path, progress: Progress) -> None:
    """Write into an empty directory; one file for each shard that anything comes from."""
    planner = _Planner(progress)
    items: dict[int, list[WriteItem]] = defaultdict(list)
    described: dict[str, STORAGE_TYPES] = {}
    for tensor in state.tensors:
        properties = TensorProperties(dtype=tensor.dtype)
        chunks: list[ChunkStorageMetadata] = []
        for piece in tensor.pieces:
            chunk = ChunkStorageMetadata(torch.Size(piece.box.offset), torch.Size(piece.box.shape))
            index = MetadataIndex(tensor.name, chunk.offsets, len(chunks))
            data = TensorWriteData(chunk, properties, torch.Size(tensor.shape))
            kind = _type(tensor, piece)
            items[piece.shard].append(WriteItem(index, kind, tensor_data=data))
            planner.sources[index] = piece.load
            chunks.append(chunk)
        described[tensor.name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    for thing in state.things:
        index = MetadataIndex(thing.name)
        items[thing.shard].append(WriteItem(index, WriteItemType.BYTE_IO))
        planner.sources[index] = lambda value=thing.value: _saved(value)  # type: ignore[misc]
        described[thing.name] = BytesStorageMetadata()
    paths = {t.name: t.path for t in state.tensors} | {t.name: t.path for t in state.things}
    _carry_out(directory, planner, items, Metadata(described, planner_data=paths))


def _carry_out(
    directory: Path, planner: _Planner, items: dict[int, list[WriteItem]], metadata: Metadata
) -> None:
    writer = FileSystemWriter(directory, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = [SavePlan(items.get(shard, [])) for shard in range(max(items, default=0) + 1)]
    ready = writer.prepare_global_plan([writer.prepare_local_plan(p) for p in plans])
    results: list[list[WriteResult]] = [
        writer.write_data(plan, planner).wait() for plan in ready if plan.items
    ]
    writer.finish(metadata, results)


def _type(tensor: Tensor, piece: Piece) -> WriteItemType:
    return WriteItemType.TENSOR if piece.box.shape == tensor.shape else WriteItemType.SHARD


def _saved(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream

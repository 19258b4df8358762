"""Storage of torch.distributed.checkpoint in the daemons' memory.

from snapshotd_client.dcp import SnapshotStorageReader, SnapshotStorageWriter
"""

from snapshotd_client.dcp.reader import SnapshotStorageReader
from snapshotd_client.dcp.writer import SnapshotStorageWriter

__all__ = ["SnapshotStorageReader", "SnapshotStorageWriter"]

"""Bytes in motion: gRPC between nodes, ZeroMQ to trainers. The only room that imports grpc."""

import os

# Read when grpc is imported. Its own lines are in no format of ours, and that a peer went away is
# told by the daemon's log as well.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

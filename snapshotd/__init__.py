"""snapshotd keeps a PyTorch job's newest training state safe in memory. This is the daemon."""

__version__ = "0.1.0"

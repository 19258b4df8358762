"""The trainer side of snapshotd."""

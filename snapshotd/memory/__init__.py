"""Bytes at rest: segments, the arena of a slot, the budget of a node."""

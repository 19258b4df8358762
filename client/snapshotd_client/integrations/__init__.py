"""Snapshotter within trainers that own the loop; each module imports its framework, none else does.

See docs/trainers.md.
"""

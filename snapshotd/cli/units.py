"""Numbers as people read them."""

from __future__ import annotations


def in_bytes(count: int) -> str:
    """`count` bytes in the largest binary unit that keeps a digit before the point."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

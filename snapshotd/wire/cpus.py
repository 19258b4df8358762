"""Processors by number, as a configuration and a message name them."""

from __future__ import annotations

from typing import Final

#: What `background.cpus` may say instead of a list.
AUTO: Final = "auto"
ALL: Final = "all"

#: Far beyond any machine; what the list of a config or a message may name.
MAX_CPUS: Final = 16384


def parse_cpus(text: str) -> frozenset[int]:
    """The processors of a list as the kernel writes it: "0-3,8".

    Raises:
        ValueError: it is no such list; says which part.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{part.strip()!r} is neither a processor nor a range of them")
        begin, end = int(first), int(last or first)
        if not begin <= end < MAX_CPUS:
            raise ValueError(f"{part.strip()!r} does not rise, or goes beyond {MAX_CPUS - 1}")
        found.update(range(begin, end + 1))
    return frozenset(found)

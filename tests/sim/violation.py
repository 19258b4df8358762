"""What the simulator says when a promise is broken."""

from __future__ import annotations


class Violation(AssertionError):
    """A law was broken; `law` names it, so that a shrunk run can be told to break the same one."""

    def __init__(self, law: str, what: str) -> None:
        super().__init__(f"{law}: {what}")
        self.law = law


def must(holds: object, law: str, what: str) -> None:
    """Raise Violation unless it holds."""
    if not holds:
        raise Violation(law, what)

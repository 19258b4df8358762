"""How a log record looks: one line of text for people, one line of JSON for collectors.

A record carries facts beside its message, given as `extra={"job": ..., "step": ...}`; which ones
is fixed in `FACTS`, so that a collector can rely on their names.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

#: Names of the facts a record may carry, in the order they are written.
FACTS: Final = ("node", "slot", "job", "step", "epoch")


def configure(
    level: Literal["debug", "info", "warning", "error"],
    log_format: Literal["text", "json"],
    node: str,
    stream: TextIO | None = None,
) -> None:
    """Send every record of this process to `stream`, in one format, stamped with the node.

    Called once, by the program's entry; a second call replaces the first.

    Args:
        level: least severe record that is written.
        log_format: text or json.
        node: this node's id.
        stream: standard error where none is given; the service manager collects that.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(_Stamp(node))
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)
    # A trace for each message it cannot parse; who sent what is said by us, once.
    logging.getLogger("grpc._common").setLevel(logging.CRITICAL)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO snapshotd.flow.protect: message [node=n0 job=gpt]`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{name}={value}" for name, value in _facts(record))
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}"
        line = f"{line} [{facts}]" if facts else line
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the facts, an error's trace."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_facts(record)),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


#: Subjects that are remembered; strangers may invent any number of them.
MAX_SUBJECTS: Final = 1024


class ChangeLog:
    """Logs what is said of a subject when it changes, and not each time it is said again."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._last: dict[str, str] = {}

    def note(self, subject: str, reason: str, level: int = logging.INFO, **facts: object) -> bool:
        """Log `reason` unless it is what was last said of `subject`.

        Args:
            subject: what it is about, such as "shard 3 of gpt".
            reason: what is true of it now; empty for "nothing any more", which is remembered and
                not logged.
            level: severity, of the logging module.
            facts: any of FACTS, to go with the record.

        Returns:
            Whether it changed.
        """
        if self._last.get(subject, "") == reason:
            return False
        if reason:
            self._last.pop(subject, None)
            self._last[subject] = reason
            if len(self._last) > MAX_SUBJECTS:
                del self._last[next(iter(self._last))]
            self._logger.log(level, "%s: %s", subject, reason, extra=facts)
        else:
            del self._last[subject]
        return True

    def forget(self, subject: str) -> None:
        """Drop a subject that exists no more, so that memory follows what is there."""
        self._last.pop(subject, None)


class _Stamp(logging.Filter):
    """Gives a record the node's id where it carries none."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "node"):
            record.node = self._node
        return True


def _facts(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    for name in FACTS:
        value = getattr(record, name, None)
        if value is not None:
            yield name, value


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

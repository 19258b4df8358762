"""What an operator may set, and how a value finds its way in."""

from snapshotd.config.load import LoadedConfig, load
from snapshotd.config.model import Config, LogFormat, LogLevel, Protection, Timeouts
from snapshotd.config.sources import Origin

__all__ = [
    "Config",
    "LoadedConfig",
    "LogFormat",
    "LogLevel",
    "Origin",
    "Protection",
    "Timeouts",
    "load",
]

"""What an operator may set, and how a value finds its way in."""

from snapshotd.config.load import LoadedConfig, load
from snapshotd.config.model import CodecName, Config, LogFormat, LogLevel, Protection, Timeouts, Tls
from snapshotd.config.sources import Origin

__all__ = [
    "CodecName",
    "Config",
    "LoadedConfig",
    "LogFormat",
    "LogLevel",
    "Origin",
    "Protection",
    "Timeouts",
    "Tls",
    "load",
]

"""What an operator may set, and how a value finds its way in."""

from snapshotd.config.kinds import CodecName, LogFormat, LogLevel, PlaneName
from snapshotd.config.load import LoadedConfig, load
from snapshotd.config.model import Config
from snapshotd.config.sections import Protection, Timeouts, Tls
from snapshotd.config.sources import Origin

__all__ = [
    "CodecName",
    "Config",
    "LoadedConfig",
    "LogFormat",
    "LogLevel",
    "Origin",
    "PlaneName",
    "Protection",
    "Timeouts",
    "Tls",
    "load",
]

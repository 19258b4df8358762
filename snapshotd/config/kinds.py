"""Of which kinds values of the configuration are, and what a section of it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, StringConstraints
from pydantic_core import PydanticCustomError

from snapshotd.wire.address import EXPECTED, BadAddress, check_address

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
CodecName = Literal["auto", "isal", "zfec"]
PlaneName = Literal["sockets", "grpc"]


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        expected = "an absolute path: a daemon has no working directory"
        raise PydanticCustomError("path", "it is a relative path", {"expected": expected})
    return path


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


def _address(text: str) -> str:
    try:
        return check_address(text)
    except BadAddress as error:
        facts = {"why": str(error), "expected": EXPECTED}
        raise PydanticCustomError("address", "{why}", facts) from error


Address = Annotated[str, AfterValidator(_address)]
# Paths come as text from every source; strictness would ask for pathlib objects.
File = Annotated[Path, Strict(strict=False), AfterValidator(_absolute)]
Directory = Annotated[Path, Strict(strict=False), AfterValidator(_absolute)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen, without unknown keys, without silent conversions; defaults obey the rules too."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

"""Which implementation of the code runs: the fastest that proves to be zfec's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from snapshotd.coding.codec import Codec, ZfecCodec
from snapshotd.coding.isal import IsalCodec, libraries
from snapshotd.coding.known_answers import known_answer_test
from snapshotd.errors import ConfigError, SnapshotdError

if TYPE_CHECKING:
    from snapshotd.config import CodecName

_REMEDY: Final = "install pyeclib (pip) or libisal2 (the system's packages)"


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec that passed the known-answer test.

    Attributes:
        codec: what computes the code in this process.
        note: what had to be passed over for it, and why; empty where nothing had to be.
    """

    codec: Codec
    note: str = ""


def choose_codec(wanted: CodecName = "auto") -> Choice:
    """Load and prove an implementation.

    Args:
        wanted: "isal" or "zfec" and no other, or "auto" for the best there is.

    Raises:
        ConfigError: ISA-L alone is wanted, and cannot be used. SnapshotdError: zfec is broken.
    """
    refused = []
    for path, origin in libraries() if wanted != "zfec" else ():
        try:
            codec = IsalCodec(path, origin)
            known_answer_test(codec)
        except (OSError, AttributeError, SnapshotdError) as error:
            refused.append(str(error))
        else:
            passed = f"the code is computed by {codec.name}: {'; '.join(refused)}"
            return Choice(codec, passed if refused else "")
    why = "; ".join(refused)
    if wanted == "isal":
        raise ConfigError(
            f"protection.coding = 'isal', but the code cannot be computed by ISA-L: {why}",
            f"{_REMEDY.capitalize()}, or set protection.coding to auto or zfec",
        )
    reference = ZfecCodec()
    known_answer_test(reference)
    if wanted == "zfec":
        return Choice(reference)
    note = (
        f"the code is computed by {reference.name}, at a tenth of ISA-L's speed: {why}; {_REMEDY}"
    )
    return Choice(reference, note)

"""Generate snapshotd/wire/v1 from proto/, or check that what is committed is what proto/ says.

Runs in the environment that has grpcio-tools: `make proto`, `make proto-check`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parent.parent
_PACKAGE: Final = Path("snapshotd/wire/v1")
#: Messages only; `_SERVICES` have stubs too.
_MESSAGES: Final = ("segment", "trainer")
_SERVICES: Final = ("node",)


def generate(target: Path) -> list[Path]:
    """Generate below `target`; returns the files, relative to it."""
    outputs = [f"--python_out={target}", f"--pyi_out={target}"]
    _protoc(*outputs, *_sources(_MESSAGES + _SERVICES))
    _protoc(f"--grpc_python_out={target}", *_sources(_SERVICES))
    return sorted(path.relative_to(target) for path in (target / _PACKAGE).iterdir())


def write() -> str:
    """Replace the committed code. Returns nothing that is wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in generate(Path(scratch)):
            shutil.copyfile(Path(scratch, path), _ROOT / path)
    return ""


def check() -> str:
    """What is wrong with the committed code; empty where nothing is."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = {path: Path(scratch, path).read_bytes() for path in generate(Path(scratch))}
    committed = {
        path.relative_to(_ROOT): path.read_bytes()
        for path in (_ROOT / _PACKAGE).glob("*_pb2*")
        if path.is_file()
    }
    stale = sorted(
        str(path)
        for path in wanted.keys() | committed.keys()
        if wanted.get(path) != committed.get(path)
    )
    if not stale:
        return ""
    return f"not what proto/ says: {', '.join(stale)}; run `make proto` and commit the result"


def _sources(names: tuple[str, ...]) -> list[str]:
    return [str(_PACKAGE / f"{name}.proto") for name in names]


def _protoc(*arguments: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=proto", *arguments]
    subprocess.run(command, cwd=_ROOT, check=True)


if __name__ == "__main__":
    actions = {"write": write, "check": check}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        sys.exit(f"usage: {sys.argv[0]} {{{'|'.join(actions)}}}")
    sys.exit(actions[sys.argv[1]]() or 0)

"""Stop with a clear message where this interpreter is too old to build the project."""

import sys

OLDEST = (3, 11)

if sys.version_info < OLDEST:
    found, needed = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST))
    sys.exit(
        f"{sys.executable} is Python {found}; snapshotd needs {needed} or newer. "
        f"Name another: make PYTHON=python{needed} ..."
    )

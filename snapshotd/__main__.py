"""`python -m snapshotd`: the same as the command `snapshotd`."""

import sys

from snapshotd.cli import main

sys.exit(main())

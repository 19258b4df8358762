"""peerbench's trainer, computing on one core: what else runs in its process has the others."""

from __future__ import annotations

import os
import sys

os.cpu_count = lambda: 1  # what it takes for its number of threads

import plain_trainer  # noqa: E402  # which is peerbench's, under another name

if __name__ == "__main__":
    plain_trainer.zygote() if sys.argv[1] == "--zygote" else plain_trainer.main(sys.argv[1:])

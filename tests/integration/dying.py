"""Runs a script that SIGKILLs itself in the middle of an optimizer step: `DIE_AT_STEP`, from 1.

`python -m tests.integration.dying SCRIPT ARGS...`; under torchrun rank 0 of the first start dies.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook


def die_at(step: int) -> None:
    """After the gradients of that step of this process, before its update."""
    left = iter(range(step - 1, -1, -1))

    def hook(*_: object) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(hook)


if __name__ == "__main__":
    step = os.environ.get("DIE_AT_STEP")
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if step and first and os.environ.get("RANK", "0") == "0":
        die_at(int(step))
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")

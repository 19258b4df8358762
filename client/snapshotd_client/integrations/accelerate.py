"""Accelerate: the two loops of a training, entered where the newest snapshot stands.

A snapshot is taken after a batch is drawn and before it is trained on: then all that follows an
optimizer step in the caller's loop is done, the end of an epoch too.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher

from snapshotd_client.errors import UnsupportedState, WrongUse
from snapshotd_client.integrations.draws import Draws
from snapshotd_client.integrations.guard import Guard
from snapshotd_client.integrations.objects import bare_module, bare_optimizer, named
from snapshotd_client.results import Restored


class AcceleratorSnapshots:
    """Protects everything that an Accelerator has prepared, and what is registered with it.

    ::

        with AcceleratorSnapshots(accelerator, loader) as snapshots:
            for epoch in snapshots.epochs(3):
                for batch in snapshots.batches():
                    ...

    Args:
        accelerator: after `prepare`, and `register_for_checkpointing` if any.
        loader: the prepared DataLoader of the training.
        interval_steps: snapshot every that many optimizer steps.
        options: as Snapshotter takes them (`job`, `run_dir`, `required`, `overlap`, ...).

    Attributes:
        steps: optimizer steps so far, those before a restart included.
        restored: what came back, once `restore` or `epochs` was called; None on a first start.
        snapshotter: for `status()` and `wait_protected()`.

    Raises:
        UnsupportedState: something was prepared that cannot be resumed exactly; names it.
    """

    def __init__(
        self, accelerator: Accelerator, loader: Any, *, interval_steps: int = 1, **options: Any
    ) -> None:
        if isinstance(loader, DataLoaderDispatcher):
            raise UnsupportedState(
                "one rank draws the batches of all (dispatch_batches)",
                "Say DataLoaderConfiguration(dispatch_batches=False), so that each draws its own.",
            )
        if not any(loader is prepared for prepared in accelerator._dataloaders):
            raise WrongUse(
                "the loader was not prepared by this Accelerator",
                "Give what accelerator.prepare(...) returned for it.",
            )
        self._accelerator = accelerator
        self._loader = loader
        self._draws = Draws(loader.base_dataloader)
        self._epoch = 0
        self._used = 0
        self._at_boundary = False
        self._resuming = False
        self._asked = False
        self._saved_draws: Any = None
        self._saved_accelerator_step = 0
        self.steps = 0
        self.restored: Restored | None = None
        self._guard = Guard(_states(accelerator, self), interval_steps, options)
        self.snapshotter = self._guard.snapshotter

    def restore(self) -> Restored | None:
        """Bring back the newest step; `epochs` does it where it was not done."""
        self._asked = True
        self.restored = self._guard.restore()
        if self.restored is not None:
            self._resuming = True
            self._guard.begin_at(self.steps)
        return self.restored

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs left to train, of `total`; after the last one, the last snapshot."""
        if not self._asked:
            self.restore()
        while self._epoch < total:
            yield self._epoch
            if self._resuming:
                raise WrongUse(
                    f"epoch {self._epoch} was not trained by batches()",
                    "Draw the batches of each epoch from batches().",
                )
            self._epoch, self._used = self._epoch + 1, 0
        self._snapshot()

    def batches(self) -> Iterator[Any]:
        """The batches of this epoch that are not trained on yet."""
        if self._resuming:
            self._draws.resume(self._saved_draws, skip=True)
        self._loader.set_epoch(self._epoch)
        for batch in self._loader:
            self._draws.used(self._used)
            if self._resuming:
                self._guard.put_back_generators()
                self._accelerator.step = self._saved_accelerator_step
                self._resuming = False
            else:
                self._snapshot()
            try:
                yield batch
            finally:  # where the caller leaves the loop, too
                self._used += 1
                self._at_boundary = self._accelerator.sync_gradients
                self.steps += self._at_boundary

    def _snapshot(self) -> None:
        if self._at_boundary:
            self._guard.step(self.steps)

    # -- as a state of Snapshotter

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "steps": self.steps,
            "accelerator_step": self._accelerator.step,
            "draws": self._draws.state(self._used),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._epoch, self.steps = saved["epoch"], saved["steps"]
        self._saved_draws = saved["draws"]
        self._used = saved["draws"]["used"]
        self._saved_accelerator_step = saved["accelerator_step"]

    # -- the end

    def close(self) -> None:
        """Leave the daemon; what it holds stays."""
        self.snapshotter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _states(accelerator: Accelerator, loop: AcceleratorSnapshots) -> dict[str, object]:
    if str(accelerator.distributed_type).endswith(("DEEPSPEED", "MEGATRON_LM", "XLA")):
        raise UnsupportedState(
            f"this Accelerator trains by {accelerator.distributed_type}",
            "See docs/trainers.md for what is supported.",
        )
    states = {
        **named("model", [bare_module(m) for m in accelerator._models]),
        **named("optimizer", [bare_optimizer(o) for o in accelerator._optimizers]),
        **named("scheduler", accelerator._schedulers),
        **named("custom", accelerator._custom_objects),
        "loop": loop,
    }
    if accelerator.scaler is not None:
        states["scaler"] = accelerator.scaler
    return states

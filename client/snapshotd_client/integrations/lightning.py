"""Lightning: a callback that snapshots at step boundaries and resumes in the middle.

A snapshot is taken when the next batch begins: then all that belongs to the step before it is done
(validation, checkpoints, the end of an epoch), and the batch is drawn. A restored run is led to the
very same point, where everything that the way there may have moved is put back again.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops import _Loop as LightningLoop

from snapshotd_client.errors import UnsupportedState, WrongUse
from snapshotd_client.integrations.draws import Draws, DrawsState
from snapshotd_client.integrations.guard import Guard
from snapshotd_client.integrations.objects import bare_module, bare_optimizer, named
from snapshotd_client.results import Restored
from snapshotd_client.snapshotter import Snapshotter


class SnapshotCallback(Callback):
    """Protects one fit: ``Trainer(callbacks=[SnapshotCallback()])``.

    Args:
        interval_steps: snapshot every that many optimizer steps.
        options: as Snapshotter takes them (`job`, `run_dir`, `required`, `overlap`, ...).

    Attributes:
        restored: what came back, once fitting has begun; None on a job's first start. Its step is
            the Trainer's `global_step`.
        snapshotter: for `status()` and `wait_protected()`, while it trains.

    Raises, as fitting begins:
        UnsupportedState: a setting of the Trainer makes exact resumption impossible; names it.
        WrongUse: a checkpoint that is newer than the snapshot; a second fit.
    """

    def __init__(self, *, interval_steps: int = 1, **options: Any) -> None:
        self._interval_steps = interval_steps
        self._options = options
        self._loop: _Loop | None = None
        self._saved: dict[str, Any] | None = None  # until the restored point is reached
        self._guard: Guard | None = None
        self.restored: Restored | None = None
        self.snapshotter: Snapshotter | None = None

    # -- the Trainer's events

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loop is not None:
            raise WrongUse(
                "this SnapshotCallback has been through a fit already",
                "Add a new one for each fit(), with a job name of its own.",
            )
        _refuse(trainer)
        self._loop = loop = _Loop(trainer, pl_module)
        states = _states(trainer, pl_module, loop)
        self._guard = Guard(states, self._interval_steps, self._options)
        self.snapshotter = self._guard.snapshotter
        self.restored = self._guard.restore()
        if self.restored is not None:
            _put_aside_checkpoint(trainer, self.restored.step)
            self._saved = loop.restored
            self._guard.begin_at(self.restored.step)
            loop.enter()
        # Before the others, so that what they do as a batch begins is done after, in both lives.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]
        self._follow_loader(trainer, loop)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loop, guard = self._here()
        loop.batch_begins(batch_idx)
        if self._saved is not None:
            loop.put_back(self._saved)
            guard.put_back_generators()
            self._saved = None
        guard.step(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, guard = self._here()
        loop.used = 0
        guard.step(trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved is not None:  # the job was done: no batch has begun
            self._here()[1].put_back_generators()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.snapshotter is not None:
            self.snapshotter.close()
            vars(trainer.strategy).pop("process_dataloader", None)

    # -- the way there

    def _follow_loader(self, trainer: Trainer, loop: _Loop) -> None:
        """Follow the training DataLoader from before its first iteration on."""
        strategy = trainer.strategy
        process = type(strategy).process_dataloader

        def processed(loader: Any) -> Any:
            loader = process(strategy, loader)
            if trainer.training:
                loop.follow(loader, self._saved)
            return loader

        strategy.process_dataloader = processed

    def _here(self) -> tuple[_Loop, Guard]:
        assert self._loop is not None, "fitting has begun"
        assert self._guard is not None
        return self._loop, self._guard


class _Loop:
    """The Trainer's own place in its loops, and what its callbacks keep, as a state of Snapshotter.

    Attributes:
        used: batches of this epoch that are trained on.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._draws: Draws | None = None
        self.restored: dict[str, Any] | None = None
        self.used = 0

    def follow(self, loader: Any, saved: dict[str, Any] | None) -> None:
        if self._draws is not None:
            raise UnsupportedState(
                "there are several training DataLoaders, or one is made anew while training",
                "Train from one DataLoader, without reload_dataloaders_every_n_epochs.",
            )
        self._draws = Draws(loader)
        if saved is None or saved["draws"] is None:
            return
        position: DrawsState = saved["draws"]
        self._draws.resume(position, skip=True)
        for sampler in (loader.sampler, loader.batch_sampler):
            if hasattr(sampler, "set_epoch"):  # workers draw before Lightning says it
                sampler.set_epoch(self._trainer.current_epoch)

    def batch_begins(self, index: int) -> None:
        self.used = index
        if self._draws is not None:
            self._draws.used(index)

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "loops": trainer.fit_loop.state_dict(),
            "draws": None if self._draws is None else self._draws.state(self.used),
            "callbacks": {c.state_key: c.state_dict() for c in trainer.callbacks},
            "datamodule": _datamodule_state(trainer),
            "own": self._own(),
            "should_stop": trainer.should_stop,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.restored = saved

    def enter(self) -> None:
        """Have the Trainer begin where the snapshot stands."""
        saved, trainer = self.restored, self._trainer
        assert saved is not None
        trainer.should_stop = saved["should_stop"]
        loops = copy.deepcopy(saved["loops"])
        # The batch that had begun is not over, whatever it is in the epoch.
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        trainer.fit_loop.load_state_dict(loops)
        for callback in trainer.callbacks:
            state = saved["callbacks"].get(callback.state_key)
            if state:
                callback.load_state_dict(copy.deepcopy(state))
        if saved["datamodule"]:
            trainer.datamodule.load_state_dict(saved["datamodule"])
        checkpoint = {**saved["own"], "state_dict": self._module.state_dict()}
        for callback in trainer.callbacks:
            callback.on_load_checkpoint(trainer, self._module, checkpoint)
        self._module.on_load_checkpoint(checkpoint)

    def put_back(self, saved: dict[str, Any]) -> None:
        """Set the loops' counters as they were: what they do on a restart is not wanted here."""
        self._trainer.fit_loop.load_state_dict(copy.deepcopy(saved["loops"]))
        _go_on(self._trainer.fit_loop)

    def _own(self) -> dict[str, Any]:
        """What module and callbacks write into a checkpoint of Lightning's beside their states."""
        checkpoint: dict[str, Any] = {"state_dict": dict(self._module.state_dict())}
        for callback in self._trainer.callbacks:
            callback.on_save_checkpoint(self._trainer, self._module, checkpoint)
        self._module.on_save_checkpoint(checkpoint)
        del checkpoint["state_dict"]
        return checkpoint


def _go_on(loop: Any) -> None:
    """Have a loop and those within it forget that they were loaded."""
    loop.on_iteration_done()
    for inner in vars(loop).values():
        if isinstance(inner, LightningLoop):
            _go_on(inner)


def _put_aside_checkpoint(trainer: Trainer, step: int) -> None:
    """Have a checkpoint that was given not be loaded over the snapshot of `step`."""
    connector = trainer._checkpoint_connector
    given = connector._loaded_checkpoint.get("global_step", 0)
    if given > step:
        raise WrongUse(
            f"the checkpoint in ckpt_path is of step {given}, the newest snapshot of step {step}",
            "Drop the job (`snapshotd drop JOB`) to go on from the checkpoint, or fit without "
            "ckpt_path.",
        )
    connector._loaded_checkpoint = {}


def _states(trainer: Trainer, module: LightningModule, loop: _Loop) -> dict[str, object]:
    states = {
        "model": bare_module(module),
        **named("optimizer", [bare_optimizer(o) for o in trainer.optimizers]),
        **named("scheduler", [c.scheduler for c in trainer.lr_scheduler_configs]),
        "loop": loop,
    }
    if trainer.precision_plugin.state_dict():
        states["precision"] = trainer.precision_plugin
    return states


def _datamodule_state(trainer: Trainer) -> dict[str, Any]:
    return dict(trainer.datamodule.state_dict()) if trainer.datamodule is not None else {}


def _refuse(trainer: Trainer) -> None:
    """Raise where a setting of the Trainer makes exact resumption impossible."""
    name = type(trainer.strategy).__name__
    if name in {"FSDPStrategy", "DeepSpeedStrategy"}:
        raise UnsupportedState(
            f"the strategy {name} keeps the state of parameters to itself",
            "Use one device, DDPStrategy or ModelParallelStrategy (docs/trainers.md).",
        )
    if trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path is not None:
        raise UnsupportedState(
            f"the strategy {name} loads ckpt_path over what is restored from memory",
            "Leave ckpt_path out.",
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise UnsupportedState(
            "reload_dataloaders_every_n_epochs makes the training DataLoader anew, and with it "
            "its position",
            "Leave it 0.",
        )
    if not trainer.lightning_module.automatic_optimization:
        raise UnsupportedState(
            "the module steps its optimizers by itself (automatic_optimization=False): no hook "
            "tells when a step is whole",
            "Use Snapshotter within training_step (docs/trainers.md).",
        )

"""Hugging Face `Trainer`: a callback that snapshots at step boundaries and resumes in the middle.

A snapshot is taken when the next step begins: then all that belongs to the step before it is done
(log, evaluation, checkpoint, the end of an epoch), and the next batches are drawn. A restored run
is led to the very same point, where all that the way there may have moved is put back again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import torch
from accelerate.data_loader import DataLoaderDispatcher
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from snapshotd_client.errors import UnsupportedState, WrongUse
from snapshotd_client.integrations.draws import Draws
from snapshotd_client.integrations.guard import Guard
from snapshotd_client.integrations.objects import bare_module, bare_optimizer
from snapshotd_client.results import Restored
from snapshotd_client.snapshotter import Snapshotter

#: Of TrainerState: what this run settles for itself, or is kept apart.
_NOT_KEPT: Final = frozenset(
    {
        "is_local_process_zero",
        "is_world_process_zero",
        "max_steps",
        "num_train_epochs",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "stateful_callbacks",
    }
)
#: What a Trainer counts outside of its TrainerState, in some version or other.
_COUNTED: Final = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_global_step",
    "_initial_num_input_tokens_seen",
    "current_flos",
)
#: Tells the Trainer to leave out batches; it looks for files there, and finds none.
_NO_CHECKPOINT: Final = os.devnull


class SnapshotCallback(TrainerCallback):
    """Protects one run of one Trainer: ``trainer.add_callback(SnapshotCallback(trainer))``.

    Args:
        trainer: the one it is added to; its loop is entered where the newest snapshot stands.
        interval_steps: snapshot every that many optimizer steps.
        options: as Snapshotter takes them (`job`, `run_dir`, `required`, `overlap`, ...).

    Attributes:
        restored: what came back, once training has begun; None on a job's first start. Its step is
            the Trainer's `global_step`.
        snapshotter: for `status()` and `wait_protected()`, while it trains.

    Raises, as training begins:
        UnsupportedState: a setting of the Trainer makes exact resumption impossible; names it.
        WrongUse: a checkpoint that is newer than the snapshot; a second training.
    """

    def __init__(self, trainer: Trainer, *, interval_steps: int = 1, **options: Any) -> None:
        self._trainer = trainer
        self._interval_steps = interval_steps
        self._options = options
        self._loop: _Loop | None = None
        self._saved: dict[str, Any] | None = None  # until the restored point is reached
        self._guard: Guard | None = None
        self.restored: Restored | None = None
        self.snapshotter: Snapshotter | None = None

    # -- the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._loop is not None:
            raise WrongUse(
                "this SnapshotCallback has been through a training already",
                "Add a new one for each train(), with a job name of its own.",
            )
        _refuse(self._trainer)
        self._loop = _Loop(self._trainer, Draws(_base_loader(given["train_dataloader"])))
        states = _states(self._trainer, self._loop)
        self._guard = Guard(states, self._interval_steps, self._options)
        self.snapshotter = self._guard.snapshotter
        began_at = state.global_step  # of a checkpoint, if one was given
        self.restored = self._guard.restore()
        if self.restored is not None:
            self._enter(began_at)
        self._guard.begin_at(state.global_step)
        # Before the others, so that what they do as a step begins is done after, in both lives.
        handler = self._trainer.callback_handler
        handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        self._trainer._run_epoch = self._run_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        loop, guard = self._here()
        loop.step_begins()
        if self._saved is not None:
            loop.put_back(self._saved)
            guard.put_back_generators()
            self._saved = None
        guard.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._here()[1].snapshotter.close()
        del self._trainer._run_epoch

    # -- the way there

    def _enter(self, began_at: int) -> None:
        loop, trainer = self._here()[0], self._trainer
        saved = loop.restored
        assert saved is not None
        assert self.restored is not None
        if began_at > self.restored.step:
            raise WrongUse(
                f"the checkpoint that training was to resume from is of step {began_at}, the "
                f"newest snapshot of step {self.restored.step}",
                "Drop the job (`snapshotd drop JOB`) to go on from the checkpoint, or train "
                "without resume_from_checkpoint.",
            )
        self._saved = copy.deepcopy(saved)
        loop.put_back(saved)
        ended = trainer.state.global_step >= trainer.state.max_steps
        stopped_early = saved["stopping"] and saved["state"]["global_step"] < saved["max_steps"]
        trainer.control.should_training_stop = ended or stopped_early
        handler = trainer.callback_handler
        # Told to the others when it is known whether this epoch is trained at all.
        handler.on_epoch_begin = lambda args, state, control: control

    def _run_epoch(self, **given: Any) -> None:
        """In place of the Trainer's: leaves out epochs and batches that are trained on already."""
        loop, guard = self._here()
        trainer, epoch = self._trainer, given["epoch"]
        first = 0
        if epoch == given["epochs_trained"] and given["resume_from_checkpoint"] is not None:
            first = given["steps_trained_in_current_epoch"]
        if self._saved is not None:
            if trainer.control.should_training_stop or epoch < self._saved["epoch"]:
                return
            first = self._saved["draws"]["used"]
            given["resume_from_checkpoint"] = _NO_CHECKPOINT if first else None
            given["epochs_trained"], given["steps_trained_in_current_epoch"] = epoch, first
            loop.draws.resume(self._saved["draws"], skip=False)
            del trainer.callback_handler.on_epoch_begin
            trainer.control = trainer.callback_handler.on_epoch_begin(
                trainer.args, trainer.state, trainer.control
            )
        loop.epoch_begins(epoch, first)
        type(trainer)._run_epoch(trainer, **given)
        if trainer.control.should_training_stop or epoch + 1 == trainer.state.num_train_epochs:
            loop.training_ends(given["steps_in_epoch"])
            guard.step(trainer.state.global_step)

    def _here(self) -> tuple[_Loop, Guard]:
        assert self._loop is not None, "training has begun"
        assert self._guard is not None
        return self._loop, self._guard


class _Loop:
    """The Trainer's own place in its loop, as a state of Snapshotter."""

    def __init__(self, trainer: Trainer, draws: Draws) -> None:
        self._trainer = trainer
        self.draws = draws
        self.restored: dict[str, Any] | None = None
        self._epoch = 0
        self._used = 0
        self._next = 0

    def epoch_begins(self, epoch: int, used: int) -> None:
        self._epoch = epoch
        self._used = self._next = used

    def step_begins(self) -> None:
        """The batches of one step more are drawn; those before it are used."""
        self._used = self._next
        self._next += self._trainer.args.gradient_accumulation_steps
        self.draws.used(self._used)

    def training_ends(self, batches: int) -> None:
        self._used = min(self._next, batches)
        if self._used == batches:
            self._epoch, self._used = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        kept = [f.name for f in fields(trainer.state) if f.name not in _NOT_KEPT]
        return {
            "epoch": self._epoch,
            "draws": self.draws.state(self._used),
            "state": {name: getattr(trainer.state, name) for name in kept},
            "counted": {n: _number(getattr(trainer, n)) for n in _COUNTED if hasattr(trainer, n)},
            "callbacks": [
                (type(callback).__name__, callback.state()["attributes"])
                for callback in _exportable(trainer)
            ],
            "stopping": trainer.control.should_training_stop,
            "max_steps": trainer.state.max_steps,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.restored = saved

    def put_back(self, saved: Mapping[str, Any]) -> None:
        """Set the Trainer's own counters, and its callbacks, as they were."""
        trainer = self._trainer
        for name, value in saved["state"].items():
            setattr(trainer.state, name, copy.deepcopy(value))
        for name, value in saved["counted"].items():
            now = getattr(trainer, name, None)
            as_is = torch.full_like(now, value) if isinstance(now, torch.Tensor) else value
            setattr(trainer, name, as_is)
        left = list(saved["callbacks"])
        for callback in _exportable(trainer):
            mine = next((c for c in left if c[0] == type(callback).__name__), None)
            if mine is not None:
                left.remove(mine)
                for name, value in copy.deepcopy(mine[1]).items():
                    setattr(callback, name, value)


def _states(trainer: Trainer, loop: _Loop) -> dict[str, object]:
    states: dict[str, object] = {
        "model": bare_module(trainer.model),
        "optimizer": bare_optimizer(trainer.optimizer),
        "loop": loop,
    }
    if trainer.lr_scheduler is not None:
        states["scheduler"] = trainer.lr_scheduler
    if trainer.accelerator.scaler is not None:
        states["scaler"] = trainer.accelerator.scaler
    return states


def _refuse(trainer: Trainer) -> None:
    """Raise where a setting of the Trainer makes exact resumption impossible."""
    args = trainer.args
    reasons: list[tuple[bool, str, str]] = [
        (
            not hasattr(type(trainer), "_run_epoch"),
            "this version of transformers has no Trainer._run_epoch",
            "Install the extra `snapshotd[hf]`, which names the versions that were tried.",
        ),
        (
            args.ignore_data_skip,
            "ignore_data_skip=True begins the epoch's data anew after a restart",
            "Leave it False: batches are left out by their indices, none is read for it.",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size=True may change the size of a batch, by which positions count",
            "Set per_device_train_batch_size.",
        ),
        (
            trainer.is_deepspeed_enabled,
            "DeepSpeed keeps the state of its engine to itself",
            "See docs/trainers.md for DeepSpeed.",
        ),
        (
            trainer.state.is_hyper_param_search,
            "a hyperparameter search trains many models under one job name",
            "Protect single trainings.",
        ),
    ]
    for is_so, what, remedy in reasons:
        if is_so:
            raise UnsupportedState(what, remedy)


def _base_loader(loader: Any) -> Any:
    if isinstance(loader, DataLoaderDispatcher):
        raise UnsupportedState(
            "one rank draws the batches of all (dispatch_batches)",
            'Say accelerator_config={"dispatch_batches": False}, so that each rank draws its own.',
        )
    return getattr(loader, "base_dataloader", loader)


def _exportable(trainer: Trainer) -> list[Any]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, ExportableState)]


def _number(value: Any) -> Any:
    # A tensor's own value, exactly: it is 0-dim, and of a float type.
    return value.item() if isinstance(value, torch.Tensor) else value

"""The integrations resume exactly, wherever training ends: the examples, with snapshots kept here.

Real frameworks, loaders and images; the daemon comes in in tests/integration/test_examples.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from snapshotd_client import Restored, UnsupportedState, WrongUse
from snapshotd_client.apply import apply
from snapshotd_client.capture import plan
from snapshotd_client.integrations import guard

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Case:
    """One way to run an example: what it gives to a class of its framework beside its own.

    Attributes:
        name: of the integration.
        changed: class of the framework, and what it is given.
        dies_in: optimizer steps; each in a life of its own.
    """

    name: str
    framework: str
    script: str
    changed: tuple[str, dict[str, object]] | None
    dies_in: tuple[int, ...]


def hf(dies_in: tuple[int, ...], **changed: object) -> Case:
    return Case("hf", "transformers", "hf_trainer.py", ("TrainingArguments", changed), dies_in)


def accelerated(dies_in: tuple[int, ...], **changed: object) -> Case:
    return Case("accelerate", "accelerate", "accelerate_loop.py", ("Accelerator", changed), dies_in)


def lightning(dies_in: tuple[int, ...], **changed: object) -> Case:
    return Case("lightning", "lightning.pytorch", "lightning_fit.py", ("Trainer", changed), dies_in)


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "lr_scheduler_type": "reduce_lr_on_plateau",
}
CASES = {
    "hf": hf((1, 2, 6, 10, 11, 20)),
    "hf, uneven accumulation": hf((3, 7, 8, 10), gradient_accumulation_steps=3, max_steps=10),
    "hf, best model": hf((9, 11, 20), **BEST),
    "hf, rare logs": hf(
        (7, 13), logging_steps=3, accelerator_config={"use_seedable_sampler": False}
    ),
    "accelerate": accelerated((1, 2, 5, 12, 13, 14, 24)),
    "accelerate, uneven accumulation": accelerated((3, 5, 6, 9), gradient_accumulation_steps=5),
    "lightning": lightning((1, 2, 5, 12, 13, 24)),
    "lightning, by epochs": lightning((4, 12, 13, 20), val_check_interval=1.0),
    "lightning, by steps": lightning((4, 12, 13, 20), max_epochs=-1, max_steps=30),
    "lightning, uneven accumulation": lightning((3, 5, 6, 9), accumulate_grad_batches=5),
}


class Killed(BaseException):
    """In place of a SIGKILL."""


class Kept:
    """A Snapshotter without a daemon: keeps the image of the newest step."""

    newest: tuple[int, int, bytes] | None = None

    def __init__(self, states: dict[str, object], interval_steps: int = 1) -> None:
        self._states = states
        self._interval_steps = interval_steps

    def restore(self) -> Restored | None:
        if Kept.newest is None:
            return None
        step, manifest_bytes, image = Kept.newest
        values = apply(
            memoryview(image), manifest_bytes, job="job", world=1, shard=0, states=self._states
        )
        return Restored(step=step, tier="local", values=values)

    def step(self, step: int, **values: object) -> None:
        if step % self._interval_steps:
            return
        captured = plan("job", 0, 1, step, self._states, values)
        image = bytearray(captured.image_bytes)
        captured.write(memoryview(image))
        Kept.newest = step, captured.manifest_bytes, bytes(image)

    def close(self) -> None:
        pass


def run(script: str, *args: str, die_at: int = 0) -> None:
    """One life of an example: up to the update of an optimizer step, or to its end."""
    left = iter(range(die_at - 1, -2, -1))

    def hook(*_: object) -> None:
        if die_at and next(left, -1) == 0:
            raise Killed

    handle = register_optimizer_step_pre_hook(hook)
    argv, sys.argv = sys.argv, [script, *args]
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except Killed:
        assert die_at
    finally:
        sys.argv = argv
        handle.remove()
        forget_accelerate()


def forget_accelerate() -> None:
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def told(text: str) -> tuple[list[str], str]:
    """Losses and final fingerprint."""
    return re.findall(r"step \d+ loss \S+", text), re.findall(r"final (\w+)", text)[-1]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(Kept, "newest", None)
    threads, environ = torch.get_num_threads(), set(os.environ)
    yield
    torch.set_num_threads(threads)
    for name in set(os.environ) - environ:  # frameworks leave notes there
        del os.environ[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_resumes_exactly(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    case: Case,
) -> None:
    without_daemon(monkeypatch, case)
    change(monkeypatch, case)
    args = () if case.name == "accelerate" else (f"--out={tmp_path}",)
    run(case.script, *args)
    losses, final = told(capsys.readouterr().out)
    assert len(losses) >= 5
    for step in case.dies_in:
        Kept.newest = None
        run(case.script, *args, die_at=step)
        assert Kept.newest is None if step == 1 else Kept.newest[0] == step - 1
        before = re.findall(r"step \d+ loss \S+", capsys.readouterr().out)
        run(case.script, *args)
        resumed, end = told(capsys.readouterr().out)
        assert resumed == losses[len(losses) - len(resumed) :], f"died in step {step}"
        assert before == losses[: len(before)], f"died in step {step}"
        assert end == final, f"died in step {step}"
    # A run that is done trains no more.
    run(case.script, *args)
    assert told(capsys.readouterr().out) == ([], final)


def change(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if case.changed is None:
        return
    module = importlib.import_module(case.framework)
    name, more = case.changed
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **given: original(*args, **{**given, **more}))


REFUSED = {
    "ignore_data_skip": hf((), ignore_data_skip=True),
    "auto_find_batch_size": hf((), auto_find_batch_size=True),
    "dispatch_batches": hf((), accelerator_config={"dispatch_batches": True}),
    "reload_dataloaders_every_n_epochs": lightning((), reload_dataloaders_every_n_epochs=1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_exact_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str
) -> None:
    case = REFUSED[setting]
    without_daemon(monkeypatch, case)
    change(monkeypatch, case)
    with pytest.raises(UnsupportedState, match=setting) as error:
        run(case.script, f"--out={tmp_path}")
    assert error.value.remedy
    assert Kept.newest is None, "nothing was trained"


@pytest.mark.filterwarnings("ignore")
def test_hf_takes_the_newer_of_checkpoint_and_snapshot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case = hf((), save_strategy="steps", save_steps=7)
    without_daemon(monkeypatch, case)
    change(monkeypatch, case)
    arguments = case.script, f"--out={tmp_path}"
    run(*arguments)
    losses, final = told(capsys.readouterr().out)
    shutil.rmtree(tmp_path)
    Kept.newest = None
    run(*arguments, die_at=10)
    from transformers import Trainer

    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: train(self, resume_from_checkpoint=True))
    assert (tmp_path / "checkpoint-7").exists()
    run(*arguments)
    resumed, end = told(capsys.readouterr().out)
    assert resumed[-11:] == losses[-11:]
    assert end == final
    # The other way round: an old snapshot, and the checkpoint of the end.
    monkeypatch.setattr(Trainer, "train", train)
    Kept.newest = None
    run(*arguments, die_at=3)
    monkeypatch.setattr(Trainer, "train", lambda self: train(self, resume_from_checkpoint=True))
    with pytest.raises(WrongUse, match="is of step 20, the newest snapshot of step 2"):
        run(*arguments)


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_the_newer_of_checkpoint_and_snapshot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case = lightning(())
    without_daemon(monkeypatch, case)
    from lightning.pytorch import Trainer

    fit, path = Trainer.fit, tmp_path / "end.ckpt"

    def fit_and_save(trainer: Trainer, *given: object) -> None:
        fit(trainer, *given)
        trainer.save_checkpoint(path)

    def fit_from(trainer: Trainer, *given: object) -> None:
        fit(trainer, *given, ckpt_path=path)

    monkeypatch.setattr(Trainer, "fit", fit_and_save)
    run(case.script)
    _, final = told(capsys.readouterr().out)
    # Of the same step: the snapshot is taken.
    monkeypatch.setattr(Trainer, "fit", fit_from)
    run(case.script)
    assert told(capsys.readouterr().out) == ([], final)
    monkeypatch.setattr(Trainer, "fit", fit)
    Kept.newest = None
    run(case.script, die_at=4)
    monkeypatch.setattr(Trainer, "fit", fit_from)
    with pytest.raises(WrongUse, match="is of step 24, the newest snapshot of step 3"):
        run(case.script)


def without_daemon(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if importlib.util.find_spec(case.framework.partition(".")[0]) is None:
        pytest.skip(f"{case.framework} is not installed: pip install snapshotd[{case.name}]")
    monkeypatch.setattr(guard, "Snapshotter", Kept)

"""One trial: a method, a seed, a number of steps. It can be killed at any moment and taken up again.

OUT/trials/METHOD-SEED/
  checkpoint-STEP/   state to go on from; there is one at a time, and it appears whole
  model/             the trained model, for heed.from_pretrained
  result.json        written last; with it, the trial is done
  error.txt          the traceback, when it failed
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch

from heed.checkpoint import write_atomically
from heed.compare.host import build_model
from heed.compare.learner import Learner, draw, is_leader, meet, repeatable
from heed.compare.progress import Progress, Report
from heed.compare.results import Curve
from heed.compare.settings import Settings
from heed.data.images import ImageData
from heed.vision.backbone import Backbone

POINTS = 8  # of the curve: evaluations per trial, each with a checkpoint
CHECKPOINT_SECONDS = 60.0  # the longest that training goes on without a checkpoint
NEWS = 100  # reports per trial


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Args:
        method, seed, steps: which trial.
        status: "ok" or "failed".
        error: what went wrong in one line; None when ok.
        accuracy: share of the test images right at the end, 0 to 1; None when failed.
        curve: loss and accuracy on the way.
    """

    method: str
    seed: int
    steps: int
    status: Literal["ok", "failed"]
    curve: Curve
    accuracy: float | None = None
    error: str | None = None

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_atomically(path, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        values = json.loads(path.read_text())
        return cls(**{**values, "curve": _curve(values["curve"])})


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why."""


def trial_folder(out: Path, method: str, seed: int) -> Path:
    """Where a trial keeps its files."""
    return out / "trials" / f"{method}-{seed}"


def run_trial(
    settings: Settings,
    method: str,
    seed: int,
    steps: int,
    data: ImageData,
    *,
    threads: int,
    report: Report,
    device: str | None = None,
) -> TrialResult:
    """Train a method, or go on training it, and write the model and the result; an exception becomes a failed result.

    Args:
        settings: recipe and folder.
        method, seed: which trial.
        steps: optimiser steps in all.
        data: what to learn.
        threads: CPU threads; accuracies repeat bit for bit on the CPU when this is the same.
        report: told of the progress.
        device: overrides the settings' device.
    """
    folder = trial_folder(Path(settings.out), method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    training = _Training(settings, method, seed, steps, folder)
    try:
        with repeatable(threads, device or settings.device):
            accuracy = training.run(data, report, device)
        result = TrialResult(method, seed, steps, "ok", training.curve, accuracy)
    except Exception as error:
        # The comparison goes on whatever one method does; the row and error.txt say what it was.
        write_atomically(folder / "error.txt", traceback.format_exc())
        result = TrialResult(method, seed, steps, "failed", training.curve, error=describe_error(error))
        _release_memory()
    if is_leader():
        result.write(folder / "result.json")
        for checkpoint in folder.glob("checkpoint-*") if result.status == "ok" else ():
            shutil.rmtree(checkpoint)
    meet()
    stage = "trained" if result.status == "ok" else "failed"
    report(Progress(method, seed, stage, training.step, steps, None, result.accuracy, result.error))
    return result


def describe_error(error: BaseException) -> str:
    """One line for the table."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if out_of_memory:
        return f"out of memory: {first}"
    return first if isinstance(error, TrainingFailed) else f"{type(error).__name__}: {first}"


class _Training:
    """The state of a trial in progress."""

    def __init__(self, settings: Settings, method: str, seed: int, steps: int, folder: Path) -> None:
        self.settings, self.method, self.seed, self.steps, self.folder = settings, method, seed, steps, folder
        self.step = 0
        self.curve = Curve(seed)
        self._loss = 0.0  # summed since the last point of the curve
        self._counted = 0

    def run(self, data: ImageData, report: Report, device: str | None) -> float:
        """Train to the end; returns the accuracy."""
        torch.manual_seed(draw("model", self.seed))
        model = build_model(self.method, data, self.settings.host)
        learner = Learner(self.settings, model, data, self.steps, device)
        self._resume(learner)
        points = {round(self.steps * (i + 1) / POINTS) for i in range(POINTS)}
        every = max(1, self.steps // NEWS)
        loss = torch.zeros((), device=learner.device)
        saved = time.monotonic()
        while self.step < self.steps:
            loss += learner.step(self.seed, self.step)
            self.step += 1
            self._counted += 1
            at_point = self.step in points
            if not (at_point or self.step % every == 0):
                continue
            # The sum leaves the device here only: reading it at every step would make the device wait.
            self._loss += learner.accelerator.reduce(loss, "mean").item()
            loss.zero_()
            mean = self._loss / self._counted
            if not math.isfinite(mean):
                raise TrainingFailed(f"the training loss became {mean} by step {self.step} of {self.steps}")
            if at_point:
                self._add_point(mean, learner.accuracy())
            late = learner.accelerator.num_processes == 1 and time.monotonic() - saved > CHECKPOINT_SECONDS
            if (at_point and self.step < self.steps) or late:
                self._checkpoint(learner)
                saved = time.monotonic()
            last = self.curve.accuracy[-1] if self.curve.accuracy else None
            report(Progress(self.method, self.seed, "training", self.step, self.steps, mean, last))
        trained = cast(Backbone, learner.bare_model())
        if is_leader():
            mean, std = data.statistics()
            trained.pretrained_cfg = {"mean": mean.tolist(), "std": std.tolist()}
            trained.save_pretrained(self.folder / "model")
        return self.curve.accuracy[-1]

    def _add_point(self, loss: float, accuracy: float) -> None:
        curve = self.curve
        self.curve = Curve(self.seed, (*curve.step, self.step), (*curve.loss, loss), (*curve.accuracy, accuracy))
        self._loss, self._counted = 0.0, 0

    def _checkpoint(self, learner: Learner) -> None:
        """Put the state where `_resume` finds it: written aside, then renamed, so that it is whole or not there."""
        aside, final = self.folder / ".checkpoint", self.folder / f"checkpoint-{self.step:08d}"
        if is_leader():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            aside.mkdir()
            state = {"step": self.step, "loss": self._loss, "counted": self._counted}
            (aside / "trial.json").write_text(json.dumps({**state, "curve": dataclasses.asdict(self.curve)}))
        meet()
        learner.save(aside)
        meet()
        if is_leader():
            aside.rename(final)
            for older in self.folder.glob("checkpoint-*"):
                if older != final:
                    shutil.rmtree(older)
        meet()

    def _resume(self, learner: Learner) -> None:
        found = max(self.folder.glob("checkpoint-*"), default=None)  # names sort as steps do
        if found is None:
            return
        try:
            state = json.loads((found / "trial.json").read_text())
            learner.load(found)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise TrainingFailed(
                f"{found} cannot be read; delete it to train anew ({describe_error(error)})"
            ) from error
        self.step, self._loss, self._counted = state["step"], state["loss"], state["counted"]
        self.curve = _curve(state["curve"])


def _curve(values: dict[str, Any]) -> Curve:
    return Curve(values["seed"], tuple(values["step"]), tuple(values["loss"]), tuple(values["accuracy"]))


def _release_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()

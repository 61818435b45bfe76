"""Training one classifier: steps, points of its curve, checkpoints to go on from.

TRIAL/
  checkpoint-STEP/   state to go on from; there is one at a time, and it appears whole
  model/             the trained model, for heed.from_pretrained
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from typing import cast

import torch

from heed.compare.machine import draw, is_leader, meet
from heed.compare.results import Curve
from heed.compare.table import score_in_words
from heed.compare.track import Trial
from heed.compare.tracks.classify.host import build_model
from heed.compare.tracks.classify.learner import Learner
from heed.compare.tracks.classify.measure import ACCURACY, POINTS
from heed.compare.trial import TrainingFailed, describe_error
from heed.data.images import ImageData
from heed.vision.backbone import Backbone

CHECKPOINT_SECONDS = 60.0  # the longest that training goes on without a checkpoint
NEWS = 100  # reports per trial


class Training:
    """The training of a trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.step = 0
        self._loss = 0.0  # summed since the last point of the curve
        self._counted = 0

    def run(self, data: ImageData) -> float:
        """Train to the end; returns the accuracy."""
        trial, steps = self.trial, self.trial.steps
        torch.manual_seed(draw("model", trial.seed))
        model = build_model(trial.method, data, trial.settings.host)
        learner = Learner(trial.settings, model, data, steps, trial.device)
        self._resume(learner)
        points = {round(steps * (i + 1) / POINTS) for i in range(POINTS)}
        every = max(1, steps // NEWS)
        loss = torch.zeros((), device=learner.device)
        saved = time.monotonic()
        while self.step < steps:
            loss += learner.step(trial.seed, self.step)
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
                raise TrainingFailed(f"the training loss became {mean} by step {self.step} of {steps}")
            if at_point:
                self._add_point(mean, learner.accuracy())
            late = learner.accelerator.num_processes == 1 and time.monotonic() - saved > CHECKPOINT_SECONDS
            if (at_point and self.step < steps) or late:
                self._checkpoint(learner)
                saved = time.monotonic()
            reached = trial.curve.values.get(ACCURACY.name)
            trial.tell(self.step, mean, score_in_words(ACCURACY, reached[-1]) if reached else None)
        trained = cast(Backbone, learner.bare_model())
        if is_leader():
            mean, std = data.statistics()
            trained.pretrained_cfg = {"mean": mean.tolist(), "std": std.tolist()}
            trained.save_pretrained(trial.folder / "model")
        return trial.curve.values[ACCURACY.name][-1]

    def _add_point(self, loss: float, accuracy: float) -> None:
        self.trial.curve = self.trial.curve.add(self.step, loss=loss, **{ACCURACY.name: accuracy})
        self._loss, self._counted = 0.0, 0

    def _checkpoint(self, learner: Learner) -> None:
        """Put the state where `_resume` finds it: written aside, then renamed, so that it is whole or not there."""
        aside, final = self.trial.folder / ".checkpoint", self.trial.folder / f"checkpoint-{self.step:08d}"
        if is_leader():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            aside.mkdir()
            state = {"step": self.step, "loss": self._loss, "counted": self._counted}
            (aside / "trial.json").write_text(json.dumps({**state, "curve": dataclasses.asdict(self.trial.curve)}))
        meet()
        learner.save(aside)
        meet()
        if is_leader():
            aside.rename(final)
            for older in self.trial.folder.glob("checkpoint-*"):
                if older != final:
                    shutil.rmtree(older)
        meet()

    def _resume(self, learner: Learner) -> None:
        found = max(self.trial.folder.glob("checkpoint-*"), default=None)  # names sort as steps do
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
        self.trial.curve = Curve.from_json(state["curve"])

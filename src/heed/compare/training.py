"""Training in a trial: steps, points of its curve, checkpoints to go on from.

TRIAL/
  checkpoint-STEP/   state to go on from; there is one at a time, and it appears whole
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable

import torch

from heed.compare.learner import Learner
from heed.compare.machine import is_leader, meet
from heed.compare.results import Curve, Metric
from heed.compare.table import score_in_words
from heed.compare.track import Trial
from heed.compare.trial import TrainingFailed, describe_error

POINTS = 8  # of a trial's curve: evaluations, each with a checkpoint
CHECKPOINT_SECONDS = 60.0  # the longest that training goes on without a checkpoint
NEWS = 100  # reports per trial


class Training:
    """The training of a trial, from its start or from where it was.

    Attributes:
        step: optimiser steps done.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.step = 0
        self._loss = 0.0  # summed since the last point of the curve
        self._counted = 0

    def learn(
        self,
        learner: Learner,
        metric: Metric | None = None,
        score: Callable[[], float] | None = None,
        *,
        goes_on: bool = False,
    ) -> float:
        """Train to the end of the trial's steps.

        Args:
            learner: what is trained.
            metric: noted in the curve as training goes; None for a training whose curve is not kept.
            score: measures it.
            goes_on: whether the trial has more to do afterwards, for which the last step is kept as well.

        Returns:
            The mean training loss since the point before the last.

        Raises:
            TrainingFailed: the loss is no number any more, or a checkpoint cannot be read.
        """
        trial, steps = self.trial, self.trial.steps
        self._resume(learner)
        points = {round(steps * (i + 1) / POINTS) for i in range(POINTS)}
        every = max(1, steps // NEWS)
        loss, mean = torch.zeros((), device=learner.device), self._mean()
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
            mean = self._mean()
            if not math.isfinite(mean):
                raise TrainingFailed(f"the training loss became {mean} by step {self.step} of {steps}")
            if at_point:
                if metric is not None and score is not None:
                    trial.curve = trial.curve.add(self.step, loss=mean, **{metric.name: score()})
                if self.step < steps:
                    self._loss, self._counted = 0.0, 0
            late = learner.accelerator.num_processes == 1 and time.monotonic() - saved > CHECKPOINT_SECONDS
            if (at_point and (goes_on or self.step < steps)) or late:
                self._checkpoint(learner)
                saved = time.monotonic()
            reached = trial.curve.values.get(metric.name) if metric is not None else None
            trial.tell(self.step, mean, score_in_words(metric, reached[-1]) if metric and reached else None)
        return mean

    def _mean(self) -> float:
        return self._loss / max(self._counted, 1)

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

"""Training one classifier; TRIAL/model/ is the trained model, for heed.from_pretrained."""

from __future__ import annotations

from typing import cast

import torch

from heed.compare.machine import draw, is_leader
from heed.compare.track import Trial
from heed.compare.tracks.classify.host import build_model
from heed.compare.tracks.classify.learner import ImageLearner
from heed.compare.tracks.classify.measure import ACCURACY
from heed.compare.training import Training
from heed.data.images import ImageData
from heed.vision.backbone import Backbone


def train_classifier(trial: Trial, data: ImageData) -> float:
    """Do a trial of `classify`, or go on with it; returns the accuracy."""
    torch.manual_seed(draw("model", trial.seed))
    model = build_model(trial.method, data, trial.settings.host)
    learner = ImageLearner(trial.settings, model, data, trial.steps, trial.device)
    Training(trial).learn(learner, ACCURACY, learner.accuracy)
    trained = cast(Backbone, learner.bare_model())
    if is_leader():
        mean, std = data.statistics()
        trained.pretrained_cfg = {"mean": mean.tolist(), "std": std.tolist()}
        trained.save_pretrained(trial.folder / "model")
    return trial.curve.values[ACCURACY.name][-1]

"""The track `pretrain`, in the words of `heed.compare.track`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from heed.compare.machine import check_precision, describe_machine, device_kind, repeatable
from heed.compare.results import Cost, DataSummary, Results
from heed.compare.track import Measured, Track, Trial
from heed.compare.tracks.pretrain.host import build_host, build_objective, check_methods
from heed.compare.tracks.pretrain.settings import PretrainSettings
from heed.compare.tracks.pretrain.training import LOSS, METRICS, Pretrainer, PretrainTraining
from heed.data.images import ImageData, load_images

_DATA = "data.safetensors"
_IMAGES_SEEN = 45_000  # in pre-training, where no budget is given: small data sets are repeated more often,
_EPOCHS = (10, 400)  # within these bounds
_TIMED_RUNS = 10
PARAMETERS = Cost("parameters", "parameters", "parameters in pre-training")
SPEED = Cost("speed", "pre-train/s", "pre-training images/s", plot="speed: images per second in pre-training")


class Pretrain(Track):
    """Pre-train without labels; see the package."""

    name = "pretrain"
    metrics = METRICS
    costs = (PARAMETERS, SPEED, LOSS)
    template = "tracks/pretrain/report.html.j2"
    explained = (
        "Fine-tuned accuracy is the share of the test images that the pre-trained encoder gets right after it was "
        "trained further with labels; linear probe and k-NN classify its frozen features. The row “scratch” was not "
        "pre-trained, so its probe and neighbours look at an untrained encoder. All three are given"
    )

    def check(self, settings: PretrainSettings) -> None:
        check_methods(settings.methods, settings.host)
        check_precision(settings)

    def load(self, settings: PretrainSettings) -> ImageData:
        return load_images(settings.data, strict=settings.strict, image_size=settings.image_size)

    def fingerprint(self, data: ImageData) -> str:
        return data.fingerprint()

    def save(self, data: ImageData, out: Path) -> list[str]:
        data.save(out / _DATA)
        return [_DATA]

    def read(self, settings: PretrainSettings) -> ImageData:
        return ImageData.load(Path(settings.out) / _DATA)

    def describe(self, data: ImageData) -> DataSummary:
        details = {"classes": list(data.classes), "image": [data.channels, data.side, data.side]}
        return DataSummary(data.name, len(data.train_labels), len(data.test_labels), "images", details, data.notes)

    def measure(
        self, settings: PretrainSettings, method: str, data: ImageData, threads: int, parallel: int
    ) -> Measured:
        with repeatable(threads, settings.device):
            torch.manual_seed(0)
            model = build_host(settings, data)
            objective = build_objective(settings, method, model)
            count = sum(p.numel() for p in (objective or model).parameters())
            machine = describe_machine(torch.device(device_kind(settings.device)), threads)
            if objective is None:
                return Measured(machine, {PARAMETERS.name: count, SPEED.name: None})
            learner = Pretrainer(settings.recipe(settings.learning_rate), objective, data, 1_000_000)
            timer = Timer("learner.step(0, 0)", globals={"learner": learner}, num_threads=threads)
            timer.timeit(2)  # the first steps choose kernels and fill caches
            speed = learner.batch / timer.timeit(_TIMED_RUNS).median
        return Measured(machine, {PARAMETERS.name: count, SPEED.name: speed}, budget(settings, data, learner.batch))

    def trial(self, trial: Trial, data: ImageData) -> dict[str, float]:
        return PretrainTraining(trial).scores(data)

    def pictures(self, results: Results, folder: Path) -> dict[str, Any]:
        from heed.compare.tracks.pretrain.pictures import reconstructions

        return {"reconstructions": reconstructions(results, folder)}


def budget(settings: PretrainSettings, data: ImageData, batch: int) -> int:
    """Optimiser steps of pre-training, the same for every objective."""
    if settings.steps is not None:
        return settings.steps
    images = len(data.train_labels)
    epochs = settings.epochs or min(max(math.ceil(_IMAGES_SEEN / images), _EPOCHS[0]), _EPOCHS[1])
    return epochs * (images // batch)


TRACK = Pretrain()

"""The track `classify`, in the words of `heed.compare.track`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from heed.checkpoint import write_atomically
from heed.compare.machine import check_precision, repeatable
from heed.compare.results import DataSummary, Results
from heed.compare.track import Measured, Track, Trial
from heed.compare.tracks.classify.host import check_methods
from heed.compare.tracks.classify.learner import batch_size
from heed.compare.tracks.classify.measure import ACCURACY, COSTS, budget, measure
from heed.compare.tracks.classify.settings import ClassifySettings
from heed.compare.tracks.classify.training import train_classifier
from heed.data.images import ImageData, load_images

SAMPLES = 6
_DATA, _SAMPLES = "data.safetensors", "samples.safetensors"


class Classify(Track):
    """Train classifiers of images; see the package."""

    name = "classify"
    metrics = (ACCURACY,)
    costs = COSTS
    template = "tracks/classify/report.html.j2"
    explained = "Accuracy is the share of the test images that a model gets right at the end of training"

    def check(self, settings: ClassifySettings) -> None:
        check_methods(settings.methods, settings.host)
        check_precision(settings)

    def load(self, settings: ClassifySettings) -> ImageData:
        return load_images(settings.data, strict=settings.strict, image_size=settings.image_size)

    def fingerprint(self, data: ImageData) -> str:
        return data.fingerprint()

    def save(self, data: ImageData, out: Path) -> list[str]:
        data.save(out / _DATA)
        _save_samples(out / _SAMPLES, data)
        return [_DATA, _SAMPLES]

    def read(self, settings: ClassifySettings) -> ImageData:
        return ImageData.load(Path(settings.out) / _DATA)

    def describe(self, data: ImageData) -> DataSummary:
        details = {"classes": list(data.classes), "image": [data.channels, data.side, data.side]}
        return DataSummary(data.name, len(data.train_labels), len(data.test_labels), "images", details, data.notes)

    def measure(
        self, settings: ClassifySettings, method: str, data: ImageData, threads: int, parallel: int
    ) -> Measured:
        with repeatable(threads, settings.device):
            torch.manual_seed(0)
            machine, costs = measure(settings, method, data, threads)
        return Measured(machine, costs, budget(settings, data, costs, parallel, batch_size(settings, data)))

    def trial(self, trial: Trial, data: ImageData) -> dict[str, float]:
        return {ACCURACY.name: train_classifier(trial, data)}

    def pictures(self, results: Results, folder: Path) -> dict[str, Any]:
        from heed.compare.tracks.classify.pictures import attention, normalisation

        return {"attention": attention(results, folder), "normalised": normalisation(folder / _DATA)}


def _save_samples(path: Path, data: ImageData) -> None:
    """Test images of as many classes as there is room for, as floats (n, C, S, S), and their labels (n,)."""
    first = [int(torch.nonzero(data.test_labels == label)[0]) for label in data.test_labels.unique()]
    rest = [i for i in range(len(data.test_labels)) if i not in set(first)]
    chosen = torch.tensor((first + rest)[:SAMPLES])
    mean, std = (x.view(-1, 1, 1) for x in data.statistics())
    images = (data.test_images[chosen].float() / 255 - mean) / std
    write_atomically(path, safetensors.torch.save({"images": images, "labels": data.test_labels[chosen]}))


TRACK = Classify()

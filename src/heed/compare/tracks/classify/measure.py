"""What a classifier costs: parameters, FLOPs, throughput, memory. Measured once per method, before it is trained.

FLOPs are those torch counts (`torch.utils.flop_counter`, 2 x multiply-adds) in the forward pass of one image on the CPU,
where attention is decomposed into matrix products, so that no fused kernel hides from the counter. For the others see
`heed.compare.measure`.
"""

from __future__ import annotations

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heed.compare.machine import describe_machine
from heed.compare.measure import FOREVER, peak_memory, rate, steps_in
from heed.compare.results import Cost, Machine, Metric
from heed.compare.tracks.classify.host import build_model
from heed.compare.tracks.classify.learner import ImageLearner
from heed.compare.tracks.classify.settings import ClassifySettings
from heed.data.images import ImageData
from heed.models import HeedModel

IMAGES_SEEN = 30_000  # per trial, where no budget is given: small data sets are repeated more often,
EPOCHS = (5, 200)  # within these bounds

ACCURACY = Metric("accuracy", "accuracy")
COSTS = (
    Cost("parameters", "parameters", plot="size: parameters"),
    Cost("flops", "FLOPs", "FLOPs per image"),
    Cost("train", "train/s", "training images/s", plot="speed: images per second in training"),
    Cost("infer", "infer/s", "inference images/s", plot="speed: images per second in inference"),
    Cost("memory", "memory", "peak memory", unit="B"),
)


def measure(
    settings: ClassifySettings, method: str, data: ImageData, threads: int
) -> tuple[Machine, dict[str, float | None]]:
    """The machine, and what a method costs there, by the names of `COSTS`; None where a device does not report it."""
    device = settings.device
    model = build_model(method, data, settings.host)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = count_flops(model, data)
    learner, peak = peak_memory(
        lambda: ImageLearner(settings, build_model(method, data, settings.host), data, FOREVER), device
    )
    train = rate(learner.batch, threads, lambda: learner.step(0, 0))
    images = learner.normalise(learner.batch_at(0, 0)[0])
    learner.model.eval()
    with torch.no_grad():
        together = len(images) * learner.accelerator.num_processes
        infer = rate(together, threads, lambda: learner.model(images))
    costs = {"parameters": parameters, "flops": flops, "train": train, "infer": infer, "memory": peak}
    return describe_machine(learner.device, threads), costs


def budget(
    settings: ClassifySettings, data: ImageData, costs: dict[str, float | None], parallel: int, batch: int
) -> int:
    """Optimiser steps of every trial of a method whose costs are known; `parallel` trials run at once."""
    if settings.steps is not None:
        return settings.steps
    train, infer = costs["train"], costs["infer"]
    if settings.minutes is not None and train and infer:
        share = 60 * settings.minutes * parallel / (len(settings.methods) * settings.seeds)
        return steps_in(share, len(data.test_labels), batch, train, infer)
    images = len(data.train_labels)
    epochs = settings.epochs or min(max(math.ceil(IMAGES_SEEN / images), EPOCHS[0]), EPOCHS[1])
    return epochs * (images // batch)


def count_flops(model: HeedModel, data: ImageData) -> int:
    """FLOPs of the forward pass of one image, for a model on the CPU."""
    image = torch.zeros(1, data.channels, data.side, data.side)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops()

"""What a method costs: parameters, FLOPs, throughput, memory. Measured once per method, before it is trained.

- FLOPs are those torch counts (`torch.utils.flop_counter`, 2 x multiply-adds) in the forward pass of one image on the
  CPU, where attention is decomposed into matrix products, so that no fused kernel hides from the counter.
- Throughput is the median over repeated batches, timed by `torch.utils.benchmark`, with nothing else going on.
- Peak memory is the most that tensors held at one moment from building the model through two training steps:
  parameters, gradients, optimiser state, batch and activations. Accelerators report it; on the CPU it comes from the
  allocations that torch's profiler records, because the memory of the whole process would count libraries and earlier
  trials. Scratch space inside matrix libraries is not seen.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from heed.compare.machine import describe_machine, device_kind
from heed.compare.results import Cost, Machine, Metric
from heed.compare.tracks.classify.host import build_model
from heed.compare.tracks.classify.learner import Learner
from heed.compare.tracks.classify.settings import ClassifySettings
from heed.data.images import ImageData
from heed.models import HeedModel

POINTS = 8  # of a trial's curve: evaluations, each with a checkpoint
IMAGES_SEEN = 30_000  # per trial, where no budget is given: small data sets are repeated more often,
EPOCHS = (5, 200)  # within these bounds
TIMED_SECONDS = 0.5  # per throughput
RUNS_TOGETHER = 20  # timed runs where several processes share a trial


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
    learner, peak = _peak_memory(settings, method, data, device)
    train = _rate(learner.batch, threads, lambda: learner.step(0, 0))
    images = learner.normalise(learner.batch_at(0, 0)[0])
    learner.model.eval()
    with torch.no_grad():
        together = len(images) * learner.accelerator.num_processes
        infer = _rate(together, threads, lambda: learner.model(images))
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
        testing = POINTS * len(data.test_labels) / infer
        return max(1, int((share - testing) * train / batch))
    images = len(data.train_labels)
    epochs = settings.epochs or min(max(math.ceil(IMAGES_SEEN / images), EPOCHS[0]), EPOCHS[1])
    return epochs * (images // batch)


def count_flops(model: HeedModel, data: ImageData) -> int:
    """FLOPs of the forward pass of one image, for a model on the CPU."""
    image = torch.zeros(1, data.channels, data.side, data.side)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops()


def _rate(images: int, threads: int, work: Callable[[], object]) -> float:
    timer = Timer("work()", globals={"work": work}, num_threads=threads)
    timer.timeit(2)  # the first runs choose kernels and fill caches
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return images / timer.timeit(RUNS_TOGETHER).median  # all processes must do the same number of steps
    return images / timer.blocked_autorange(min_run_time=TIMED_SECONDS).median


def _peak_memory(settings: ClassifySettings, method: str, data: ImageData, device: str) -> tuple[Learner, int | None]:
    """A learner two steps old, and the most memory it has held."""

    def begin() -> Learner:
        learner = Learner(settings, build_model(method, data, settings.host), data, steps=1_000_000, device=device)
        for step in range(2):
            learner.step(0, step)
        return learner

    kind = device_kind(device)
    if kind == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes across the progress display
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            learner = begin()
        return learner, _highest_total(profile)
    if kind == "mps":  # reports no peak
        return begin(), None
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    learner = begin()
    return learner, torch.accelerator.max_memory_allocated() - before


def _highest_total(profile: torch.profiler.profile) -> int:
    """The highest running total of the allocations on the CPU that a profile recorded."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    total = highest = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        total += change["args"]["Bytes"]
        highest = max(highest, total)
    return highest

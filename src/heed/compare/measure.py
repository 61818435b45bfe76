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
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from heed.compare.host import build_model
from heed.compare.learner import Learner, device_kind
from heed.compare.results import Machine
from heed.compare.settings import Settings
from heed.data.images import ImageData
from heed.models import HeedModel

TIMED_SECONDS = 0.5  # per throughput
RUNS_TOGETHER = 20  # timed runs where several processes share a trial


@dataclass(frozen=True)
class Measures:
    """The costs of one method.

    Args:
        parameters: trainable numbers.
        flops: per image and forward pass.
        train_images_per_second, infer_images_per_second: at the batch size of the settings.
        peak_memory_bytes: see the module; None on devices that do not report it.
        machine: where they were measured.
    """

    parameters: int
    flops: int
    train_images_per_second: float
    infer_images_per_second: float
    peak_memory_bytes: int | None
    machine: Machine


def measure(settings: Settings, method: str, data: ImageData, threads: int, device: str | None = None) -> Measures:
    """Measure a method; the device overrides the settings' one."""
    device = device or settings.device
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
    return Measures(parameters, flops, train, infer, peak, describe_machine(learner.device, threads))


def count_flops(model: HeedModel, data: ImageData) -> int:
    """FLOPs of the forward pass of one image, for a model on the CPU."""
    image = torch.zeros(1, data.channels, data.side, data.side)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops()


def describe_machine(device: torch.device, threads: int) -> Machine:
    """The machine this runs on."""
    import heed

    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        threads=threads,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
        heed=heed.__version__,
        python=platform.python_version(),
    )


def usable_cores() -> int:
    """Logical cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rate(images: int, threads: int, work: Callable[[], object]) -> float:
    timer = Timer("work()", globals={"work": work}, num_threads=threads)
    timer.timeit(2)  # the first runs choose kernels and fill caches
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return images / timer.timeit(RUNS_TOGETHER).median  # all processes must do the same number of steps
    return images / timer.blocked_autorange(min_run_time=TIMED_SECONDS).median


def _peak_memory(settings: Settings, method: str, data: ImageData, device: str) -> tuple[Learner, int | None]:
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())

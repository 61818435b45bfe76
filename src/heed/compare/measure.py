"""What a method costs, for the tracks that train: throughput, memory, and the steps that fit a budget.

- Throughput is the median over repeated batches, timed by `torch.utils.benchmark`, with nothing else going on.
- Peak memory is the most that tensors held at one moment from building the model through two training steps:
  parameters, gradients, optimiser state, batch and activations. Accelerators report it; on the CPU it comes from the
  allocations that torch's profiler records, because the memory of the whole process would count libraries and earlier
  trials. Scratch space inside matrix libraries is not seen.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.benchmark import Timer

from heed.compare.learner import Learner
from heed.compare.machine import device_kind
from heed.compare.training import POINTS

TIMED_SECONDS = 0.5  # per throughput
RUNS_TOGETHER = 20  # timed runs where several processes share a trial
FOREVER = 1_000_000  # steps of a learner that is only timed
L = TypeVar("L", bound=Learner)


def rate(count: int, threads: int, work: Callable[[], object]) -> float:
    """How many are done in a second by work that does `count` of them."""
    timer = Timer("work()", globals={"work": work}, num_threads=threads)
    timer.timeit(2)  # the first runs choose kernels and fill caches
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return count / timer.timeit(RUNS_TOGETHER).median  # all processes must do the same number of steps
    return count / timer.blocked_autorange(min_run_time=TIMED_SECONDS).median


def peak_memory(make: Callable[[], L], device: str) -> tuple[L, int | None]:
    """A learner two steps old, and the most memory in bytes that it has held; None where a device does not report it."""

    def begin() -> L:
        learner = make()
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


def steps_in(seconds: float, tested: int, batch: int, train: float, infer: float) -> int:
    """Steps that fit a trial's time, its evaluations included.

    Args:
        seconds: of one trial.
        tested: how many are evaluated at each point of the curve.
        batch: how many are in a step.
        train, infer: how many are done in a second.
    """
    return max(1, int((seconds - POINTS * tested / infer) * train / batch))


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

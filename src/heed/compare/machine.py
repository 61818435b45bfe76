"""The machine a comparison runs on: its device, its processes, and computing on it so that results repeat."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from heed.compare.results import Machine
from heed.compare.settings import Settings
from heed.errors import MissingExtra

_ACCELERATE_DEVICE = "ACCELERATE_TORCH_DEVICE"
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def draw(*key: int | str) -> int:
    """A seed that depends on all parts of the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest())


@contextlib.contextmanager
def repeatable(threads: int, device: str) -> Iterator[None]:
    """Compute with so many threads and, on the CPU, in a fixed order of summation; undone afterwards.

    The caller's CPU random state is kept as well.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(threads)
        # An operator without a deterministic form must not end the trial. On accelerators the fixed order costs speed.
        torch.use_deterministic_algorithms(device_kind(device) == "cpu", warn_only=True)
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
            memory.fill_uninitialized_memory = fill


def is_leader() -> bool:
    """Whether this process writes the files: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def meet() -> None:
    """Wait for the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def device_kind(device: str) -> str:
    """The type of device that a setting such as "auto" or "cuda:1" means here, e.g. "cuda".

    Raises:
        ValueError: it is not a device.
    """
    if device == "auto":
        present = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if present is None else present.type
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a device; use 'auto', 'cpu', 'cuda' or 'mps'") from error


def check_device(device: str) -> None:
    """Raise ValueError for a device this machine does not have."""
    kind = device_kind(device)
    here = device_kind("auto")
    if kind not in ("cpu", here):
        raise ValueError(
            f"device={device!r}: this machine has {'no accelerator' if here == 'cpu' else here}; use 'auto'"
        )
    if kind != "cpu" and device != "auto" and (torch.device(device).index or 0) >= torch.accelerator.device_count():
        raise ValueError(f"device={device!r}: this machine has {torch.accelerator.device_count()} of them")


def check_precision(settings: Any) -> None:
    """Raise ValueError for half precision where this machine's processor would compute in it.

    Args:
        settings: of a track that trains: with `precision`, `device` and `ray`.
    """
    if settings.ray is None and settings.precision == "fp16" and device_kind(settings.device) == "cpu":
        raise ValueError("precision='fp16' needs an accelerator; on the CPU use 'bf16' or 'fp32'")


def join_processes(settings: Settings) -> None:
    """Where `accelerate launch` started several processes, connect them; every trial then spreads over them all.

    Raises:
        ValueError: the settings ask for jobs or Ray besides.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if settings.jobs > 1 or settings.ray is not None:
        raise ValueError(f"jobs={settings.jobs} and ray={settings.ray!r} do not go with several launched processes")
    accelerator(settings.device)


def accelerator(device: str, precision: str = "fp32") -> Any:
    """An `accelerate.Accelerator` on a device, in "fp32", "bf16" or "fp16"."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtra("accelerate", "compare") from error
    # accelerate keeps the first device and precision for the life of the process; every trial brings its own.
    AcceleratorState._reset_state(reset_partial_state="WORLD_SIZE" not in os.environ)
    precision = _PRECISION[precision]
    if device in ("auto", "cpu"):
        return Accelerator(cpu=device == "cpu", mixed_precision=precision)
    before = os.environ.get(_ACCELERATE_DEVICE)
    os.environ[_ACCELERATE_DEVICE] = device
    try:
        return Accelerator(mixed_precision=precision)
    finally:
        if before is None:
            del os.environ[_ACCELERATE_DEVICE]
        else:
            os.environ[_ACCELERATE_DEVICE] = before


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


def default_threads() -> int:
    """Threads for all jobs together: what OMP_NUM_THREADS says, or one per usable core."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else usable_cores()


def usable_cores() -> int:
    """Logical cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())

"""What every benchmark shares: interleaved timing, the machine, a table on screen and a JSON file."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def interleaved(functions: dict[str, Callable[[], object]], repeats: int = 7, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each function; the functions take turns, so that noise of the machine hits all alike."""
    device = torch.device("cuda") if torch.cuda.is_available() else None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            if device is not None:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if device is not None:
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - begin)
    gc.collect()
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import os

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": version("torch"),
        "heed": version("heed"),
    }


def report(
    title: str, columns: list[str], rows: list[list[object]], path: Path | None, extra: dict | None = None
) -> None:
    """Print a table and, with a path, write it as JSON together with the machine."""
    described = machine()
    table = Table(title=title, caption=" · ".join(f"{key} {value}" for key, value in described.items()))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=150).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "title": title,
            "machine": described,
            "rows": [dict(zip(columns, row, strict=True)) for row in rows],
            **(extra or {}),
        }
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")

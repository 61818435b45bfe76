"""What every benchmark shares: interleaved timing, the machine, a table on screen and a JSON file."""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


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


def options(description: str | None, *, repeats: int = 7, seeds: int = 3) -> argparse.Namespace:
    """The command line of a benchmark that times layers and trains small models: threads, repeats, seeds, out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    return given


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in a fixed random order: images (1797, 1, 8, 8) in [0, 1] and labels; 1,280 are for training."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order]).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y[order])


def digits_accuracy(
    model: nn.Module, epochs: int, peak: float, *, weight_decay: float = 0.05, clip: float = math.inf
) -> float:
    """Test accuracy on digits after training with AdamW in batches of 64, one cycle up to the learning rate `peak`."""
    images, labels = digits()
    optimiser = torch.optim.AdamW(model.parameters(), peak, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, epochs * 20)
    for _ in range(epochs):
        for batch in torch.randperm(1280).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            if math.isfinite(clip):
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return (model.eval()(images[1280:]).argmax(1) == labels[1280:]).float().mean().item()

"""Neighborhood attention: how time and memory grow with the tokens, and both unfused halves against dense attention.

    python benchmarks/neighborhood.py [--threads 1] [--repeats 7] [--out docs/benchmarks/neighborhood.json]

The claims: at a fixed window, time and memory grow linearly with the tokens (dense attention: time quadratically), so
the slopes of log time over log tokens are near 1 and 2. And windowed scores, softmax and mixing cost less than dense
attention at 56x56 tokens, 4 heads of width 32, windows of 7x7, where NATTEN 0.17.5's own CPU kernels took 1.0 times and
gathering every window 3.4 times as long as scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common import interleaved, report
from heed.engine.attend import attend
from heed.engine.patterns import Full, Neighborhood
from heed.layers.natten import na2d, na2d_av, na2d_qk

HEADS, WIDTH, WINDOW = 4, 32, 7
SIDES = (32, 48, 64, 96, 128)  # 1,024 to 16,384 tokens
MAP = 56
COLUMNS = ["claim", "layer", "tokens", "ms", "MiB at the peak", "slope of time", "slope of memory", "times dense SDPA"]


def training_step(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(function(*inputs).sum(), inputs)

    return run


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def peak(function: Callable[[], object], device: str) -> float:
    """MiB that one call holds at most at the same time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    # Allocations and releases, in order of time.
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()  # type: ignore[attr-defined]
        most = max(most, held)
    return most / 2**20


def slope(tokens: list[int], values: list[float]) -> float:
    """Of log value over log tokens, by least squares."""
    x, y = torch.tensor(tokens).double().log(), torch.tensor(values).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = na2d_qk(q * WIDTH**-0.5, k, WINDOW).softmax(-1)
    return na2d_av(weights, v, WINDOW)


def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every window copied out, then attention of single queries: what the tiles replace."""
    tokens = window_tokens(q.shape[2]).to(q.device)
    own, keys, values = q.flatten(2, 3)[..., None, :], k.flatten(2, 3)[:, :, tokens], v.flatten(2, 3)[:, :, tokens]
    return F.scaled_dot_product_attention(own, keys, values).view_as(q)


@cache
def window_tokens(side: int) -> Tensor:
    """(tokens, window) the keys of every query."""
    return Neighborhood((side, side), WINDOW).mask(side * side).nonzero()[:, 1].view(side * side, -1)


def growth(device: str, repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    layers = {"dense": "sdpa", f"fused {WINDOW}x{WINDOW}": "tiled", f"unfused {WINDOW}x{WINDOW}": None}
    times: dict[str, list[float]] = {name: [] for name in layers}
    memory: dict[str, list[float]] = {name: [] for name in layers}
    for side in SIDES:
        runs = {}
        for name, backend in layers.items():
            qkv = [torch.randn(1, HEADS, side, side, WIDTH, device=device, requires_grad=True) for _ in range(3)]
            if backend is None:
                runs[name] = training_step(unfused, *qkv)
                continue
            pattern = Full() if backend == "sdpa" else Neighborhood((side, side), WINDOW)
            flat = [x.detach().flatten(2, 3).requires_grad_() for x in qkv]
            runs[name] = training_step(
                lambda q, k, v, p=pattern, b=backend: attend(q, k, v, p, backend=b),  # type: ignore[misc]
                *flat,
            )
        for name, seconds in interleaved(runs, repeats=repeats, warmup=1).items():
            times[name].append(seconds)
            memory[name].append(peak(runs[name], device))
    tokens = [side * side for side in SIDES]
    for name in layers:
        for i, n in enumerate(tokens):
            slopes = [slope(tokens, times[name]), slope(tokens, memory[name])] if i == len(tokens) - 1 else ["", ""]
            rows.append(["training step", name, n, times[name][i] * 1e3, memory[name][i], *slopes, ""])
    return rows


def halves(device: str, repeats: int) -> list[list[object]]:
    qkv = [torch.randn(1, HEADS, MAP, MAP, WIDTH, device=device) for _ in range(3)]
    functions: dict[str, Callable[..., Tensor]] = {
        "dense": lambda q, k, v: F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v))),
        "qk, softmax, av": unfused,
        "na2d": lambda q, k, v: na2d(*(x.movedim(1, -2) for x in (q, k, v)), WINDOW),  # type: ignore[return-value]
        "gather": gathered,
    }
    runs = {name: forward(function, *qkv) for name, function in functions.items()}
    times = interleaved(runs, repeats=repeats, warmup=2)
    return [
        ["forward, 56x56", name, MAP * MAP, seconds * 1e3, peak(runs[name], device), "", "", seconds / times["dense"]]
        for name, seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = halves(options.device, options.repeats) + growth(options.device, options.repeats)
    title = f"Neighborhood attention, {HEADS} heads of width {WIDTH}, window {WINDOW}x{WINDOW}, float32"
    report(title, COLUMNS, rows, options.out)


if __name__ == "__main__":
    main()

"""The claims of large kernel attention (card 25) against their baselines, measured in turns in one run.

    python benchmarks/van.py [--threads 1] [--repeats 7] [--out docs/benchmarks/van.json]

Times are of one layer forward, float32, batch 1: LKA, one depthwise convolution of 21 x 21, and the core of dense
attention (PyTorch's scaled_dot_product_attention, heads of width 32, without its projections).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.lka import LKA, lka_costs

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
MAPS = ((64, 28), (64, 56), (64, 112), (320, 14))  # channels, side
TABLE = {"b0": (4_105_800, 0.864), "b1": (13_861_800, 2.495), "b2": (26_578_472, 4.993), "b3": (44_765_608, 8.925),
         "b4": (60_283_176, 12.144), "b5": (89_967_688, 17.129), "b6": (199_829_416, 38.710)}  # fmt: skip


def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return function()

    return run


def times(repeats: int) -> list[list[object]]:
    calls = {}
    for channels, side in MAPS:
        x = torch.randn(1, channels, side, side)
        q = torch.randn(1, channels // 32, side**2, 32)
        lka, wide = LKA(channels), nn.Conv2d(channels, channels, 21, padding=10, groups=channels)
        calls[f"lka {channels} {side}"] = without_gradients(lambda lka=lka, x=x: lka(x))
        calls[f"wide {channels} {side}"] = without_gradients(lambda wide=wide, x=x: wide(x))
        calls[f"sdpa {channels} {side}"] = without_gradients(lambda q=q: F.scaled_dot_product_attention(q, q, q))
    seconds = interleaved(calls, repeats, warmup=1)
    rows: list[list[object]] = []
    for channels, side in MAPS:
        own = seconds[f"lka {channels} {side}"]
        for key, name in (("sdpa", "dense attention (SDPA)"), ("wide", "depthwise convolution 21 x 21")):
            other = seconds[f"{key} {channels} {side}"]
            rows.append([f"forward, {channels} x {side} x {side}, ms", name, other * 1e3, own * 1e3, other / own])
    slope = {
        key: math.log(seconds[f"{key} 64 112"] / seconds[f"{key} 64 28"]) / math.log(16) for key in ("lka", "sdpa")
    }
    rows.append(["exponent of time in pixels", "dense attention (SDPA)", slope["sdpa"], slope["lka"], ""])
    return rows


def counts() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, (parameters, gmacs) in TABLE.items():
        with torch.device("meta"):
            model = heed.create_model(f"van_{name}").eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, 224, 224))
        ours = sum(p.numel() for p in model.parameters())
        counted = counter.get_total_flops() / 2e9
        rows.append([f"{name.upper()}, parameters", "the authors' modules", parameters, ours, parameters / ours])
        rows.append([f"{name.upper()}, 10^9 multiply-adds", "the authors' modules", gmacs, counted, gmacs / counted])
    costs = lka_costs(64, 56, 56)
    for name in ("dense convolution", "depthwise convolution", "self-attention"):
        other, own = costs[name].parameters, costs["lka"].parameters
        rows.append(["parameters at 64 channels", name, other, own, other / own])
    return rows


def accuracy(combine: str, seed: int, epochs: int = 6) -> float:
    """Test accuracy of a small VAN on scikit-learn's digits."""
    torch.manual_seed(seed)
    model = heed.create_model("van_micro", combine=combine)
    return digits_accuracy(model, epochs, 5e-3)


def learned(seeds: int) -> list[list[object]]:
    scores = {
        combine: float(np.mean([accuracy(combine, seed) for seed in range(seeds)]))
        for combine in ("multiply", "add", "none", "sigmoid")
    }
    own = scores.pop("multiply")
    return [
        [f"digits, test accuracy, {seeds} seeds", f"{combine} in place of multiply", score, own, own / score]
        for combine, score in scores.items()
    ]


def main() -> None:
    given = options(__doc__)
    rows = times(given.repeats) + counts() + learned(given.seeds)
    report("Large kernel attention", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

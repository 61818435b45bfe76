"""The claims of DaViT (card 24) against their baselines, measured in turns in one run.

    python benchmarks/davit.py [--threads 1] [--repeats 7] [--seeds 3] [--out docs/benchmarks/davit.json]

Times are of one layer with projections, 192 channels, 6 heads or groups, windows of 7, float32, batch 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.models.davit import ChannelAttention
from torch import nn

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.attention import PatternAttention
from heed.layers.channel import ChannelGroupAttention
from heed.layers.window import WindowAttention

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
DIM, HEADS = 192, 6
SIDES = (28, 56, 112)
# The authors' comments: parameters, multiply-adds.
PAPER = {
    "tiny": (28_360_168, 4_540_244_736),
    "small": (49_745_896, 8_800_488_192),
    "base": (87_954_408, 15_510_430_720),
    "large": (196_811_752, 102_966_676_992),
}


class TimmChannel(nn.Module):
    """timm's layer of the same weights; it takes (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ChannelAttention(DIM, HEADS, qkv_bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1, 2))


def call(layer: nn.Module, side: int) -> Callable[[], object]:
    x = torch.randn(1, side, side, DIM)

    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def times(repeats: int) -> list[list[object]]:
    layers = {
        "dense": PatternAttention(DIM, HEADS),
        "timm": TimmChannel(),
        "channel": ChannelGroupAttention(DIM, HEADS),
        "window": WindowAttention(DIM, HEADS),
    }
    calls = {f"{name} {side}": call(layer, side) for name, layer in layers.items() for side in SIDES}
    seconds = interleaved(calls, repeats, warmup=1)
    rows: list[list[object]] = []
    for own in ("channel", "window"):
        for side in SIDES:
            for baseline in ("dense", "timm") if own == "channel" else ("dense",):
                theirs, ours = seconds[f"{baseline} {side}"], seconds[f"{own} {side}"]
                title = {"dense": "dense attention (SDPA)", "timm": "timm's ChannelAttention"}[baseline]
                rows.append([f"{own}, {side} x {side}, ms", title, theirs * 1e3, ours * 1e3, theirs / ours])
    slope = {
        name: math.log(seconds[f"{name} {SIDES[-1]}"] / seconds[f"{name} {SIDES[0]}"])
        / (2 * math.log(SIDES[-1] / SIDES[0]))
        for name in layers
    }
    for own in ("channel", "window"):
        rows.append([f"{own}, exponent of time in tokens", "dense attention", slope["dense"], slope[own], ""])
    return rows


def counts() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, (parameters, multiply_adds) in PAPER.items():
        with torch.device("meta"):
            model: Any = heed.create_model(f"davit_{name}")
        own = sum(p.numel() for p in model.parameters())
        rows.append([f"DaViT-{name}, 10^6 parameters", "paper", parameters / 1e6, own / 1e6, parameters / own])
        flops = model.multiply_adds()
        rows.append(
            [f"DaViT-{name}, G multiply-adds", "paper", multiply_adds / 1e9, flops / 1e9, multiply_adds / flops]
        )
    return rows


def accuracy(blocks: tuple[str, ...], seed: int, epochs: int = 10) -> float:
    """Test accuracy on scikit-learn's digits of two stages of 16 and 32 channels."""
    torch.manual_seed(seed)
    model: Any = heed.create_model("davit_micro", dims=(16, 32), blocks=blocks, window_size=2)
    return digits_accuracy(model, epochs, 3e-3)


def ablation(seeds: int) -> list[list[object]]:
    """Dual blocks against as many blocks of one kind."""
    mean = {
        blocks: float(np.mean([accuracy(blocks, seed) for seed in range(seeds)]))
        for blocks in (("spatial", "channel"), ("spatial", "spatial"), ("channel", "channel"))
    }
    dual = mean.pop(("spatial", "channel"))
    return [
        [f"digits, test accuracy, {seeds} seeds", f"{blocks[0]} blocks only", value, dual, dual / value]
        for blocks, value in mean.items()
    ]


def main() -> None:
    given = options(__doc__)
    rows = times(given.repeats) + counts() + ablation(given.seeds)
    report("DaViT: window and channel attention", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

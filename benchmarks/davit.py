"""The claims of DaViT (card 24) against their baselines, measured in turns in one run.

    python benchmarks/davit.py [--threads 1] [--repeats 7] [--seeds 3] [--out docs/benchmarks/davit.json]

Times are of one layer with projections, 192 channels, 6 heads or groups, windows of 7, float32, batch 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.davit import ChannelAttention
from torch import nn

import heed
from common import interleaved, report
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
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.from_numpy(x[order]).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(y[order])
    torch.manual_seed(seed)
    model: Any = heed.create_model("davit_micro", dims=(16, 32), blocks=blocks, window_size=2)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, epochs * 20)
    for _ in range(epochs):
        for batch in torch.randperm(1280).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return (model.eval()(images[1280:]).argmax(1) == labels[1280:]).float().mean().item()


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = times(options.repeats) + counts() + ablation(options.seeds)
    report("DaViT: window and channel attention", COLUMNS, rows, options.out)


if __name__ == "__main__":
    main()

"""The claims of halo attention (card 04) against their baselines, measured in turns in one run.

    python benchmarks/halonet.py [--threads 1] [--repeats 7] [--out docs/benchmarks/halonet.json]

Times are of one layer on a map of 256 channels with 8 heads, blocks of 8 and a halo of 3, float32, batch 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.halo import HaloAttention
from heed.layers.neighborhood import NeighborhoodAttention2D

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
PAPER = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}  # 10^6 parameters
DIM, HEADS = 256, 8
SIDES = (32, 64, 128)


class DenseAttention(nn.Module):
    """The same projections with attention between all pixels, without relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(DIM, 3 * DIM, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Without contiguous() PyTorch leaves its fast kernel for one that keeps all weights.
        q, k, v = self.qkv(x).view(x.shape[0], 3, HEADS, DIM // HEADS, -1).transpose(3, 4).contiguous().unbind(1)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


class PixelWindows(nn.Module):
    """Neighborhood attention, a window of the same reach for every pixel (with its output projection)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = NeighborhoodAttention2D(DIM, HEADS, 7, rel_pos_bias=True, qkv_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def forward(layer: nn.Module, side: int) -> Callable[[], object]:
    x = torch.randn(1, DIM, side, side)

    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def both(layer: nn.Module, side: int) -> Callable[[], object]:
    x = torch.randn(1, DIM, side, side, requires_grad=True)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x).sum(), wanted)


def times(repeats: int) -> list[list[object]]:
    layers = {
        "dense attention (SDPA)": DenseAttention(),
        "timm's HaloAttn": HaloAttn(DIM, num_heads=HEADS),
        "a 7 x 7 window per pixel": PixelWindows(),
        "3 x 3 convolution": nn.Conv2d(DIM, DIM, 3, padding=1),
        "heed": HaloAttention(DIM, num_heads=HEADS),
    }
    rows: list[list[object]] = []
    for title, measure in (("forward", forward), ("forward and backward", both)):
        seconds = interleaved({name: measure(layer, 64) for name, layer in layers.items()}, repeats)
        own = seconds.pop("heed")
        rows += [[f"{title}, 64 x 64, ms", name, s * 1e3, own * 1e3, s / own] for name, s in seconds.items()]
    return rows


def exponents(repeats: int) -> list[list[object]]:
    """Time ~ pixels ^ exponent between the smallest and the largest map."""
    layers = {"dense": DenseAttention(), "heed": HaloAttention(DIM, num_heads=HEADS)}
    calls = {f"{name} {side}": forward(layer, side) for name, layer in layers.items() for side in SIDES}
    seconds = interleaved(calls, repeats, warmup=1)
    slope = {
        name: math.log(seconds[f"{name} {SIDES[-1]}"] / seconds[f"{name} {SIDES[0]}"])
        / (2 * math.log(SIDES[-1] / SIDES[0]))
        for name in layers
    }
    rows: list[list[object]] = [["exponent of time in pixels", "dense attention", slope["dense"], slope["heed"], ""]]
    for side in SIDES:
        dense, own = seconds[f"dense {side}"], seconds[f"heed {side}"]
        rows.append([f"forward, {side} x {side}, ms", "dense attention (SDPA)", dense * 1e3, own * 1e3, dense / own])
    return rows


def sizes() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, paper in PAPER.items():
        with torch.device("meta"):
            model = heed.create_model(f"halonet_{name}")
        ours = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append([f"{name.upper()}, 10^6 parameters", "paper", paper, f"{ours:.6f}", paper / ours])
    small, large = (HaloAttention(DIM, num_heads=HEADS, halo_size=halo) for halo in (1, 7))
    counts = [sum(p.numel() for p in layer.parameters()) for layer in (small, large)]
    rows.append(["parameters, window 10 -> 22", "window 10", counts[0], counts[1], counts[0] / counts[1]])
    cost = HaloAttention(DIM, num_heads=HEADS).complexity(64, 64)
    rows.append(["copies of a key", "a 7 x 7 window per pixel", cost.per_pixel_ratio, cost.memory_ratio,
                 cost.per_pixel_ratio / cost.memory_ratio])  # fmt: skip
    return rows


def accuracy(halo: int, seed: int, epochs: int = 8) -> float:
    """Test accuracy on scikit-learn's digits of a small HaloNet whose blocks meet through their halos alone."""
    torch.manual_seed(seed)
    # A stem that sees single pixels and no strides: nothing but the halo carries information between blocks.
    model = heed.create_model(
        "halonet_micro",
        layout=("hh", "h"),
        channels=(64, 64),
        strides=(1, 1),
        stem_kernel=1,
        block_size=2,
        halo_size=halo,
    )
    return digits_accuracy(model, epochs, 1e-2)


def learned(seeds: int) -> list[list[object]]:
    closed, halo = ([accuracy(h, seed) for seed in range(seeds)] for h in (0, 1))
    gain = np.mean(halo) / np.mean(closed)
    return [
        [f"digits, test accuracy, {seeds} seeds", "halo 0", float(np.mean(closed)), float(np.mean(halo)), float(gain)]
    ]


def main() -> None:
    given = options(__doc__)
    rows = times(given.repeats) + exponents(given.repeats) + sizes() + learned(given.seeds)
    report("Halo attention", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

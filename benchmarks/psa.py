"""The claims of polarized self-attention (card 35) against their baselines, measured in turns in one run.

    python benchmarks/psa.py [--threads 1] [--repeats 7] [--seeds 3] [--out docs/benchmarks/psa.json]

Heat maps: scikit-learn's digits at 16x16 pixels, a target at the first and at the last row of the stroke, a network of three
residual blocks of 16 channels; squeeze-and-excitation (Hu et al., CVPR 2018) stands at the same place as PSA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from common import interleaved, report
from heed.layers.psa import PSA, insert_psa
from heed.vision.psa import gaussian_heatmaps

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
SHAPES = ((48, 64), (64, 56), (96, 32))  # channels, side
LAYOUTS = ("sequential", "parallel")
HOSTS = {"hrnet_w48": (BasicBlock,), "resnet18": (BasicBlock,), "resnet50": (Bottleneck,), "resnet101": (Bottleneck,)}


class SelfAttention(nn.Module):
    """Self-attention between all pixels, heads of about 32 channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = max(1, dim // 32)
        self.qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).flatten(4).transpose(3, 4).contiguous().unbind(1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape))


def call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def times(repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for dim, side in SHAPES:
        x = torch.randn(1, dim, side, side)
        layers = {
            "self-attention (SDPA)": SelfAttention(dim),
            "3 x 3 convolution": nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            **{layout: PSA(dim, layout) for layout in LAYOUTS},
        }
        seconds = interleaved({name: call(layer.eval(), x) for name, layer in layers.items()}, repeats)
        for layout in LAYOUTS:
            for name in ("self-attention (SDPA)", "3 x 3 convolution"):
                theirs, ours = seconds[name], seconds[layout]
                rows.append([f"{layout}, {dim} x {side} x {side}, ms", name, theirs * 1e3, ours * 1e3, theirs / ours])
    return rows


def counts() -> list[list[object]]:
    rows: list[list[object]] = []
    for host, kinds in HOSTS.items():
        for layout in LAYOUTS:
            with torch.device("meta"):
                done = insert_psa(
                    timm.create_model(host, num_classes=0 if "hrnet" in host else 1000), kinds, layout=layout
                )
            whole = done.before + done.added
            rows.append([f"{host}, parameters with {layout} PSA", "without", done.before, whole, done.before / whole])
    conv = 9 * 64 * 64 * 32 * 32
    for layout in LAYOUTS:
        for title, published in (("as published", True), ("as computed here", False)):
            flops = PSA(64, layout).multiply_adds(32, 32, as_published=published)
            rows.append(
                [f"{layout}, multiply-adds {title}, 64 x 32 x 32", "3 x 3 convolution", conv, flops, conv / flops]
            )
    return rows


@cache
def strokes() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 16, 16) and heat maps (1797, 2, 16, 16)."""
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    ink = images[:, 0] > 0.4
    at = ink.flatten(1).float()
    first = at.argmax(1)
    last = at.shape[1] - 1 - at.flip(1).argmax(1)
    points = torch.stack([torch.stack([p // 16, p % 16], 1) for p in (first, last)], 1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return images[order], gaussian_heatmaps(points.float(), (16, 16), 1.5)[order]


def heatmap_error(arm: str, seed: int, epochs: int) -> float:
    """Mean squared error on held-out digits."""
    images, targets = strokes()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *(BasicBlock(16, 16) for _ in range(3)), nn.Conv2d(16, 2, 1))
    if arm in LAYOUTS:
        insert_psa(model, layout=arm)
    elif arm == "SE":
        for block in model[1:4]:
            block.aa = SEModule(16, rd_channels=4)  # type: ignore[union-attr]
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, epochs * 20)
    for _ in range(epochs):
        for batch in torch.randperm(1280).split(64):
            loss = F.mse_loss(model(images[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return F.mse_loss(model.eval()(images[1280:]), targets[1280:]).item()


def learned(seeds: int, epochs: int) -> list[list[object]]:
    error = {
        arm: [1e3 * heatmap_error(arm, seed, epochs) for seed in range(seeds)] for arm in ("without", "SE", *LAYOUTS)
    }
    rows: list[list[object]] = []
    for layout in LAYOUTS:
        ours = float(np.mean(error[layout]))
        for baseline in ("without", "SE"):
            theirs = float(np.mean(error[baseline]))
            claim = f"heat maps, error x 1000, {seeds} seeds, {layout} (spread {np.std(error[layout]):.2f})"
            rows.append([claim, baseline, theirs, ours, theirs / ours])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = times(options.repeats) + counts() + learned(options.seeds, options.epochs)
    report("Polarized self-attention", COLUMNS, rows, options.out)


if __name__ == "__main__":
    main()

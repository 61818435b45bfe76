"""NAT and DiNAT: what dilation costs, how far it reaches, and what windows cost next to blocks that do not overlap.

    python benchmarks/dinat.py [--threads 1] [--repeats 7] [--device cpu] [--out docs/benchmarks/dinat.json]

The claims: dilation adds no parameters, no multiply-adds and no time; L layers with dilations 1, k, k^2, ... see k^L
tokens along an axis where plain ones see 1 + L (k - 1); and a network with dilated layers learns as well as one
without, both better than a perceptron (here: scikit-learn's digits, enlarged to 32 x 32 pixels). On a GPU neighborhood
attention was as fast as Swin's windows of the same size; both run through heed's engine here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heed
from common import interleaved, report
from heed.engine.pattern import Pattern
from heed.engine.patterns import Blocks
from heed.layers.attention import PatternAttention
from heed.layers.neighborhood import NeighborhoodAttention2D
from heed.vision.nat import NAT, NATConfig, dilation_cost
from heed.vision.nat_dilations import receptive_field

COLUMNS = ["claim", "what", "parameters", "G multiply-adds", "ms", "over the plain one", "tokens seen", "accuracy"]
KERNEL, DIM, HEADS, SIDE, WINDOW = 3, 64, 2, 56, 7
SEEDS, EPOCHS, BATCH = 3, 30, 64


class BlockAttention(PatternAttention):
    """Swin's windows without shift or bias: tokens attend inside blocks that do not overlap."""

    def pattern(self, layout: tuple[int, ...]) -> Pattern:
        return Blocks(WINDOW, grid=layout)


def forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def training_step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        module.zero_grad()
        module(x).square().mean().backward()
        return None

    return run


def cost(device: str, repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    images = torch.randn(1, 3, 224, 224, device=device)
    models = {name: cast(NAT, heed.create_model(name, drop_path=0.0)).to(device) for name in ("nat_mini", "dinat_mini")}
    for claim, make in (("cost, forward", forward), ("cost, training step", training_step)):
        times = interleaved({name: make(model, images) for name, model in models.items()}, repeats=repeats)
        for name, model in models.items():
            count = sum(p.numel() for p in model.parameters())
            slower = times[name] / times["nat_mini"]
            assert dilation_cost(model) == 1
            rows.append([claim, name, count, model.flops() / 1e9, times[name] * 1e3, slower, "", ""])
    return rows


def windows(device: str, repeats: int) -> list[list[object]]:
    x = torch.randn(1, SIDE, SIDE, DIM, device=device)
    layers = {
        "blocks 7x7": BlockAttention(DIM, HEADS),
        "neighborhoods 7x7": NeighborhoodAttention2D(DIM, HEADS, WINDOW),
        "neighborhoods 7x7, dilation 8": NeighborhoodAttention2D(DIM, HEADS, WINDOW, dilation=8),
    }
    times = interleaved({name: forward(layer.to(device), x) for name, layer in layers.items()}, repeats=repeats)
    claim = f"windows, {SIDE}x{SIDE}x{DIM}, forward"
    return [[claim, name, "", "", s * 1e3, s / times["blocks 7x7"], "", ""] for name, s in times.items()]


def reach() -> list[list[object]]:
    """Tokens of an 81 x 81 map that change when the one in the middle does, along an axis: counted, not derived."""
    rows: list[list[object]] = []
    side = KERNEL**4
    for name, dilations in (("plain", (1, 1, 1, 1)), ("dilated", (1, 3, 9, 27))):
        seen = []
        x = torch.randn(1, side, side, 2, dtype=torch.float64)
        y = x.clone()
        y[:, side // 2, side // 2] += 10
        for n, dilation in enumerate(dilations, 1):
            # Nearly even weights, so that no key's share is lost to rounding.
            layer = NeighborhoodAttention2D(2, 1, KERNEL, dilation=dilation, qk_scale=1e-3).double()
            with torch.no_grad():
                x, y = layer(x), layer(y)
            changed = int(((x - y).abs().amax((0, 3)) > 0).any(0).sum())
            assert changed == int(receptive_field(side, KERNEL, dilations[:n])[:, side // 2].sum())
            seen.append(changed)
        rows.append(["reach, windows of 3", f"{name} {dilations}", "", "", "", "", seen, ""])
    return rows


def learning() -> list[list[object]]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, 32, mode="bilinear")
    labels = torch.tensor(digits.target)
    config = NATConfig(32, 1, 10, 16, (2, 2), (2, 4), 3, drop_path=0.0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 32), nn.GELU(), nn.Linear(32, 10)),
        "NAT": lambda: NAT(config),
        "DiNAT": lambda: NAT(replace(config, dilations="alternating")),
    }
    rows: list[list[object]] = []
    for name, make in makers.items():
        accuracies = [accuracy(make, images, labels, seed) for seed in range(SEEDS)]
        count = sum(p.numel() for p in make().parameters())
        rows.append(["learning, digits", name, count, "", "", "", "", statistics.mean(accuracies)])
    return rows


def accuracy(make: Callable[[], nn.Module], images: Tensor, labels: Tensor, seed: int) -> float:
    torch.manual_seed(seed)
    train, test = torch.randperm(len(labels)).tensor_split([1400])
    model = make()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = len(train) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train))][: steps * BATCH].view(steps, BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = reach() + cost(options.device, options.repeats) + windows(options.device, options.repeats) + learning()
    report("NAT and DiNAT: the cost and the reach of dilation, float32", COLUMNS, rows, options.out)


if __name__ == "__main__":
    main()

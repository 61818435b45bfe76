"""The claims of gated positional self-attention (card 16) against their baselines, measured in turns in one run.

    python benchmarks/convit.py [--threads 1] [--repeats 7] [--out docs/benchmarks/convit.json]

Times are of one layer, float32, batch 1, 14 x 14 tokens, 432 channels, 9 heads (ConViT-S).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.convit import GPSA as TimmGPSA
from torch import nn
from torch.utils.data import Subset, TensorDataset

import heed
from common import interleaved, options, report
from heed.layers.gpsa import GPSA, MHSA
from heed.vision.convit import ConViT, LocalityLog, subsample_classes

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
DIM, HEADS, SIDE = 432, 9, 14
PAPER = {"tiny": 6, "tiny_plus": 10, "small": 27, "small_plus": 48, "base": 86, "base_plus": 152}  # 10^6 parameters
RATIOS = (0.05, 0.1, 0.3)


def times(repeats: int) -> list[list[object]]:
    layers: dict[str, nn.Module] = {
        "timm's GPSA": TimmGPSA(DIM, HEADS),
        "self-attention (SDPA)": MHSA(DIM, HEADS),
        "heed": GPSA(DIM, HEADS),
    }
    x = torch.randn(1, SIDE**2, DIM, requires_grad=True)

    def forward(layer: nn.Module) -> object:
        with torch.no_grad():  # timm's layer keeps a tensor of its first call, which inference_mode would spoil
            return layer(x)

    def both(layer: nn.Module) -> object:
        return torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])

    rows: list[list[object]] = []
    for title, run in (("forward", forward), ("forward and backward", both)):
        calls = {name: lambda layer=layer, run=run: run(layer) for name, layer in layers.items()}
        seconds = interleaved(calls, repeats)
        own = seconds.pop("heed")
        rows += [[f"{title}, ms", name, s * 1e3, own * 1e3, s / own] for name, s in seconds.items()]
    return rows


def sizes() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, paper in PAPER.items():
        with torch.device("meta"):
            model = heed.create_model(f"convit_{name}")
        ours = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append([f"{name}, 10^6 parameters", "paper", paper, ours, paper / ours])
    return rows


def trained(local_layers: int, ratio: float, seed: int, steps: int = 500) -> tuple[float, LocalityLog]:
    """Test accuracy on scikit-learn's digits after training on a share of every class, and how local the layers were."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    images = torch.from_numpy(x[order]).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(y[order])
    kept = subsample_classes(labels[:1280].tolist(), ratio)
    small = Subset(TensorDataset(images, labels), kept)
    torch.manual_seed(seed)
    model = cast(
        ConViT,
        heed.create_model("convit_micro", dim=36, num_heads=9, depth=6, local_up_to_layer=local_layers),
    )
    log = LocalityLog(model, images[1280:1344])
    log("start")
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    for _ in range(steps):
        batch = [small[i] for i in torch.randint(len(kept), (32,)).tolist()]
        inputs, target = (torch.stack(part) for part in zip(*batch, strict=True))
        optimiser.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        optimiser.step()
        schedule.step()
    log("end")
    with torch.no_grad():
        accuracy = (model.eval()(images[1280:]).argmax(1) == labels[1280:]).float().mean().item()
    return accuracy, log


def learned(seeds: int) -> list[list[object]]:
    rows: list[list[object]] = []
    log = None
    for ratio in RATIOS:
        plain = float(np.mean([trained(0, ratio, seed)[0] for seed in range(seeds)]))
        results = [trained(5, ratio, seed) for seed in range(seeds)]
        local, log = float(np.mean([accuracy for accuracy, _ in results])), results[0][1]
        rows.append([f"digits, accuracy from {ratio:.0%}, {seeds} seeds", "no GPSA", plain, local, local / plain])
    assert log is not None
    for layer in (0, 4):
        gates, reach = ([float(values[layer].mean()) for values in kept] for kept in (log.gates, log.nonlocality))
        rows.append([f"gate of layer {layer + 1}, mean of heads", "at first", gates[0], gates[1], gates[1] / gates[0]])
        rows.append([f"non-locality of layer {layer + 1}", "at first", reach[0], reach[1], reach[1] / reach[0]])
    return rows


def main() -> None:
    given = options(__doc__, repeats=11)
    rows = times(given.repeats) + sizes() + learned(given.seeds)
    report("Gated positional self-attention", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

"""The claims of the HyperZ.Z.W operator and Terminator (card 36) against their baselines, measured in turns in one run.

    python benchmarks/hyperzzw.py [--threads 1] [--repeats 7] [--seeds 3] [--out docs/benchmarks/hyperzzw.json]

Times are of the operator's two products, x * W and (Z.W) @ Z, on 4 x C x 32 x 32, float32, against PyTorch's
scaled_dot_product_attention of 1,024 tokens with C channels. Epochs are until 97 % of scikit-learn's digits are right in
training, for a small Terminator with Kar3 and a residual network of about its size with Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import heed
from common import digits, interleaved, options, report
from heed.layers.hyperzzw import hyperzzw_global
from heed.vision.terminator_training import Kar3

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
WIDTHS = (36, 144)
THRESHOLD, MOST = 0.97, 20  # of the training accuracy; epochs


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def times(repeats: int) -> list[list[object]]:
    def product(x: Tensor, kernel: Tensor, z: Tensor) -> Tensor:
        return hyperzzw_global(x * kernel, z)

    calls: dict[str, Callable[[], object]] = {}
    for width in WIDTHS:
        x, z, kernel = torch.randn(4, width, 32, 32), torch.randn(4, width, 32, 32), torch.randn(1, width, 32, 32)
        q = torch.randn(4, 1, 1024, width)
        calls[f"own {width}"] = partial(product, x, kernel, z)
        calls[f"sdpa {width}"] = partial(F.scaled_dot_product_attention, q, q, q)
    model = heed.create_model("terminator_cifar").eval()
    calls["model"] = partial(model, torch.randn(4, 3, 32, 32))
    with torch.inference_mode():
        seconds = interleaved(calls, repeats)
    rows: list[list[object]] = []
    for width in WIDTHS:
        own, other = seconds[f"own {width}"], seconds[f"sdpa {width}"]
        name = "dense attention (SDPA)"
        rows.append([f"products, 4 x {width} x 32 x 32, ms", name, other * 1e3, own * 1e3, other / own])
    return [*rows, ["Terminator for CIFAR, 4 images, s", "", "", seconds["model"], ""]]


def sizes() -> list[list[object]]:
    with torch.device("meta"):
        own = count(heed.create_model("terminator_cifar"))
        resnet = _cifar_resnet()
    return [["parameters, CIFAR-10", "ResNet-18", count(resnet), own, count(resnet) / own]]


def _cifar_resnet() -> ResNet:
    """ResNet-18 as it is used on CIFAR: a 3 x 3 stem without pooling."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # type: ignore[assignment]
    return model


def _residual(width: int) -> nn.Sequential:
    blocks = [BasicBlock(width, width) for _ in range(4)]
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def epochs_needed(model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Epochs until the network, as it trains, has so many of the training images right."""
    images, labels = (part[:1280] for part in digits())
    for epoch in range(1, MOST + 1):
        right = 0
        for batch in torch.randperm(1280).split(64):
            logits = model(images[batch])
            optimiser.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimiser.step()
            right += int((logits.argmax(1) == labels[batch]).sum())
        if right >= THRESHOLD * 1280:
            return epoch
    return MOST


def learned(seeds: int) -> list[list[object]]:
    def mean(make: Callable[[], nn.Module], optimiser: Callable[..., torch.optim.Optimizer]) -> float:
        needed = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make()
            needed.append(epochs_needed(model, optimiser(model.parameters())))
        return float(np.mean(needed))

    terminator, residual = partial(heed.create_model, "terminator_micro"), partial(_residual, 32)
    adam = partial(torch.optim.Adam, lr=1e-3)
    own = mean(terminator, Kar3)
    claim = f"digits, epochs to {THRESHOLD:.0%} in training, {count(terminator()):,} parameters, {seeds} seeds"
    return [
        [claim, f"{name}, {count(make()):,} parameters", baseline, own, baseline / own]
        for name, make in (("residual network and Adam", residual), ("Terminator and Adam", terminator))
        for baseline in [mean(make, adam)]
    ]


def main() -> None:
    given = options(__doc__)
    rows = times(given.repeats) + sizes() + learned(given.seeds)
    report("HyperZ.Z.W operator and Terminator", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

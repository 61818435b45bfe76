"""The claims of focal modulation (card 68) against their baselines, measured in turns in one run.

    python benchmarks/focalnet.py [--threads 1] [--repeats 9] [--seeds 3] [--out docs/benchmarks/focalnet.json]

Times are of one layer with 3 levels from kernel 3, float32, batch 1, against softmax attention with heads of 32
channels and the same input and output projections.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import timm
import torch
from timm.models.focalnet import FocalModulation as TimmModulation
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.focal import FocalModulation
from heed.layers.registry import create_layer

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
SHAPES = ((96, 56), (384, 14), (96, 112))  # channels, side


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def both(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x).sum(), wanted)


def times(repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for dim, side in SHAPES:
        x = torch.randn(1, side, side, dim)
        first = x.permute(0, 3, 1, 2).contiguous()
        attention = create_layer("softmax", dim, dim // 32, (side, side))
        for title, measure in (("forward", forward), ("forward and backward", both)):
            if measure is both and side > 56:
                continue
            seconds = interleaved(
                {
                    "softmax attention": measure(attention, x),
                    "timm's FocalModulation": measure(TimmModulation(dim, 3, 3), first),
                    "heed": measure(FocalModulation(dim, 3, 3), x),
                },
                repeats,
            )
            own = seconds.pop("heed")
            rows += [
                [f"{title}, {dim} x {side} x {side}, ms", name, s * 1e3, own * 1e3, s / own]
                for name, s in seconds.items()
            ]
    return rows


def multiply_adds(model: nn.Module, side: int) -> float:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side))
    return counter.get_total_flops() / 2e9


def costs() -> list[list[object]]:
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224").eval()
        srf, lrf = (heed.create_model(f"focalnet_tiny_{field}").eval() for field in ("srf", "lrf"))
    theirs, ours = multiply_adds(swin, 224), multiply_adds(srf, 224)
    small, large = multiply_adds(lrf, 224), multiply_adds(lrf, 384)
    return [
        ["tiny srf, 10^9 multiply-adds at 224", "Swin-T", theirs, ours, theirs / ours],
        ["tiny lrf, multiply-adds at 384 over 224", "pixels", (384 / 224) ** 2, large / small, ""],
    ]


def accuracy(levels: int, gates: str, seed: int, epochs: int = 6) -> float:
    """Test accuracy on scikit-learn's digits; `gates` "learned", or "fixed" to 1 / (L + 1)."""
    torch.manual_seed(seed)
    model = heed.create_model("focalnet_micro", dim=24, levels=(levels,) * 2)
    for layer in model.modules():
        if gates == "fixed" and isinstance(layer, FocalModulation):
            start = 2 * layer.dim
            with torch.no_grad():
                layer.f.weight[start:] = 0
                layer.f.bias[start:] = 1 / (levels + 1)
            for parameter in (layer.f.weight, layer.f.bias):
                parameter.register_hook(lambda grad, s=start: torch.cat([grad[:s], torch.zeros_like(grad[s:])]))
    # No weight decay, which would move the fixed gates.
    return digits_accuracy(model, epochs, 6e-3, weight_decay=0.0)


def learned(seeds: int) -> list[list[object]]:
    full, fixed, whole = (
        float(np.mean([accuracy(levels, gates, seed) for seed in range(seeds)]))
        for levels, gates in ((2, "learned"), (2, "fixed"), (0, "learned"))
    )
    title = f"digits, test accuracy, {seeds} seeds"
    return [
        [title, "gates fixed to 1 / (L + 1)", fixed, full, full / fixed],
        [title, "the global level alone", whole, full, full / whole],
    ]


def main() -> None:
    given = options(__doc__, repeats=9)
    rows = times(given.repeats) + costs() + learned(given.seeds)
    report("Focal modulation", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

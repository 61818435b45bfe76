"""The claims of ULSAM (card 32) against their baselines, measured in turns in one run.

    python benchmarks/ulsam.py [--threads 1] [--repeats 15] [--seeds 3] [--out docs/benchmarks/ulsam.json]

Times are of one layer, float32, batch 1: ULSAM with 4 groups, in a loop over the groups as the authors have it and as
heed has it, a bottleneck of MobileNet-V2 of the same width, and softmax attention with heads of 32 channels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.layers import SEModule
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.registry import create_layer
from heed.layers.ulsam import ULSAM
from heed.vision.ulsam import cost

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
SHAPES = ((96, 14), (160, 7))  # channels, side
TABLE = {"13_16": "about 13 %", "12_13_15_16": "about 25 %", "13": "", "16": "", "12_13_16": ""}


class GroupByGroup(nn.Module):
    """The same function with modules of its own for each group."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = nn.ModuleList(ULSAM(channels // groups, 1) for _ in range(groups))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.groups), 1)
        return torch.cat([group(part) for group, part in zip(self.groups, parts, strict=True)], 1)


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    layer.eval()

    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def times(repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for dim, side in SHAPES:
        x = torch.randn(1, dim, side, side)
        seconds = interleaved(
            {
                "a bottleneck of MobileNet-V2": forward(InvertedResidual(dim, dim, 1, 6), x),
                "the authors' loop over groups": forward(GroupByGroup(dim), x),
                "softmax attention": forward(create_layer("softmax", dim, dim // 32, (side, side)), x.movedim(1, -1)),
                "heed": forward(ULSAM(dim), x),
            },
            repeats,
            warmup=5,
        )
        own = seconds.pop("heed")
        rows += [[f"forward, {dim} x {side} x {side}, ms", n, s * 1e3, own * 1e3, s / own] for n, s in seconds.items()]
    return rows


def counts() -> list[list[object]]:
    rows: list[list[object]] = []
    with torch.device("meta"):
        plain = cost(heed.create_model("mobilenet_v2"))
        for name, claim in TABLE.items():
            own = cost(heed.create_model(f"mobilenet_v2_ulsam_{name}"))
            for title, a, b in (
                ("10^6 parameters", plain.parameters, own.parameters),
                ("10^6 multiply-adds", plain.multiply_adds, own.multiply_adds),
            ):
                where = name.replace("_", ", ") + (f" ({claim} less)" if claim else "")
                rows.append([f"{title}, layers {where}", "MobileNet-V2", a / 1e6, b / 1e6, a / b])
    size = [
        sum(p.numel() for p in layer.parameters()) for layer in (SEModule(512, rd_ratio=1 / 16, bias=False), ULSAM(512))
    ]
    return [*rows, ["parameters at 512 channels", "squeeze and excitation", *size, size[0] / size[1]]]


def accuracy(replaced: tuple[int, ...], seed: int, epochs: int = 8) -> float:
    """Test accuracy of a small MobileNet-V2 on scikit-learn's digits."""
    torch.manual_seed(seed)
    model = heed.create_model("ulsam_micro", replaced=replaced)
    return digits_accuracy(model, epochs, 1e-2)


def learned(seeds: int) -> list[list[object]]:
    plain, own = (float(np.mean([accuracy(replaced, seed) for seed in range(seeds)])) for replaced in ((), (3, 6)))
    sizes = [
        sum(p.numel() for p in heed.create_model("ulsam_micro", replaced=replaced).parameters())
        for replaced in ((), (3, 6))
    ]
    return [
        [f"digits, test accuracy, {seeds} seeds", "no layer replaced", plain, own, own / plain],
        ["parameters of these", "no layer replaced", *sizes, sizes[0] / sizes[1]],
    ]


def main() -> None:
    given = options(__doc__, repeats=15)
    rows = times(given.repeats) + counts() + learned(given.seeds)
    report("ULSAM", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

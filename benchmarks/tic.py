"""The claims of MSA-Conv and TiC (card 52) against their baselines, measured in turns in one run.

    python benchmarks/tic.py [--threads 1] [--repeats 9] [--seeds 3] [--out docs/benchmarks/tic.json]

Times are float32, batch 1, 64 channels, one head. The receptive field is that of random weights: the share of the input
that moves an output pixel, mean of all output pixels on a diagonal of the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.attention import PatternAttention
from heed.layers.msa_conv import msa_conv
from heed.layers.neighborhood import NeighborhoodAttention2D
from heed.layers.tic import MSAConv2d, msa_conv_multiply_adds
from heed.vision.tic import TiC, receptive_field

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
DIM = 64
SIDES = (14, 28, 56, 112)
SWITCHES: dict[str, dict[str, Any]] = {
    "MSA-Conv alone": {"shift": 0, "inter_pooling": False},
    "cyclic shift": {"inter_pooling": False},
    "inter-pooling": {"shift": 0},
    "both": {},
}


def unfolded(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    """The attention with all windows gathered."""
    keys, values = (F.unfold(x, kernel, padding=kernel // 2).view(1, DIM, kernel**2, *x.shape[2:]) for x in (k, v))
    weights = ((q[:, :, None] * keys).sum(1) * DIM**-0.5).softmax(1)
    return (weights[:, None] * values).sum(2)


def quiet(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    layer.eval()

    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def growth(repeats: int) -> list[list[object]]:
    """Layer against global attention, at growing sides."""
    rows: list[list[object]] = []
    for side in SIDES:
        costs = msa_conv_multiply_adds(DIM, side, side)
        global_, own = costs["global attention"], costs["MSA-Conv"]
        rows.append([f"10^6 multiply-adds, side {side}", "global attention", global_ / 1e6, own / 1e6, global_ / own])
        x = torch.randn(1, DIM, side, side)
        seconds = interleaved(
            {
                "global attention": quiet(PatternAttention(DIM, 1), x.permute(0, 2, 3, 1).contiguous()),
                "heed": quiet(MSAConv2d(DIM, DIM, 3), x),
            },
            repeats if side < 112 else 7,
        )
        theirs, own = seconds["global attention"], seconds["heed"]
        rows.append([f"layer, side {side}, ms", "global attention", theirs * 1e3, own * 1e3, theirs / own])
    return rows


def layers(repeats: int, side: int = 28, kernel: int = 7) -> list[list[object]]:
    x = torch.randn(1, DIM, side, side)
    q, k, v = (torch.randn(1, DIM, side, side, requires_grad=True) for _ in range(3))
    cores = {
        "windows gathered (unfold)": lambda: unfolded(q, k, v, kernel),
        "heed": lambda: msa_conv(q, k, v, kernel),
    }

    def both(core: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(core().sum(), [q, k, v])

    where = f"{side} x {side}, kernel {kernel}"
    timed = {
        f"attention forward, {where}, ms": {name: torch.no_grad()(core) for name, core in cores.items()},
        f"attention forward and backward, {where}, ms": {name: both(core) for name, core in cores.items()},
        f"layer forward, {where}, ms": {
            "its 7 x 7 convolution alone": quiet(nn.Conv2d(DIM, DIM, kernel, padding=kernel // 2), x),
            "neighborhood attention": quiet(
                NeighborhoodAttention2D(DIM, 1, kernel), x.permute(0, 2, 3, 1).contiguous()
            ),
            "heed": quiet(MSAConv2d(DIM, DIM, kernel, padding="same"), x),
        },
    }
    rows: list[list[object]] = []
    for title, calls in timed.items():
        seconds = interleaved(cast(dict[str, Callable[[], object]], calls), repeats)
        own = seconds.pop("heed")
        rows += [[title, name, s * 1e3, own * 1e3, s / own] for name, s in seconds.items()]
    return rows


def reach(switches: dict[str, Any], side: int = 24) -> float:
    torch.manual_seed(0)
    model = cast(TiC, heed.create_model("tic_micro", dims=(8,), depths=(4,), heads=(2,), **switches)).eval()
    x = torch.randn(2, 1, side, side)
    fields = [receptive_field(lambda y: model.stage_maps(y)[-1], x, (i, i)) for i in range(side)]
    return float(np.mean([(field > 0).float().mean().item() for field in fields]))


def accuracy(switches: dict[str, Any], seed: int) -> float:
    torch.manual_seed(seed)
    return digits_accuracy(heed.create_model("tic_micro", **switches), 8, 5e-3)


def switched(seeds: int) -> list[list[object]]:
    """Cyclic shift and inter-pooling on and off."""
    areas = {name: reach(switches) for name, switches in SWITCHES.items()}
    learned = {
        name: float(np.mean([accuracy(switches, seed) for seed in range(seeds)])) for name, switches in SWITCHES.items()
    }
    plain, *others = SWITCHES
    rows: list[list[object]] = []
    for name in others:
        rows += [
            [
                f"share of a map seen through 4 layers, {name}",
                plain,
                areas[plain],
                areas[name],
                areas[name] / areas[plain],
            ],
            [f"digits, {name}, {seeds} seeds", plain, learned[plain], learned[name], learned[name] / learned[plain]],
        ]
    return rows


def main() -> None:
    given = options(__doc__, repeats=9)
    rows = growth(given.repeats) + layers(given.repeats) + switched(given.seeds)
    report("TiC", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

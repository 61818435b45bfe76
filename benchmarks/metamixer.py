"""The claims of FFNified attention and FFNet (card 53) against their baselines, measured in turns in one run.

    python benchmarks/metamixer.py [--threads 1] [--repeats 7] [--seeds 3] [--out docs/benchmarks/metamixer.json]

Times are of one layer forward, float32, batch 1: FFNified attention with two 7 x 7 kernels, as trained and fused, and
multi-head attention with projections (PyTorch's scaled_dot_product_attention, heads of width 32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.metamixer import FFNifiedGrid
from heed.layers.reparam import fuse

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
MAPS = ((352, 16), (704, 8), (88, 64))  # channels, side
# Parameters and 10^9 multiply-adds at 256 pixels of the authors' fused models.
TABLE = {"ffnet_1": (13_660_152, 2.985), "ffnet_2": (26_908_440, 6.003), "ffnet_3": (48_330_632, 10.146),
         "ffnet_4": (79_200_360, 19.166)}  # fmt: skip


def without_gradients(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def times(repeats: int) -> list[list[object]]:
    calls = {}
    for channels, side in MAPS:
        x = torch.randn(1, side, side, channels)
        # Memory as it lies in a convolutional network: channels first.
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        trained, fused = FFNifiedGrid(channels).eval(), fuse(FFNifiedGrid(channels).eval())
        dense = heed.create_layer("softmax", channels, channels // 32, (side, side)).eval()
        for name, layer in (("trained", trained), ("fused", fused)):
            calls[f"{name} {channels}"] = without_gradients(layer, x)
        calls[f"dense {channels}"] = without_gradients(dense, x.contiguous())
    seconds = interleaved(calls, repeats)
    rows: list[list[object]] = []
    for channels, side in MAPS:
        dense = seconds[f"dense {channels}"]
        for name in ("trained", "fused"):
            own = seconds[f"{name} {channels}"]
            claim = f"forward, {name}, {channels} x {side} x {side}, ms"
            rows.append([claim, "multi-head attention", dense * 1e3, own * 1e3, dense / own])
    return rows


def counts() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, (parameters, gmacs) in TABLE.items():
        with torch.device("meta"):
            model = heed.create_model(name, fused=True).eval()
        ours = sum(p.numel() for p in model.parameters())
        counted = [multiply_adds(model, side) for side in (256, 384)]
        rows.append([f"{name}, parameters", "the authors' modules", parameters, ours, parameters / ours])
        rows.append(
            [f"{name}, 10^9 multiply-adds", "the authors' modules", gmacs, counted[0] / 1e9, gmacs * 1e9 / counted[0]]
        )
        growth = counted[1] / counted[0]
        rows.append([f"{name}, growth from 256 to 384 pixels", "growth of the pixels", 2.25, growth, 2.25 / growth])
    return rows


def multiply_adds(model: nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2


def fusing(repeats: int) -> list[list[object]]:
    """A whole model, as trained and fused: the largest difference of logits over the largest logit, and the times."""
    model = heed.create_model("ffnet_1", drop_path=0.0)
    with torch.no_grad():
        for _ in range(8):  # running statistics of its own maps, so that its logits are not nearly constant
            model(torch.randn(4, 3, 96, 96))
    fused = heed.create_model("ffnet_1")
    fused.load_state_dict(model.state_dict())
    fuse(fused.eval())
    model.eval()
    x = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        logits = model(x)
        difference = ((fused(x) - logits).abs().max() / logits.abs().max()).item()
    seconds = interleaved(
        {"trained": without_gradients(model, x), "fused": without_gradients(fused, x)}, repeats, warmup=1
    )
    before, after = seconds["trained"] * 1e3, seconds["fused"] * 1e3
    return [
        ["ffnet_1 fused, largest difference over largest logit", "as trained", 0.0, difference, ""],
        ["ffnet_1 fused, forward at 256 pixels, ms", "as trained", before, after, before / after],
    ]


def learned(seeds: int) -> list[list[object]]:
    """Is it the framework or softmax? The same small FFNet with other mixers in all slots, on digits."""
    scores = {}
    for mixer in ("ffnified", "softmax", "identity"):
        runs = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            runs.append(digits_accuracy(heed.create_model("ffnet_micro", mixers=(mixer,) * 2), 6, 3e-3))
        scores[mixer] = float(np.mean(runs))
    own = scores.pop("ffnified")
    return [
        [f"digits, test accuracy, {seeds} seeds", f"{name} in the same slots", score, own, own / score]
        for name, score in scores.items()
    ]


def forecast_error(kernel: int, seed: int, steps: int = 120) -> float:
    """Mean squared error on unseen starts of a sum of three sinusoids, after training at equal steps."""
    torch.manual_seed(seed)
    length, horizon = 96, 48
    model = heed.create_model(
        "ffnet_series", length=length, horizon=horizon, variables=3, dims=(16,), kernels=(kernel,), small_kernels=(3,),
        drop=0.1,
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)

    def series(count: int) -> Tensor:
        t = torch.arange(length + horizon) + 1000 * torch.rand(count, 3, 1)
        return sum((2 * math.pi * t / period).sin() for period in (11, 27, 63)).mT  # type: ignore[union-attr]

    for _ in range(steps):
        past, future = series(32).split((length, horizon), 1)
        optimiser.zero_grad()
        F.mse_loss(model(past), future).backward()
        optimiser.step()
    past, future = series(256).split((length, horizon), 1)
    with torch.no_grad():
        return F.mse_loss(cast(nn.Module, model.eval())(past), future).item()


def forecasts(seeds: int) -> list[list[object]]:
    short, long = (float(np.mean([forecast_error(kernel, seed) for seed in range(seeds)])) for kernel in (3, 51))
    return [[f"sinusoids, squared error, kernel 51, {seeds} seeds", "kernel 3", short, long, short / long]]


def enlarging() -> list[list[object]]:
    """Super-resolution without its last convolution, and nearest-neighbour enlargement."""
    model = heed.create_model("ffnet_sr_light", depth=2).eval()
    last = cast(nn.Conv2d, model.conv_bef_up)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(cast(Tensor, last.bias))
    x = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        difference = (model(x) - F.interpolate(x, scale_factor=2)).abs().max().item()
    return [["zeroed conv_bef_up, largest difference", "nearest neighbour", 0.0, difference, ""]]


def main() -> None:
    given = options(__doc__)
    rows = times(given.repeats) + fusing(given.repeats) + counts() + enlarging()
    rows += learned(given.seeds) + forecasts(given.seeds)
    report("FFNified attention and FFNet", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

"""FFNified attention on a photograph: a small network of it learns to enlarge one half and is tried on the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

import heed
from heed.demos.registry import Figures, demos, photograph
from heed.layers.metamixer import FFNifiedAttention, FFNifiedGrid
from heed.layers.reparam import fuse
from heed.predict.ffnet_sr import FFNetSR, fft_loss
from heed.vision.ffnet import FFBlock

_SIZE, _SCALE = (300, 450), 3
_SPLIT = 225  # columns left of it are trained on
_SHOWN = (slice(90, 180), slice(255, 390))  # rows and columns of the right half that are drawn: an eye
_DIM, _DEPTH, _STEPS, _CROP, _BATCH = 24, 3, 400, 24, 8
_BLUE, _ORANGE = "#0072B2", "#D55E00"


@demos.register("53-metamixer")
def metamixer(picture: Path) -> Figures:
    """Train a small FFNet_sr on half a photograph; draw what it makes of the other half, and how it gets there."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)[None]
    small = F.interpolate(photo, scale_factor=1 / _SCALE, mode="bicubic", antialias=True).clamp(0, 1)
    model = cast(FFNetSR, heed.create_model("ffnet_sr", scale=_SCALE, dim=_DIM, depth=_DEPTH))
    begin = time.perf_counter()
    _train(model, small[..., : _SPLIT // _SCALE], photo[..., :_SPLIT])
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        images = {
            "pixels repeated": F.interpolate(small, scale_factor=_SCALE, mode="nearest"),
            "bicubic": F.interpolate(small, scale_factor=_SCALE, mode="bicubic", align_corners=False),
            "FFNet": model(small),
        }
    quality = {name: _psnr(image[..., _SPLIT:], photo[..., _SPLIT:]) for name, image in images.items()}
    times = _times()

    figure = plt.figure(figsize=(14, 5.9), layout="constrained")
    axes = figure.subplot_mosaic([["half", "near", "cubic", "ours"], ["query", "coeff", "mixed", "cost"]])
    axes["half"].axvspan(_SPLIT, _SIZE[1], color="white", alpha=0.45)
    _show(axes["half"], photo, "Trained left, tried right")
    rows, columns = _SHOWN
    axes["half"].add_patch(
        plt.Rectangle((columns.start, rows.start), 135, 90, fill=False, edgecolor=_ORANGE, linewidth=2)
    )
    for key, (name, image), colour in zip(
        ("near", "cubic", "ours"), images.items(), ("black", "black", _BLUE), strict=True
    ):
        _show(axes[key], image[:, :, rows, columns], f"Enlarged, {name}: {quality[name]:.1f} dB", colour)
    _draw_steps([axes["query"], axes["coeff"], axes["mixed"]], model, small)
    _draw_times(axes["cost"], times)
    figure.suptitle(
        "FFNified attention: depthwise convolution, GELU, depthwise convolution in the place of q kᵀ, softmax, a v",
        fontsize=16,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "setting": f"{_SIZE[0]} x {_SIZE[1]} pixels from {1 / _SCALE**2:.0%} of them, {parameters:,} parameters",
        "training": f"{_STEPS} steps in {seconds:.0f} s",
        **{f"right half, {name}": f"{value:.2f} dB" for name, value in quality.items()},
        **{f"352 channels, 16 x 16: {name}": f"{value * 1e3:.2f} ms" for name, value in times.items()},
    }


def _train(model: nn.Module, small: Tensor, large: Tensor) -> None:
    s = _SCALE
    optimiser = torch.optim.Adam(model.parameters(), 3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS, 1e-5)
    for _ in range(_STEPS):
        corners = [tuple(int(torch.randint(side - _CROP + 1, ())) for side in small.shape[2:]) for _ in range(_BATCH)]
        x = torch.cat([small[..., r : r + _CROP, c : c + _CROP] for r, c in corners])
        y = torch.cat([large[..., s * r : s * (r + _CROP), s * c : s * (c + _CROP)] for r, c in corners])
        found = model(x)
        loss = F.l1_loss(found, y) + fft_loss(found, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def _draw_steps(axes: list[Axes], model: FFNetSR, small: Tensor) -> None:
    """Query, coefficients and output of the last block's mixer, in the channel whose coefficients vary most."""
    x = model.body[:-1](model.proj(small))
    mixer = cast(FFNifiedAttention, cast(FFBlock, model.body[-1]).token.main)
    steps = [mixer.query(x)[0], mixer.coefficients(x)[0], mixer(x)[0]]
    channel = int((steps[1].std((1, 2)) / steps[1].abs().amax((1, 2))).argmax())
    kernels = [cast(nn.Conv2d, step.operation).weight[channel, 0] for step in (mixer.interaction, mixer.aggregation)]  # type: ignore[union-attr]
    titles = ("A channel's query q", "Coefficients: GELU(keys ∗ q)", "Output: values ∗ coefficients")
    for ax, step, title in zip(axes, steps, titles, strict=True):
        image = step[channel]
        low, high = np.quantile(image, (0.01, 0.99))
        ax.imshow(image, cmap="cividis", vmin=low, vmax=high)
        ax.set_title(title, fontsize=13)
        ax.set_axis_off()
    for ax, kernel, name in zip(axes[1:], kernels, ("keys", "values"), strict=True):
        inset = ax.inset_axes((0.02, 0.03, 0.2, 0.3))
        reach = kernel.abs().max().item()
        inset.imshow(kernel, cmap="RdBu_r", vmin=-reach, vmax=reach)
        inset.set(xticks=(), yticks=())
        inset.set_title(name, fontsize=10, color="white", pad=3)


def _times() -> dict[str, float]:
    """Median seconds of a mixer on 352 channels of 16 x 16, as in FFNet-2's third stage, and of softmax attention."""
    x = torch.randn(1, 16, 16, 352)
    layers = {
        "softmax attention": heed.create_layer("softmax", 352, 11, (16, 16)).eval(),
        "FFNified, as trained": FFNifiedGrid(352).eval(),
        "FFNified, fused": fuse(FFNifiedGrid(352).eval()),
    }
    found: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for turn in range(18):
            for name, layer in layers.items():
                begin = time.perf_counter()
                layer(x)
                if turn >= 3:
                    found[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in found.items()}


def _draw_times(ax: Axes, times: dict[str, float]) -> None:
    labels = ["softmax attention", "FFNified attention, as trained", "FFNified attention, fused"]
    values = [value * 1e3 for value in times.values()]
    bars = ax.barh(labels, values, height=0.45, color=["silver", "#7FB7D9", _BLUE])
    ax.bar_label(bars, fmt="%.2f ms", padding=4, fontsize=11)
    for i, label in enumerate(labels):
        ax.annotate(label, (0, i - 0.28), fontsize=11)
    ax.set_xlim(0, 1.35 * max(values))
    ax.set_ylim(len(labels) - 0.6, -0.6)
    ax.set_title("Time, 352 channels of 16 x 16", fontsize=13)
    ax.set(xticks=(), yticks=())
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def _show(ax: Axes, image: Tensor, title: str, colour: str = "black") -> None:
    ax.imshow(image[0].permute(1, 2, 0).clamp(0, 1).numpy())
    ax.set_title(title, fontsize=13, color=colour)
    ax.set_axis_off()


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * F.mse_loss(image.clamp(0, 1), clean).log10().item()

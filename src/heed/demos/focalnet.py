"""Focal modulation on a photograph: one layer learns to remove noise, and shows how far each token listened for it.

The output is linear in what each level gathers, so it falls apart into one drawing per level and a constant.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from heed.demos.registry import Figures, demos, photograph
from heed.layers.focal import FocalModulation, FocalParts

_HEIGHT, _WIDTH, _PATCH = 128, 192, 2
_DIM, _LEVELS = 32, 3
_NOISE = 0.15  # standard deviation; the photograph lies in [0, 1]
_STEPS = 400
_TOKEN = (24, 36)  # row and column of the one whose receptive fields are drawn, in the left eye
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7")  # Okabe and Ito's palette, from near to far


class _Denoiser(nn.Module):
    """Patches, one focal modulation, patches: the picture goes through the modulation and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * _PATCH**2
        self.embed = nn.Sequential(nn.Linear(pixels, _DIM), nn.GELU(), nn.Linear(_DIM, _DIM))
        self.modulation = FocalModulation(_DIM, levels=_LEVELS)
        self.draw = nn.Linear(_DIM, pixels)

    def forward(self, patches: Tensor) -> Tensor:
        return self.draw(self.modulation(self.embed(patches)))

    def drawings(self, parts: FocalParts) -> list[Tensor]:
        """What each level adds to the output, (1, H, W, pixels), less its mean, which the picture shares."""
        weight = self.draw.weight @ self.modulation.proj.weight
        found = []
        for context, gate in zip(parts.contexts, parts.gates.split(1, 1), strict=True):
            modulator = F.conv2d(context * gate, self.modulation.h.weight)
            drawn = (parts.query * modulator).permute(0, 2, 3, 1) @ weight.T
            found.append(drawn - drawn.mean((1, 2), keepdim=True))
        return found


@demos.register("68-focalnet")
def focalnet(picture: Path) -> Figures:
    """Train a one-layer denoiser; draw its modulator, which levels its gates open where, and what each level adds."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(_HEIGHT, _WIDTH))
    colour = photo.mean((0, 1))
    clean = _to_patches(photo - colour)
    model, begin = _Denoiser(), time.perf_counter()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 8e-3, _STEPS)
    for _ in range(_STEPS):
        loss = F.mse_loss(model(clean + _NOISE * torch.randn_like(clean)), clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    seconds = time.perf_counter() - begin

    noisy = clean + _NOISE * torch.randn_like(clean)
    with torch.no_grad():
        restored = model(noisy)
        parts = model.modulation.parts(model.embed(noisy))
        drawings = model.drawings(parts)
    shares = parts.shares()[0]
    fields = model.modulation.receptive_fields
    names = [f"{field} x {field} tokens" for field in fields] + ["the whole picture"]

    figure = plt.figure(figsize=(14, 9.3), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(1.4, 2.1)))
    left, centre, right = top.subplots(1, 3)
    _show(left, _to_pixels(noisy) + colour, "What the layer sees, and how far a token's levels reach")
    for field, shade in zip(fields, _COLOURS, strict=False):
        _outline(left, field, shade)
    _show(centre, _to_pixels(restored) + colour, "What it returns")
    right.imshow(parts.strength()[0], cmap="viridis")
    right.set_title("Length of the modulator: where the context weighs most", loc="left", fontsize=11)
    right.set_axis_off()
    bottom.suptitle(
        "Above: each level's share in what a token gathers (bright: more, same scale).   "
        "Below: what the level adds to the returned picture (contrast tripled).",
        x=0.01,
        ha="left",
    )
    columns = bottom.subplots(2, _LEVELS + 1).T
    for (above, below), share, drawing, name, shade in zip(columns, shares, drawings, names, _COLOURS, strict=True):
        above.imshow(share, cmap="magma", vmin=0, vmax=0.7)
        above.set_title(f"{name}: {share.mean():.0%}", color=shade, fontweight="bold")
        below.imshow((3 * _to_pixels(drawing) + 0.5).clamp(0, 1))
        above.set_axis_off()
        below.set_axis_off()
    figure.suptitle(
        "Focal modulation: eyes and outlines listen to what is near, fur to what is further away",
        fontsize=16,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    rows, columns = clean.shape[1:3]
    detail = _detail(clean)
    lively, calm = detail > detail.quantile(0.9), detail < detail.quantile(0.5)
    attention = 4 * rows * columns * _DIM**2 + 2 * (rows * columns) ** 2 * _DIM
    return {
        "setting": f"{rows} x {columns} tokens of {_PATCH} x {_PATCH} pixels, kernels {model.modulation.kernels}",
        "peak signal-to-noise ratio": f"{_psnr(noisy, clean):.1f} dB before, {_psnr(restored, clean):.1f} dB after",
        f"share of the {fields[0]} x {fields[0]} level": (
            f"{shares[0][lively].mean():.0%} in the tenth of the tokens with most detail, "
            f"{shares[0][calm].mean():.0%} in the calmer half"
        ),
        f"share of the {fields[-1]} x {fields[-1]} level": (
            f"{shares[-2][lively].mean():.0%} and {shares[-2][calm].mean():.0%}"
        ),
        "multiply-adds": f"{model.modulation.flops(rows, columns) / 1e6:.0f} M, full attention {attention / 1e6:.0f} M",
        "training": f"{_STEPS} steps in {seconds:.0f} s",
    }


def _detail(patches: Tensor) -> Tensor:
    """(H, W) how much the tokens of the photograph around each differ."""
    x = patches.permute(0, 3, 1, 2)
    mean = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    return (F.avg_pool2d(x.square(), 5, 1, 2, count_include_pad=False) - mean.square()).mean(1)[0]


def _to_patches(image: Tensor) -> Tensor:
    """(H, W, 3) -> (1, H/p, W/p, p*p*3)"""
    rows, columns = image.shape[0] // _PATCH, image.shape[1] // _PATCH
    return image.view(rows, _PATCH, columns, _PATCH, 3).transpose(1, 2).reshape(1, rows, columns, -1)


def _to_pixels(patches: Tensor) -> Tensor:
    """(1, H/p, W/p, p*p*3) -> (H, W, 3)"""
    _, rows, columns, _ = patches.shape
    return patches.view(rows, columns, _PATCH, _PATCH, 3).transpose(1, 2).reshape(_HEIGHT, _WIDTH, 3)


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * F.mse_loss(image, clean).log10().item()


def _show(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_axis_off()


def _outline(ax: Axes, field: int, colour: str) -> None:
    """The square of `field` tokens around the chosen one."""
    side = field * _PATCH
    row, column = (_PATCH * (place + 0.5) - 0.5 - side / 2 for place in _TOKEN)
    ax.add_patch(Rectangle((column, row), side, side, fill=False, edgecolor=colour, linewidth=2.5))

"""TiC on a photograph: trained on small crops, asked about the whole picture at once, at two sizes.

The network learns to say from which of 24 parts of the photograph a crop was taken.
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
from torch import Tensor

import heed
from heed.demos.registry import Figures, demos, photograph
from heed.layers.tic import MDCSM, MSAConv2d
from heed.vision.tic import TiC, receptive_field

_SIZE, _CELL, _CROP = (192, 288), 48, 48  # pixels; 4 x 6 parts
_STEPS, _BATCH = 240, 16
_OTHER = 1.25  # the whole photograph is read at this scale, too
_QUERIES = ((70, 108), (136, 170), (150, 40))  # rows and columns of pixels whose windows are drawn
_COLOURS = ("#56B4E9", "#E69F00", "#CC79A7")
_FIELD = 48  # side of the maps on which receptive fields are drawn
_PARTS = {
    "MSA-Conv alone": {"shift": 0, "inter_pooling": False},
    "with cyclic shift": {"inter_pooling": False},
    "with inter-pooling": {"shift": 0},
    "with both": {},
}


@demos.register("52-tic")
def tic(picture: Path) -> Figures:
    """Train a small TiC on crops; draw what it says everywhere at two sizes, windows, and receptive fields."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)
    normalised = photo - photo.mean((1, 2), keepdim=True)
    begin = time.perf_counter()
    model = _train(normalised)
    seconds = time.perf_counter() - begin
    right = {}
    figure = plt.figure(figsize=(14, 7.9), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(1.12, 1)))
    axes = top.subplot_mosaic([["photo", "same", "other"]])
    axes["photo"].imshow(photo.permute(1, 2, 0))
    _grid(axes["photo"])
    axes["photo"].add_patch(plt.Rectangle((8, 8), _CROP, _CROP, fill=False, edgecolor="white", linewidth=2))
    axes["photo"].set_title(
        f"24 parts to tell apart; it saw crops of\n{_CROP} x {_CROP} pixels (white), enlarged up to {_OTHER} times",
        fontsize=12,
    )
    for name, scale in (("same", 1.0), ("other", _OTHER)):
        whole = F.interpolate(normalised[None], scale_factor=scale, mode="bilinear", antialias=True)
        guesses = _dense(model, whole)
        right[scale] = (guesses == _parts()).float().mean().item()
        axes[name].imshow(_painted(photo, guesses))
        _grid(axes[name])
        size = " x ".join(str(side) for side in whole.shape[2:])
        axes[name].set_title(
            f"The same weights on {size} pixels:\n{right[scale]:.0%} of all positions right", fontsize=12
        )

    windows, fields = cast(np.ndarray, bottom.subfigures(1, 2, width_ratios=(1, 2.35)))
    _draw_windows(windows.subplots(1, 1), model, normalised, photo)
    areas = {}
    for i, (ax, (name, options)) in enumerate(zip(fields.subplots(1, 4), _PARTS.items(), strict=True)):
        field = _field(options)
        areas[name] = (field > 0).float().mean().item()
        ax.imshow((field / field.max()).pow(0.1), cmap="magma", vmin=0, vmax=1)
        ax.plot(2, 2, "+", color=_COLOURS[0], markersize=12, markeredgewidth=2)
        ax.set_title(f"{name}\n{areas[name]:.0%} of the map", fontsize=12)
        ax.set(xticks=(), yticks=())
        if not i:
            ax.set_ylabel("light: moves the pixel at +", fontsize=11)
    fields.suptitle("What a pixel near the corner sees through six layers of 3 x 3 (random weights)", fontsize=13)
    figure.suptitle(
        "TiC: attention in the window of a convolution takes images of any size",
        fontsize=17,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    return {
        "setting": f"{sum(p.numel() for p in model.parameters()):,} parameters, windows of 3 x 3, crops of {_CROP} pixels",
        "whole photograph, positions told right": f"{right[1.0]:.0%} (chance {1 / 24:.0%})",
        f"the same, enlarged {_OTHER} times": f"{right[_OTHER]:.0%}",
        **{f"a corner sees, {name}": f"{area:.0%} of {_FIELD} x {_FIELD}" for name, area in areas.items()},
        "training": f"{_STEPS} steps in {seconds:.0f} s",
    }


def _train(photo: Tensor) -> TiC:
    parts = _parts()
    model = cast(
        TiC,
        heed.create_model(
            "tic_micro", img_size=_CROP, patch_size=4, in_chans=3, num_classes=24, dims=(32, 64), depths=(2, 4)
        ),
    )
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, _STEPS)
    for _ in range(_STEPS):
        scale = 1 + (_OTHER - 1) * torch.rand(()).item()
        side = int(_CROP / scale)
        corners = torch.stack([torch.randint(size - side + 1, (_BATCH,)) for size in _SIZE], 1)
        crops = torch.stack([photo[:, r : r + side, c : c + side] for r, c in corners.tolist()])
        crops = F.interpolate(crops, size=(_CROP, _CROP), mode="bilinear")
        middle = corners + side // 2
        target = parts[middle[:, 0], middle[:, 1]]
        optimiser.zero_grad()
        F.cross_entropy(model(crops), target).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def _parts() -> Tensor:
    """(H, W) which part every pixel belongs to."""
    rows, columns = (torch.arange(side) // _CELL for side in _SIZE)
    return rows[:, None] * (_SIZE[1] // _CELL) + columns


@torch.no_grad()
def _dense(model: TiC, image: Tensor) -> Tensor:
    """The part that the network names around every pixel of the photograph, (H, W), from one run on all of it."""
    features = model.forward_features(image)
    # A window of the size of a crop is averaged, as the classifier's pooling does with a crop.
    window = _CROP // model.feature_info[-1]["reduction"]
    pooled = F.avg_pool2d(features, window + 1, 1, (window + 1) // 2, count_include_pad=False)
    logits = model.head(pooled.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.interpolate(logits, size=_SIZE, mode="bilinear")[0].argmax(0)


def _painted(photo: Tensor, guesses: Tensor) -> np.ndarray:
    """The photograph, green where the guess is right and red where it is wrong."""
    right = guesses == _parts()
    grey = photo.mean(0, keepdim=True)
    colour = torch.where(
        right, torch.tensor([0.0, 0.62, 0.45])[:, None, None], torch.tensor([0.84, 0.37, 0.0])[:, None, None]
    )
    return (0.6 * grey + 0.4 * colour).permute(1, 2, 0).numpy()


def _grid(ax: Axes) -> None:
    for row in range(_CELL, _SIZE[0], _CELL):
        ax.axhline(row - 0.5, color="white", linewidth=0.6)
    for column in range(_CELL, _SIZE[1], _CELL):
        ax.axvline(column - 0.5, color="white", linewidth=0.6)
    ax.set_axis_off()


@torch.no_grad()
def _draw_windows(ax: Axes, model: TiC, normalised: Tensor, photo: Tensor) -> None:
    """The nine weights of the first layer's first head around three places, as light on the photograph."""
    block = cast(torch.nn.Sequential, model.stages[0])[0]
    layer = cast(MSAConv2d, cast(MDCSM, block.layer).layer)
    step = model.config.patch_size
    weights = layer.attention(cast(torch.nn.Module, block.norm)(model.stem(normalised[None])))[0, :9]
    ax.imshow(photo.mean(0), cmap="gray", alpha=0.8)
    for (row, column), colour in zip(_QUERIES, _COLOURS, strict=True):
        r, c = row // step, column // step
        window = weights[:, r, c].view(3, 3)
        side = 24  # drawn larger than it is
        place = (column - side, column + side, row + side, row - side)
        ax.imshow(window, cmap="magma", vmin=0, vmax=float(window.max()), extent=place, alpha=0.85)
        ax.add_patch(plt.Rectangle((place[0], place[3]), 2 * side, 2 * side, fill=False, edgecolor=colour, linewidth=2))
    ax.set(xlim=(0, _SIZE[1]), ylim=(_SIZE[0], 0))
    ax.set_axis_off()
    ax.set_title("Windows of 3 x 3 and their weights,\nenlarged", fontsize=12)


def _field(options: dict[str, object]) -> Tensor:
    """What moves a pixel near the corner, through one stage of six layers."""
    torch.manual_seed(0)
    model = heed.create_model("tic_micro", dims=(16,), depths=(6,), heads=(4,), **options).eval()
    return receptive_field(lambda x: cast(TiC, model).stage_maps(x)[-1], torch.randn(4, 1, _FIELD, _FIELD), (2, 2))

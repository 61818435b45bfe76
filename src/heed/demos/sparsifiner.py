"""Sparsifiner on a photograph: a predictor learns to guess which patches are alike, and only those pairs are computed.

One attention layer whose heads compare patches by colour, and by colour and place; its predictor is fitted to its own
attention on crops of the photograph, and drawn on a crop in another place.
"""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from heed.demos.registry import Figures, demos, photograph
from heed.layers.sparsifiner import AttentionTrace, SparsifinerAttention

_SIZE = (192, 288)
_CROP, _PATCH = 72, 6
_SIDE = _CROP // _PATCH
_WIDTH, _KEEP, _SHARPNESS = 32, 0.25, 6.0
_STEPS, _BATCH, _EVERY = 600, 12, 20
_CORNER = (44, 64)
_QUERIES = ((4, 3), (9, 10))  # row and column of the patches that ask
_COLOURS = ("#56B4E9", "#E69F00")
_HEADS = (("colour", "#D55E00"), ("colour and place", "#0072B2"))


@demos.register("17-sparsifiner")
def sparsifiner(picture: Path) -> Figures:
    """Fit a predictor to attention by likeness; draw attention, guess and choice, and what the choice catches."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)
    features = _Features()
    layer = _layer()
    unseen = features(_crops(photo, 48))
    caught, begin = [_caught(layer, unseen)], time.perf_counter()
    optimiser = torch.optim.Adam(layer.mask_predictor.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, _STEPS, pct_start=0.1)
    for step in range(1, _STEPS + 1):
        layer.train().mask_predictor.reconstructing = True
        trace = layer.trace(features(_crops(photo, _BATCH)))
        loss = (trace.connectivity.scores - trace.unmasked).square().sum() / _BATCH
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % _EVERY == 0:
            caught.append(_caught(layer, unseen))
    seconds = time.perf_counter() - begin

    with torch.no_grad():
        trace = layer.eval().trace(unseen)
        slots = trace.connectivity.index.shape[-1]
        best = trace.unmasked.sort(-1, descending=True).values[..., :slots].sum(-1).mean((0, 2))
        row, column = _CORNER
        crop = photo[:, row : row + _CROP, column : column + _CROP]
        shown = layer.trace(features(crop[None]))
    _draw(picture, crop, shown, torch.stack(caught), best)
    macs = layer.macs()
    work = macs["predictor"] + macs["up"] + macs["attention"]
    figures: Figures = {"setting": f"{_SIDE} x {_SIDE} patches, {len(_HEADS)} heads, {slots} of {_SIDE**2} keys kept"}
    for i, (name, _) in enumerate(_HEADS):
        figures[f"attention on kept pairs, head of {name}"] = (
            f"{caught[0][i]:.0%} before, {caught[-1][i]:.0%} after fitting; no choice catches more than {best[i]:.0%}"
        )
    return figures | {
        "multiply-adds": f"attention {macs['dense'] / 1e6:.2f} M -> {macs['attention'] / 1e6:.2f} M; with predictor "
        f"{work / 1e6:.2f} M, as the layer is narrow",
        "training": f"{_STEPS} steps in {seconds:.0f} s",
    }


class _Features:
    """Tokens whose inner products fall off with the distance in colour, and in colour and place (random Fourier)."""

    def __init__(self) -> None:
        self.colour, self.both = 6 * torch.randn(3, _WIDTH), torch.randn(5, _WIDTH)
        self.both *= torch.tensor([4.8, 4.8, 4.8, 2.1, 2.1])[:, None]
        self.phase = 2 * torch.pi * torch.rand(2, _WIDTH)
        steps = torch.linspace(-1, 1, _SIDE)
        self.place = torch.cartesian_prod(steps, steps)

    def __call__(self, crops: Tensor) -> Tensor:
        """(B, 3, s, s) -> (B, patches, 2 * width)"""
        colour = torch.nn.functional.avg_pool2d(crops, _PATCH).flatten(2).mT
        both = torch.cat([colour, self.place.expand(len(crops), -1, -1)], -1)
        waves = [colour @ self.colour + self.phase[0], both @ self.both + self.phase[1]]
        return (2 / _WIDTH) ** 0.5 * torch.cat(waves, -1).cos()


def _layer() -> SparsifinerAttention:
    """Queries and keys are the features themselves, scaled so that alike patches stand out."""
    dim = len(_HEADS) * _WIDTH
    layer = SparsifinerAttention(
        dim, len(_HEADS), _SIDE**2, keep=_KEEP, prefix=0, reduce_n=4, basis_threshold=0.001, qkv_bias=False
    )
    sharp = (_SHARPNESS * _WIDTH**0.5) ** 0.5
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat([sharp * torch.eye(dim), sharp * torch.eye(dim), torch.eye(dim)]))
    return layer


def _crops(photo: Tensor, count: int) -> Tensor:
    corners = torch.stack([torch.randint(side - _CROP + 1, (count,)) for side in _SIZE], 1)
    return torch.stack([photo[:, r : r + _CROP, c : c + _CROP] for r, c in corners.tolist()])


@torch.no_grad()
def _caught(layer: SparsifinerAttention, tokens: Tensor) -> Tensor:
    """(heads,) the share of unmasked attention that falls on kept pairs."""
    trace = layer.eval().trace(tokens)
    return (trace.unmasked * trace.mask).sum(-1).mean((0, 2))


def _draw(picture: Path, image: Tensor, trace: AttentionTrace, caught: Tensor, best: Tensor) -> None:
    columns = [[f"{name} {i}" for name in ("attention", "scores", "kept")] for i in range(2)]
    figure, axes = plt.subplot_mosaic(
        [["image", *columns[0], "dense", "mask"], ["image", *columns[1], "curve", "curve"]],
        figsize=(17, 6.6),
        width_ratios=(1.3, 1, 1, 1, 1.05, 1.05),
        layout="constrained",
    )
    axes["image"].imshow(image.permute(1, 2, 0), extent=(0, _CROP, _CROP, 0))
    axes["image"].set_title("A crop, and two patches that ask", fontsize=12)
    for number, (row, column) in enumerate(_QUERIES):  # each shows one head
        name, colour = _HEADS[number]
        _mark(axes["image"], number, 3)
        query = row * _SIDE + column
        maps = (
            trace.unmasked[0, number, query],
            trace.connectivity.scores[0, number, query],
            trace.mask[0, number, query],
        )
        titles = f"Attention by {name}", "The predictor's guess", f"The {_KEEP:.0%} of keys kept"
        for panel, title, values in zip(columns[number], titles, maps, strict=True):
            _light(axes[panel], image, values.float().view(_SIDE, _SIDE), kept=panel.startswith("kept"))
            _mark(axes[panel], number, 2)
            axes[panel].set_title(title, fontsize=12, color=colour)
    axes["dense"].imshow(trace.unmasked[0, 0].sqrt(), cmap="inferno")
    axes["dense"].set_title("All queries x keys: attention ...", fontsize=12)
    axes["mask"].imshow(trace.mask[0, 0], cmap="Blues", vmin=0, vmax=1.2)
    axes["mask"].set_title("... and the pairs computed", fontsize=12)
    for name, ax in axes.items():
        if name != "curve":
            ax.set(xticks=(), yticks=())
    _draw_curve(axes["curve"], caught, best)
    figure.suptitle(
        "Sparsifiner: guess cheaply where attention will fall, then compute only that", fontsize=17, x=0.01, ha="left"
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def _light(ax: Axes, image: Tensor, values: Tensor, *, kept: bool) -> None:
    """A map over the patches as light on the crop; kept keys show the crop itself."""
    extent = (0, _CROP, _CROP, 0)
    ax.imshow(image.permute(1, 2, 0) if kept else image.mean(0), cmap="gray", extent=extent)
    if kept:
        ax.imshow(np.zeros((_SIDE, _SIDE)), cmap="gray", alpha=0.88 * (1 - values.numpy()), extent=extent)
        return
    light = (values / values.max()).clamp(0, 1)
    ax.imshow(np.zeros((_SIDE, _SIDE)), cmap="gray", extent=extent, alpha=0.6)
    ax.imshow(light, cmap="inferno", vmin=0, vmax=1, alpha=light.sqrt().numpy(), extent=extent)


def _mark(ax: Axes, number: int, width: float) -> None:
    row, column = (_PATCH * x for x in _QUERIES[number])
    ax.add_patch(plt.Rectangle((column, row), _PATCH, _PATCH, fill=False, edgecolor=_COLOURS[number], linewidth=width))


def _draw_curve(ax: Axes, caught: Tensor, best: Tensor) -> None:
    steps = torch.arange(len(caught)) * _EVERY
    for i, (name, colour) in enumerate(_HEADS):
        ax.plot(steps, caught[:, i], color=colour, linewidth=2.4)
        ax.axhline(float(best[i]), color=colour, linewidth=1, linestyle=":")
        ax.text(_STEPS, float(caught[-1, i]) - 0.03, name, color=colour, ha="right", va="top", fontweight="bold")
    ax.text(_STEPS, float(best[0]) + 0.01, "dotted: the best choice there is", fontsize=9, ha="right", va="bottom")
    ax.set(xlabel="step of fitting the predictor", ylim=(0.15, 1.02))
    ax.set_title("Attention that falls on the pairs computed", fontsize=12)
    ax.spines[["top", "right"]].set_visible(False)

"""Polarized self-attention on a photograph: a small network learns to find a cat's eyes and nose, and shows its masks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from heed.demos.registry import Figures, demos, photograph
from heed.layers.psa import PSA, insert_psa, psa_overhead
from heed.vision.psa import gaussian_heatmaps, peaks

_SIZE, _CROP = (108, 162), (64, 96)
# (row, column) of the key points as shares of the photograph's height and width, with Okabe and Ito's colours.
_POINTS = {"left eye": (0.385, 0.385), "right eye": (0.44, 0.71), "nose": (0.80, 0.585)}
_COLOURS = ("#D55E00", "#009E73", "#56B4E9")
_WIDTH, _STEPS, _BATCH, _SIGMA, _STRIDE = 24, 200, 4, 1.5, 2


@demos.register("35-psa")
def psa(picture: Path) -> Figures:
    """Train on turned and scaled crops of the photograph, and draw the heat maps and the masks on a new one."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)
    model = nn.Sequential(
        nn.Conv2d(3, _WIDTH, 5, _STRIDE, 2),
        *(BasicBlock(_WIDTH, _WIDTH) for _ in range(3)),
        nn.Conv2d(_WIDTH, len(_POINTS), 1),
    )
    # The paper's formulas: the spatial masks of the authors' code, softmaxes over all pixels, hardly leave 0.5.
    inserted = insert_psa(model, variant="paper")
    draw, begin = torch.Generator().manual_seed(0), time.perf_counter()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, _STEPS)
    for _ in range(_STEPS):
        images, points = _crops(photo, _BATCH, draw)
        loss = F.mse_loss(model(images), _targets(points))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    seconds = time.perf_counter() - begin

    images, points = _crops(photo, 32, torch.Generator().manual_seed(1))
    masks: list[tuple[Tensor, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, PSA)]
    hooks = [layer.register_forward_pre_hook(_noting(masks)) for layer in layers]
    with torch.no_grad():
        heatmaps = model.eval()(images)
    for hook in hooks:
        hook.remove()
    error = (peaks(heatmaps) * _STRIDE - points).norm(dim=-1)

    figure = plt.figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplot_mosaic("aabb;0123;cccc", height_ratios=(1.75, 1, 0.75))
    shown = int(error.amax(1).argmin())
    _draw_points(axes["a"], images[shown], points[shown], peaks(heatmaps)[shown] * _STRIDE)
    _draw_heatmaps(axes["b"], images[shown], heatmaps[shown])
    _show(axes["0"], images[shown])
    axes["0"].set_title("the image", fontsize=11, loc="left")
    for number, (_, spatial) in enumerate(masks, 1):
        mask = spatial[shown, 0]
        inner = mask[5:-5, 5:-5]  # the border answers to the convolutions' padding
        axes[str(number)].imshow(mask.numpy(), cmap="magma", vmin=inner.min().item(), vmax=inner.max().item())
        axes[str(number)].set_title(
            f"spatial mask {number}: {mask.min():.2f} to {mask.max():.2f}", fontsize=11, loc="left"
        )
        axes[str(number)].set_axis_off()
    _draw_channels(axes["c"], [channel[shown].flatten() for channel, _ in masks])
    figure.suptitle(
        "Polarized self-attention: every block weighs its channels by one mask and its pixels by another",
        fontsize=15,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    spent, whole = psa_overhead(model, images[:1])
    return {
        "network": str(inserted),
        "multiply-adds": f"{whole / 1e6:.1f} M for an image, {spent / whole:.1%} of them in the PSAs",
        "spatial masks": ", ".join(f"{m[shown].min():.2f} to {m[shown].max():.2f}" for _, m in masks),
        "error on 32 new crops": f"median {error.median():.1f} pixels of {_CROP[1]} x {_CROP[0]}",
        "training": f"{_STEPS} steps in {seconds:.0f} s",
    }


def _noting(masks: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that keeps the masks a PSA is about to use."""

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, PSA)
        masks.append(layer.masks(inputs[0]))

    return note


def _crops(photo: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops (count, 3, h, w), turned by up to 20 degrees, scaled and shifted, and where the key points lie in them."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=draw)

    angle, scale = uniform(-0.35, 0.35), uniform(0.75, 1.0)
    aspect = _SIZE[1] / _SIZE[0]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # What grid_sample wants: from (x, y) in the crop to (x, y) in the photograph, both in [-1, 1].
    turn = torch.stack([torch.stack([cos, -sin / aspect], 1), torch.stack([sin * aspect, cos], 1)], 1)
    shift = torch.stack([uniform(-0.15, 0.15), uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(torch.cat([turn, shift[..., None]], 2), [count, 3, *_CROP], align_corners=False)
    images = F.grid_sample(photo.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
    brightness = uniform(0.7, 1.2).view(-1, 1, 1, 1)
    in_photo = torch.tensor(list(_POINTS.values())).flip(1) * 2 - 1  # (x, y)
    in_crop = torch.linalg.solve(turn, (in_photo - shift[:, None]).transpose(1, 2)).transpose(1, 2)
    pixels = ((in_crop + 1) * torch.tensor([_CROP[1], _CROP[0]]) - 1) / 2
    return images * brightness, pixels.flip(2)


def _targets(points: Tensor) -> Tensor:
    return gaussian_heatmaps(points / _STRIDE, (_CROP[0] // _STRIDE, _CROP[1] // _STRIDE), _SIGMA)


def _show(ax: Axes, image: Tensor, alpha: float = 1.0) -> None:
    ax.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), alpha=alpha)
    ax.set_axis_off()


def _draw_points(ax: Axes, image: Tensor, points: Tensor, found: Tensor) -> None:
    _show(ax, image)
    for name, colour, true, guess in zip(_POINTS, _COLOURS, points.tolist(), found.tolist(), strict=True):
        ax.plot(true[1], true[0], "o", markersize=19, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2)
        ax.plot(guess[1], guess[0], "+", color=colour, markersize=15, markeredgewidth=3, label=name)
    ax.legend(loc="upper left", fontsize=11)
    ax.set_title("A new crop: truth (circle) and peak of the heat map (cross)", fontsize=12, loc="left")


def _draw_heatmaps(ax: Axes, image: Tensor, heatmaps: Tensor) -> None:
    colours = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in _COLOURS])
    heat = F.interpolate(heatmaps[None].clamp(min=0), _CROP, mode="bilinear")[0]
    heat = heat / heat.amax((1, 2), keepdim=True)
    grey = (0.5 * image.mean(0)).expand(3, -1, -1)
    alpha = heat.amax(0)
    mixed = grey * (1 - alpha) + torch.einsum("khw,kc->chw", heat / heat.sum(0).clamp(min=1e-6), colours) * alpha
    _show(ax, mixed)
    ax.set_title("The three heat maps", fontsize=12, loc="left")


def _draw_channels(ax: Axes, masks: list[Tensor]) -> None:
    for number, (mask, shade) in enumerate(zip(masks, ("#0072B2", "#E69F00", "#CC79A7"), strict=True)):
        ax.bar(np.arange(_WIDTH) + 0.27 * (number - 1), mask.numpy() - 0.5, 0.27, 0.5, color=shade,
               label=f"block {number + 1}")  # fmt: skip
    ax.axhline(0.5, color="gray", linewidth=0.8)
    ax.set(xlabel="channel", xlim=(-0.6, _WIDTH - 0.4))
    ax.legend(ncols=3, fontsize=10, loc="lower right", bbox_to_anchor=(1, 1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("Channel masks", fontsize=11, loc="left")

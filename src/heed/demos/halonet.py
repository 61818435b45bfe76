"""Halo attention on a photograph: a layer whose weights are set by hand removes noise by averaging similar pixels.

Non-local means (Buades et al., CVPR 2005) is attention over patches, softmax_j(-|p_i - p_j|^2 / t) x_j, so the windows
of halo attention can be seen at work without any training: what a block may not see, it cannot average.
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
from torch import Tensor

from heed.demos.registry import Figures, demos, photograph
from heed.engine.attend import attend
from heed.engine.patterns import Halo
from heed.layers.halo import HaloAttention

_SIZE = (192, 288)
_BLOCK = 16
_HALOS = (0, 2, 4, 8, 12)
_SHOWN = 8  # the halo in the picture
_NOISE = 0.08  # standard deviation, of a picture in [0, 1]
_PATCH = 5  # pixels
_TEMPERATURE = 0.65 * _NOISE**2  # of the mean squared difference of two patches
# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {(86, 101): "#0072B2", (150, 171): "#D55E00", (99, 194): "#009E73"}  # (row, column) of queries
_CROP = (slice(48, 112), slice(80, 176))


@demos.register("04-halonet")
def halonet(picture: Path) -> Figures:
    """Denoise with growing halos, and draw the windows and the weights of a few queries."""
    clean = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)[None]
    noisy = clean + _NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    features = _patches(noisy)
    denoised, seconds = {}, {}
    for halo in _HALOS:
        layer = non_local_means(halo)
        begin = time.perf_counter()
        with torch.inference_mode():
            denoised[halo] = layer(features)
        seconds[halo] = time.perf_counter() - begin
    quality = {halo: _psnr(image, clean) for halo, image in denoised.items()}

    figure = plt.figure(figsize=(12, 7.8), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(2.2, 1)))
    axes = top.subplot_mosaic("Aab;Acq", width_ratios=(3, 1, 1)) | bottom.subplot_mosaic("nzho")
    _draw_windows(axes["A"], noisy)
    for name, (query, colour) in zip("abc", _COLOURS.items(), strict=True):
        _draw_weights(axes[name], noisy, query, colour)
    _draw_quality(axes["q"], quality)
    crops = {
        "n": (noisy, f"noisy, {_psnr(noisy, clean):.1f} dB"),
        "z": (denoised[0], f"halo 0, {quality[0]:.1f} dB"),
        "h": (denoised[_SHOWN], f"halo {_SHOWN}, {quality[_SHOWN]:.1f} dB"),
        "o": (clean, "the photograph"),
    }
    for name, (image, title) in crops.items():
        axes[name].imshow(_shown(image)[_CROP], interpolation="nearest")
        axes[name].set_title(title, fontsize=12, loc="left")
        axes[name].set_axis_off()
    figure.suptitle(
        f"Halo attention: the {_BLOCK} x {_BLOCK} queries of a block share one window, the block and a halo around it",
        fontsize=15,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    figures: Figures = {"noisy picture": f"{_psnr(noisy, clean):.2f} dB against the photograph"}
    for halo in _HALOS:
        cost = non_local_means(halo).complexity(*_SIZE)
        figures[f"block {_BLOCK}, halo {halo}"] = (
            f"{quality[halo]:.2f} dB, window {cost.receptive_field}, keys copied {cost.memory_ratio:.1f} times "
            f"({cost.per_pixel_ratio} with a window per pixel), {seconds[halo]:.2f} s"
        )
    return figures | {"tokens": _SIZE[0] * _SIZE[1], "threads": torch.get_num_threads()}


def non_local_means(halo: int) -> HaloAttention:
    """A halo attention layer on `_patches` that averages the pixels of a window by the likeness of their patches.

    -|p - p'|^2 = 2 p . p' - |p'|^2 + a constant of the query, so q = [2 p, 1] / t and k = [p', -|p'|^2].
    """
    width = 3 * _PATCH**2
    layer = HaloAttention(
        width + 2, 3, num_heads=1, dim_head=width + 1, block_size=_BLOCK, halo_size=halo, padding="mask"
    )
    for parameter in layer.parameters():
        parameter.requires_grad_(False).zero_()
    scale = 1 / (width * _TEMPERATURE * layer.scale)
    q, kv = layer.q.weight[:, :, 0, 0], layer.kv.weight[:, :, 0, 0]
    patch = torch.arange(width)
    q[patch, patch] = 2 * scale
    kv[patch, patch] = 1
    q[width, width] = scale  # this input channel is 1 everywhere
    kv[width, width + 1] = -1  # and this one |p|^2
    colour = torch.arange(3)
    kv[width + 1 + colour, colour * _PATCH**2 + _PATCH**2 // 2] = 1  # values: the pixel in the middle of the patch
    return layer


def _patches(image: Tensor) -> Tensor:
    """(1, 3, H, W) to the patch around every pixel, 1, and the patch's squared length: (1, 3 P^2 + 2, H, W)."""
    around = F.pad(image, (_PATCH // 2,) * 4, mode="reflect")
    patches = F.unfold(around, _PATCH).unflatten(2, image.shape[2:])
    return torch.cat([patches, torch.ones_like(patches[:, :1]), patches.square().sum(1, keepdim=True)], 1)


def _weights(features: Tensor, query: tuple[int, int]) -> Tensor:
    """(48, 48) weights of a query on the 3 x 3 blocks around its own."""
    layer = non_local_means(_SHOWN)
    side = 3 * _BLOCK
    top, left = (x // _BLOCK * _BLOCK - _BLOCK for x in query)
    nine = features[..., top : top + side, left : left + side]
    q, (k, v) = layer.q(nine), layer.kv(nine).split([layer.dim_head, 3], 1)
    q, k, v = (x.flatten(2).transpose(1, 2)[:, None] for x in (q, k, v))
    pattern = Halo((side, side), _BLOCK, _SHOWN)
    _, weights = attend(q, k, v, pattern, scale=layer.scale, return_weights=True)
    return weights[0, 0].view(side, side, side, side)[query[0] - top, query[1] - left]


def _draw_windows(ax: Axes, noisy: Tensor) -> None:
    image = _shown(noisy)
    pale = 0.45 * image.mean(2, keepdims=True).repeat(3, 2) + 0.5  # what a query sees keeps its colours
    for query in _COLOURS:
        window = tuple(slice(x // _BLOCK * _BLOCK - _SHOWN, (x // _BLOCK + 1) * _BLOCK + _SHOWN) for x in query)
        pale[window] = image[window]
    ax.imshow(pale, interpolation="nearest")
    ax.set_xticks(np.arange(0, _SIZE[1], _BLOCK) - 0.5)
    ax.set_yticks(np.arange(0, _SIZE[0], _BLOCK) - 0.5)
    ax.grid(color="white", linewidth=0.5, alpha=0.7)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    for query, colour in _COLOURS.items():
        _outline(ax, query, colour)
    ax.set_title("Three blocks (solid) and their windows (dashed) on the noisy picture", fontsize=12, loc="left")


def _draw_weights(ax: Axes, noisy: Tensor, query: tuple[int, int], colour: str) -> None:
    top, left = (x // _BLOCK * _BLOCK - _BLOCK for x in query)
    side = 3 * _BLOCK
    extent = (left - 0.5, left + side - 0.5, top + side - 0.5, top - 0.5)
    ax.imshow(_shown(noisy)[top : top + side, left : left + side].mean(2), cmap="gray", extent=extent)
    weights = _weights(_patches(noisy), query)
    ax.imshow(np.zeros((side, side)), cmap="gray", extent=extent, alpha=0.75 * (weights > 0).float().numpy())
    strength = (weights / weights.flatten().topk(8).values[-1]).clamp(max=1).sqrt().numpy()
    ax.imshow(strength, cmap="inferno", vmin=0, vmax=1, extent=extent, alpha=strength)
    _outline(ax, query, colour)
    ax.set_axis_off()
    ax.set_title("attention of the dot", fontsize=11, loc="left", color=colour)


def _outline(ax: Axes, query: tuple[int, int], colour: str) -> None:
    row, column = (x // _BLOCK * _BLOCK - 0.5 for x in query)
    for margin, style in ((0, "-"), (_SHOWN, (0, (3, 2)))):
        side = _BLOCK + 2 * margin
        box = Rectangle(
            (column - margin, row - margin),
            side,
            side,
            edgecolor=colour,
            facecolor="none",
            linewidth=2.2,
            linestyle=style,
        )
        ax.add_patch(box)
    ax.plot(query[1], query[0], "o", color=colour, markeredgecolor="white", markersize=7)


def _draw_quality(ax: Axes, quality: dict[int, float]) -> None:
    ax.plot(list(quality), list(quality.values()), "o-", color="#0072B2")
    for halo, value in quality.items():
        ax.annotate(f"{value:.1f}", (halo, value), textcoords="offset points", xytext=(4, -15), fontsize=10)
    ax.set(xlabel="halo (pixels)", xticks=list(quality), yticks=[])
    ax.margins(x=0.18, y=0.25)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_title("PSNR (dB)", fontsize=11, loc="left")


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * torch.log10(F.mse_loss(image, clean)).item()


def _shown(image: Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).clamp(0, 1).numpy()

"""Dilation on a photograph: colour has to travel from a few hints, and only dilated layers carry it across the picture.

Four layers whose weights are set by hand pass colour on between tokens that look alike, softmax_j(-|f_i - f_j|^2 / t),
f a grey patch: colourisation after Levin et al., "Colorization using Optimization" (SIGGRAPH 2004), by attention. So
what differs between two stacks of layers is their windows, not their training.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from heed.demos.registry import Figures, demos, photograph
from heed.engine.patterns import Neighborhood
from heed.layers.natten import neighborhood_flops
from heed.layers.neighborhood import NeighborhoodAttention2D
from heed.vision.nat_dilations import receptive_field

_GRID, _PIXELS = (64, 96), 4  # tokens, pixels per token and axis
_WINDOW = 7
_AROUND = 5  # side of the grey patches that are compared, in tokens
_TEMPERATURE = 0.006  # of the mean squared difference of two patches, of a picture in [0, 1]
_NETWORKS = {"NAT": (1, 1, 1, 1), "DiNAT": (1, 9, 1, 9)}  # the authors' rule: 1 and 64 / 7 in turns
_COLOURS = {"NAT": "#D55E00", "DiNAT": "#0072B2"}  # of Okabe and Ito's palette
# Hinted tokens: the eyes, the nose, an ear, the fur, what lies behind.
_HINTS = (
    (24, 33), (25, 39), (28, 69), (51, 57), (9, 80), (12, 55),
    (22, 12), (40, 22), (54, 32), (37, 60), (30, 88), (52, 84),
)  # fmt: skip
_GROWTH = 3  # the window whose reach is drawn over the layers
_QUERY = (26, 48)
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@demos.register("58-dinat")
def dinat(picture: Path) -> Figures:
    """Colour a photograph from a few hints with and without dilation, and draw how far each layer sees."""
    photo = torch.from_numpy(photograph(_GRID[0] * _PIXELS, _GRID[1] * _PIXELS))
    grey = (photo * _LUMA).sum(-1)
    chroma = torch.stack([photo[..., 0] - grey, photo[..., 2] - grey], -1)  # red and blue less grey
    colour = _shrunk(chroma)
    features = _patches(_shrunk(grey[..., None])[..., 0])
    hinted = torch.zeros(_GRID, dtype=torch.bool)
    hinted[tuple(torch.tensor(_HINTS).T)] = True
    coloured = {name: _pass_on(features, colour, hinted, dilations) for name, dilations in _NETWORKS.items()}

    figure, axes = plt.subplot_mosaic(
        [["in", "nat", "dinat", "true"], ["see nat", "see dinat", "curve", "curve"]],
        figsize=(16, 6.6),
        layout="constrained",
    )
    _show_hints(axes["in"], grey, colour, hinted)
    for key, name in (("nat", "NAT"), ("dinat", "DiNAT")):
        axes[key].imshow(_picture(grey, coloured[name]))
        axes[key].set_title(f"{name}: dilations {_NETWORKS[name]}", color=_COLOURS[name], fontsize=12, loc="left")
        _show_reach(axes[f"see {key}"], photo, name)
    axes["true"].imshow(photo)
    axes["true"].set_title("The photograph", fontsize=12, loc="left")
    for key in ("nat", "dinat", "true"):
        axes[key].set_axis_off()
    _draw_growth(axes["curve"])
    figure.suptitle(
        "Dilated neighborhood attention: as many keys and multiplications, and the hints reach the whole picture",
        fontsize=16,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    figures: Figures = {
        "setting": f"{_GRID[0]} x {_GRID[1]} tokens, 4 layers of {_WINDOW} x {_WINDOW} keys, {len(_HINTS)} hints",
        "error of colour without hints": f"{colour.square().mean().sqrt():.4f}",
    }
    for name, dilations in _NETWORKS.items():
        reach = [receptive_field(side, _WINDOW, dilations).float().mean().item() for side in _GRID]
        cost = sum(neighborhood_flops(Neighborhood(_GRID, _WINDOW, d), head_dim=_channels()) for d in dilations)
        figures[name] = (
            f"error of colour {(coloured[name] - colour).square().mean().sqrt():.4f}, a token sees "
            f"{reach[0] * reach[1]:.0%} of the others, {cost / 1e6:.0f} M multiply-adds in windows"
        )
    return figures


def _pass_on(features: Tensor, colour: Tensor, hinted: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Colour (H, W, 2) of all tokens from that of the hinted ones; 0, which is grey, where no hint arrives."""
    there = hinted[..., None].float()
    x = torch.cat(
        [features, torch.ones_like(there), features.square().sum(-1, keepdim=True), colour * there, there], -1
    )
    x = x[None]
    with torch.inference_mode():
        for dilation in dilations:
            x = x + _layer(dilation)(x)
    red_blue, share = x[0, ..., -3:-1], x[0, ..., -1:]
    return red_blue / share.clamp(min=1e-12)


def _channels() -> int:
    return _AROUND**2 + 5


def _layer(dilation: int) -> NeighborhoodAttention2D:
    """Neighborhood attention on [f, 1, |f|^2, hints] that adds up the hints of the tokens whose f is alike.

    -|f - f'|^2 = 2 f . f' - |f'|^2 + a constant of the query, so q = [2 f, 1] / t and k = [f', -|f'|^2].
    """
    width, dim = _AROUND**2, _channels()
    layer = NeighborhoodAttention2D(dim, 1, _WINDOW, dilation=dilation)
    for parameter in layer.parameters():
        parameter.requires_grad_(False).zero_()
    q, k, v = layer.qkv.weight.view(3, dim, dim)
    patch = torch.arange(width)
    scale = 1 / (width * _TEMPERATURE * layer.scale)
    q[patch, patch], k[patch, patch] = 2 * scale, 1
    q[width, width], k[width, width + 1] = scale, -1
    hints = torch.arange(dim - 3, dim)
    v[hints, hints] = 1
    layer.proj.weight[hints, hints] = 1
    return layer


def _shrunk(pixels: Tensor) -> Tensor:
    """(H, W, C) pixels to the means of tokens (h, w, C)."""
    return F.avg_pool2d(pixels.permute(2, 0, 1), _PIXELS).permute(1, 2, 0)


def _patches(grey: Tensor) -> Tensor:
    """(h, w) to the patch around every token, (h, w, _AROUND ** 2)."""
    around = F.pad(grey[None, None], (_AROUND // 2,) * 4, mode="reflect")
    return F.unfold(around, _AROUND)[0].T.reshape(*_GRID, -1)


def _picture(grey: Tensor, colour: Tensor) -> np.ndarray:
    """Grey pixels (H, W) and the colour of tokens (h, w, 2) as RGB (H, W, 3)."""
    size = [side * _PIXELS for side in _GRID]
    red, blue = F.interpolate(colour.permute(2, 0, 1)[None], size, mode="bicubic", align_corners=False)[0]
    red, blue = red + grey, blue + grey
    green = (grey - _LUMA[0] * red - _LUMA[2] * blue) / _LUMA[1]
    return torch.stack([red, green, blue], -1).clamp(0, 1).numpy()


def _show_hints(ax: Axes, grey: Tensor, colour: Tensor, hinted: Tensor) -> None:
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
    flat = _picture(torch.full_like(grey, 0.5), 2 * colour)
    for row, column in hinted.nonzero().tolist():
        middle = row * _PIXELS + _PIXELS // 2, column * _PIXELS + _PIXELS // 2
        ax.plot(middle[1], middle[0], "o", color=flat[middle], markersize=10, markeredgecolor="white")
    ax.set_title(f"What both see: grey, and {len(_HINTS)} hints of colour", fontsize=12, loc="left")
    ax.set_axis_off()


def _show_reach(ax: Axes, photo: Tensor, name: str) -> None:
    """The tokens that a query sees after each layer, nested."""
    pale = 0.35 * photo.mean(-1, keepdim=True).repeat(1, 1, 3) + 0.62
    ax.imshow(pale.numpy())
    for layers in range(len(_NETWORKS[name]), 0, -1):
        dilations = _NETWORKS[name][:layers]
        rows, columns = (
            receptive_field(side, _WINDOW, dilations)[at].nonzero()[[0, -1], 0].tolist()
            for side, at in zip(_GRID, _QUERY, strict=True)
        )
        corner = columns[0] * _PIXELS - 0.5, rows[0] * _PIXELS - 0.5
        width, height = (columns[1] - columns[0] + 1) * _PIXELS, (rows[1] - rows[0] + 1) * _PIXELS
        ax.add_patch(Rectangle(corner, width, height, color=_COLOURS[name], alpha=0.2, linewidth=0))
        ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_COLOURS[name], linewidth=1.3))
    ax.set_title(f"{name}: what a token sees after 1, 2, 3, 4 layers", color=_COLOURS[name], fontsize=11, loc="left")
    ax.set_axis_off()


def _draw_growth(ax: Axes) -> None:
    layers = range(1, 6)
    schedules = {"NAT": [1] * 5, "DiNAT": [_GROWTH**i for i in range(5)]}
    laws = {"NAT": "dilations 1, 1, 1, ...: 1 + L (k - 1)", "DiNAT": r"dilations 1, k, $k^2$, ...: $k^L$"}
    for name, schedule in schedules.items():
        side = 3 * _GROWTH**5
        seen = [receptive_field(side, _GROWTH, schedule[:n])[side // 2].sum().item() for n in layers]
        ax.semilogy(layers, seen, "o-", color=_COLOURS[name], linewidth=2.2)
        for n, count in zip(layers, seen, strict=True):
            ax.annotate(str(count), (n, count), (0, 7), textcoords="offset points", ha="center", color=_COLOURS[name])
        ax.annotate(laws[name], (3.75, seen[3]), (6, -13), textcoords="offset points", color=_COLOURS[name], va="top")
    ax.set(xticks=list(layers), xlabel="layers L", ylim=(2, 600), yticks=[])
    ax.minorticks_off()
    ax.set_title(f"Tokens seen along an axis, windows of k = {_GROWTH}", fontsize=12, loc="left")
    ax.spines[["top", "right", "left"]].set_visible(False)

"""DaViT's two kinds of attention on a photograph: what reaches a token inside its window, and through the channels."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import heed
from heed.demos.registry import Figures, demos, photograph
from heed.explain.attention import layer_attention
from heed.layers.channel import ChannelGroupAttention
from heed.layers.window import WindowAttention
from heed.vision.davit import BlockCost, DaViT

_SIZE, _PATCH, _WINDOW = (168, 252), 4, 7
_DIM, _HEADS = 96, 3
# Okabe and Ito's palette, which colour-blind readers can tell apart. (row, column) of query tokens.
_QUERIES = {(17, 24): "#D55E00", (24, 52): "#009E73", (3, 10): "#0072B2"}
_SIDES = (224, 448, 672, 896, 1344)


@demos.register("24-davit")
def davit(picture: Path) -> Figures:
    """Draw which tokens move three outputs, for window attention, channel attention and one after the other."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE))
    tokens = _tokens(photo)
    window = WindowAttention(_DIM, _HEADS, _WINDOW)
    channel = ChannelGroupAttention(_DIM, _HEADS, v2=True)
    for layer, sharpness in ((window, 1.5), (channel, 0.75)):  # untrained, but with logits that make choices
        nn.init.normal_(layer.qkv.weight, std=sharpness * _DIM**-0.5)
    layers = {
        "Window attention": window,
        "Channel attention": channel,
        "One after the other": nn.Sequential(_Residual(window), _Residual(channel)),
    }
    maps = {
        title: {
            query: layer_attention(layer, tokens, query, directions=16, generator=torch.Generator().manual_seed(0))
            for query in _QUERIES
        }
        for title, layer in layers.items()
    }
    beyond = {
        title: sum(1 - float(reach[_window_of(query)].sum()) for query, reach in reaches.items()) / len(_QUERIES)
        for title, reaches in maps.items()
    }
    with torch.device("meta"):
        model = cast(DaViT, heed.create_model("davit_tiny"))
    costs = {side: model.complexity(side, side) for side in _SIDES}

    figure = plt.figure(figsize=(12, 11.6), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(2.75, 1)))
    axes = top.subplot_mosaic("pw;cd") | bottom.subplot_mosaic("012k", width_ratios=(1, 1, 1, 1.7))
    _draw_photo(axes["p"], photo)
    for name, (title, reaches) in zip("wcd", maps.items(), strict=True):
        _draw_reach(axes[name], photo, reaches, f"{title}: {beyond[title]:.0%} from beyond the window")
    with torch.no_grad():
        weights = channel.weights(tokens[None])[0]
    for group, matrix in enumerate(weights):
        ax = axes[str(group)]
        ax.imshow(matrix.sqrt().numpy(), cmap="magma", vmin=0)
        ax.set(xticks=[], yticks=[], xlabel="channel seen", ylabel="output channel" if group == 0 else "")
        ax.set_title(f"group {group + 1}: {len(matrix)} x {len(matrix)} weights", fontsize=11, loc="left")
    _draw_costs(axes["k"], {side: _attention_share(cost) for side, cost in costs.items()})
    figure.suptitle(
        "DaViT: windows mix near tokens, channels mix the whole picture, and neither pays for pairs of tokens",
        fontsize=15,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    rows, columns = tokens.shape[:2]
    small, large = (_attention_share(costs[side]) for side in (_SIDES[0], _SIDES[-1]))
    return {
        "setting": f"{rows} x {columns} tokens of {_PATCH} x {_PATCH} pixels, windows of {_WINDOW} x {_WINDOW}, "
        f"{_HEADS} groups of {_DIM // _HEADS} channels",
        **{f"{title.lower()}, influence from beyond the window": f"{share:.1%}" for title, share in beyond.items()},
        "DaViT-Tiny's blocks": f"{small[0] / 1e9:.1f} G multiply-adds at {_SIDES[0]} pixels, {large[0] / 1e9:.0f} G at "
        f"{_SIDES[-1]}; {large[1] / 1e9:.0f} G were the attention dense",
    }


class _Residual(nn.Module):
    """x + layer(LN(x)), the frame in which a block has its attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(F.layer_norm(x, x.shape[-1:]))


def _tokens(photo: Tensor) -> Tensor:
    """(H, W, 3) to normalised patches in a random basis, (H/p, W/p, dim)."""
    rows, columns = photo.shape[0] // _PATCH, photo.shape[1] // _PATCH
    patches = photo.view(rows, _PATCH, columns, _PATCH, 3).transpose(1, 2).reshape(rows, columns, -1)
    patches = (patches - patches.mean((0, 1))) / patches.std()
    basis = nn.init.orthogonal_(torch.empty(_DIM, patches.shape[-1]))
    return F.layer_norm(patches @ basis.T, (_DIM,))


def _window_of(query: tuple[int, int]) -> tuple[slice, slice]:
    row, column = (x // _WINDOW * _WINDOW for x in query)
    return slice(row, row + _WINDOW), slice(column, column + _WINDOW)


def _attention_share(costs: list[BlockCost]) -> tuple[int, int]:
    """Multiply-adds of all blocks, and were their attention dense."""
    return sum(c.multiply_adds for c in costs), sum(c.dense for c in costs)


def _frame(ax: Axes) -> None:
    pixels = _PATCH * _WINDOW
    ax.set_xticks(np.arange(0, _SIZE[1], pixels) - 0.5)
    ax.set_yticks(np.arange(0, _SIZE[0], pixels) - 0.5)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    for query, colour in _QUERIES.items():
        row, column = (x // _WINDOW * pixels - 0.5 for x in query)
        ax.add_patch(Rectangle((column, row), pixels, pixels, edgecolor=colour, facecolor="none", linewidth=2.2))
        centre = [(x + 0.5) * _PATCH for x in query]
        ax.plot(centre[1], centre[0], "o", color=colour, markeredgecolor="white", markersize=7)


def _draw_photo(ax: Axes, photo: Tensor) -> None:
    ax.imshow(photo.numpy())
    ax.grid(color="white", linewidth=0.6, alpha=0.8)
    _frame(ax)
    ax.set_title(f"Windows of {_WINDOW} x {_WINDOW} tokens, and three of the tokens", fontsize=12, loc="left")


def _draw_reach(ax: Axes, photo: Tensor, reaches: dict[tuple[int, int], Tensor], title: str) -> None:
    ax.imshow(0.6 * photo.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
    # Relative to an even share among all tokens, on a logarithmic scale from a tenth to 30 times.
    reach = torch.stack(list(reaches.values())).mean(0) * photo[..., 0].numel() / _PATCH**2
    strength = ((reach.clamp(min=1e-9).log10() + 1) / 2.5).clamp(0, 1)
    pixels = strength.repeat_interleave(_PATCH, 0).repeat_interleave(_PATCH, 1).numpy()
    ax.imshow(pixels, cmap="inferno", vmin=0, vmax=1, alpha=np.where(pixels > 0, 0.25 + 0.75 * pixels, 0))
    _frame(ax)
    ax.set_title(title, fontsize=12, loc="left")


def _draw_costs(ax: Axes, costs: dict[int, tuple[int, int]]) -> None:
    for index, (name, colour) in enumerate((("DaViT-Tiny", "#0072B2"), ("with dense attention", "#D55E00"))):
        values = [cost[index] / 1e9 for cost in costs.values()]
        ax.loglog(list(costs), values, "o-", color=colour, linewidth=2.2)
        ax.annotate(name, (list(costs)[3], values[3]), (-8, 10) if index else (8, -16), textcoords="offset points",
                    color=colour, fontsize=12, ha="right" if index else "left")  # fmt: skip
    ax.set_xticks(list(costs), [str(side) for side in costs])
    ax.minorticks_off()
    ax.set(xlabel="side of the image (pixels)")
    ax.set_title("Multiply-adds of all blocks (G)", fontsize=11, loc="left")
    ax.spines[["top", "right"]].set_visible(False)

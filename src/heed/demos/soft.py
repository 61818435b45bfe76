"""SOFT on a photograph: the Gaussian kernel between its pixels as a filter, and how few landmarks it takes to have it.

The features of a pixel are its colour and its place, scaled by hand, so that exp(-|a - b|^2 / 2) is the bilateral filter
(Tomasi and Manduchi, ICCV 1998) and the low-rank form can be seen at work without any training.
"""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from heed.demos.registry import Figures, demos, photograph
from heed.layers.soft import Landmarks, gaussian_kernel, newton_inverse

_SIZE = (72, 108)
_GRIDS = ((2, 3), (4, 6), (6, 9), (8, 12), (12, 18), (18, 27), (24, 36))  # landmarks
_SHOWN = ((4, 6), (8, 12), (18, 27))
_COLOUR, _PLACE = 0.14, 0.22  # what counts as near: in [0, 1] per channel, and as a share of the height
_QUERIES = {(32, 33): "#0072B2", (50, 55): "#D55E00", (38, 92): "#009E73"}  # (row, column), Okabe and Ito's colours
_STEPS = (1, 2, 5, 10, 20, 40)


@demos.register("64-soft")
def soft(picture: Path) -> Figures:
    """Draw what three pixels see through the kernel, dense and with landmarks, and the error left by each."""
    photo = torch.from_numpy(photograph(*_SIZE))
    tokens = _features(photo)
    q, v = tokens.flatten(0, 1)[None], torch.cat([photo, torch.ones(*_SIZE, 1)], 2).flatten(0, 1)[None]
    begin = time.perf_counter()
    kernel = gaussian_kernel(q, q)
    dense = kernel @ v
    dense_seconds = time.perf_counter() - begin
    errors: dict[int, float] = {}
    seconds: dict[int, float] = {}
    views: dict[tuple[int, int], tuple[Landmarks, Tensor]] = {}
    for grid in _GRIDS:
        begin = time.perf_counter()
        low_rank = Landmarks.between(q, _pooled(tokens, grid))
        mixed = low_rank.mix(v)
        count = grid[0] * grid[1]
        seconds[count] = time.perf_counter() - begin
        errors[count] = ((mixed - dense).norm() / dense.norm()).item()
        views[grid] = low_rank, mixed

    figure = plt.figure(figsize=(13.6, 9.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1.25))  # type: ignore[misc]
    axes = top.subplots(3, 1 + len(_SHOWN) + 1)
    _draw_photo(axes[0, 0], photo, "Three queries")
    _draw_photo(axes[1, 0], _filtered(dense), "Mixed by the dense kernel", queries=False)
    _draw_photo(
        axes[2, 0], _filtered(views[_SHOWN[0]][1]), f"Mixed through {_count(_SHOWN[0])} landmarks", queries=False
    )
    for row, ((r, c), colour) in enumerate(_QUERIES.items()):
        place = r * _SIZE[1] + c
        columns = [(f"{_count(g)} landmarks", _row(views[g][0], place)) for g in _SHOWN]
        for ax, (title, weights) in zip(
            axes[row, 1:], [*columns, ("all pixels: dense", kernel[0, place])], strict=True
        ):
            _draw_weights(ax, photo, weights.view(_SIZE), (r, c), colour, title if row == 0 else "")
    left, right = bottom.subplots(1, 2)
    _draw_errors(left, errors)
    _draw_newton(right, views[_SHOWN[1]][0].kernel)
    figure.suptitle(
        "SOFT: a Gaussian kernel in the place of softmax, and a few landmarks in the place of all pixels",
        fontsize=17,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    figures: Figures = {
        "tokens": f"{_SIZE[0]} x {_SIZE[1]} = {q.shape[1]} pixels, features colour and place",
        "dense kernel": f"{q.shape[1] ** 2 / 1e6:.1f} million similarities, {dense_seconds * 1e3:.0f} ms",
    }
    for count, error in errors.items():
        figures[f"{count} landmarks"] = (
            f"error {error:.1%}, {(q.shape[1] + count) * count / 1e6:.2f} million similarities, {seconds[count] * 1e3:.0f} ms"
        )
    return figures


def _features(photo: Tensor) -> Tensor:
    """(H, W, 3) to (H, W, 5), so that distance 1 is what counts as near."""
    rows, columns = (torch.arange(side) / _SIZE[0] / _PLACE for side in _SIZE)
    return torch.cat([photo / _COLOUR, torch.stack(torch.meshgrid(rows, columns, indexing="ij"), 2)], 2)


def _pooled(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Landmarks (1, M, 5): the features averaged over patches."""
    return F.adaptive_avg_pool2d(tokens.permute(2, 0, 1)[None], grid).flatten(2).transpose(1, 2)


def _row(low_rank: Landmarks, place: int) -> Tensor:
    """The similarity of one query to all tokens, (N,)."""
    return (low_rank.tokens[0, place] @ low_rank.inverse[0]) @ low_rank.tokens[0].T


def _filtered(mixed: Tensor) -> Tensor:
    """The kernel has no normalisation: divide by what it made of ones, the last channel."""
    return (mixed[0, :, :3] / mixed[0, :, 3:]).view(*_SIZE, 3)


def _count(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _draw_photo(ax: Axes, image: Tensor, title: str, queries: bool = True) -> None:
    ax.imshow(image.clamp(0, 1).numpy())
    for (row, column), colour in _QUERIES.items() if queries else ():
        ax.plot(column, row, "o", color=colour, markeredgecolor="white", markersize=9)
    ax.set_title(title, fontsize=12, loc="left")
    ax.set_axis_off()


def _draw_weights(ax: Axes, photo: Tensor, weights: Tensor, query: tuple[int, int], colour: str, title: str) -> None:
    grey = 0.45 * photo.mean(2, keepdim=True).expand(-1, -1, 3)
    shown = weights.clamp(0, 1).sqrt()
    tint = torch.from_numpy(plt.get_cmap("inferno")(shown.numpy())[..., :3]).float()
    ax.imshow((grey * (1 - shown[..., None]) + tint * shown[..., None]).numpy())
    ax.plot(query[1], query[0], "o", color=colour, markeredgecolor="white", markersize=8)
    ax.set_title(title, fontsize=12, loc="left")
    ax.set_axis_off()


def _draw_errors(ax: Axes, errors: dict[int, float]) -> None:
    ax.loglog(list(errors), list(errors.values()), "o-", color="#0072B2", linewidth=2)
    for count, error in errors.items():
        ax.annotate(f"{error:.1%}", (count, error), (5, 5), textcoords="offset points", fontsize=10)
    ax.set_xticks(list(errors), [str(count) for count in errors])
    ax.minorticks_off()
    ax.margins(0.08, 0.2)
    ax.set_yticks([])
    ax.set_xlabel(f"landmarks, of {_SIZE[0] * _SIZE[1]} pixels")
    ax.set_title("Error of the low-rank form against the dense kernel", fontsize=12, loc="left")
    ax.spines[["top", "right", "left"]].set_visible(False)


def _draw_newton(ax: Axes, kernel: Tensor) -> None:
    """|I - P Y| in every eigen-direction of P, over Newton's iterations."""
    ridged = kernel[0] + 0.01 * torch.eye(kernel.shape[-1])
    values, vectors = torch.linalg.eigh(ridged)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(_STEPS)))
    for steps, colour in zip(_STEPS, colours, strict=True):
        inverse = newton_inverse(kernel, steps)[0]
        left = 1 - values * (vectors.T @ inverse @ vectors).diagonal()
        ax.semilogx(values, left.abs(), color=colour, linewidth=2, label=f"{steps}")
    ax.legend(title="Newton steps", ncols=2, frameon=False, fontsize=10)
    ax.set_xlabel("eigenvalues of the landmarks' kernel, ridge included")
    ax.set_ylim(-0.03, 1.03)
    ax.set_title("Newton's inverse: what is still missing, 1 to 0", fontsize=12, loc="left")
    ax.spines[["top", "right"]].set_visible(False)

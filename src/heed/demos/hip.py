"""HiP attention on a photograph: pixels in reading order as a long sequence, and a tree search for pixels that look alike.

Attention whose queries and keys are the surroundings of a pixel, and whose values are its colours, takes noise out of a
picture (non-local means): a pixel becomes the average of the pixels before it that look as it does, wherever they are.
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
from heed.engine.attend import attend
from heed.engine.patterns import Causal
from heed.language.hip import HiPBudget, hip_attention, hip_cost, kept_mass, search_blocks

_HEIGHT, _WIDTH = 120, 180
_NOISE, _SIDE, _SHARPNESS = 0.12, 5, 2.0
_BUDGET = HiPBudget(mask_k=512, block_q=10, block_k=2, window=60, sinks=4)
# As many keys, all of them the last ones: what a sliding window with sinks sees.
_WINDOW = HiPBudget(mask_k=2, block_q=10, block_k=2, window=570, sinks=4)
_ASKED = (52, 120)  # row and column of the query block that is drawn: in one eye of the cat
_ROUNDS = (0, 1, 3, None)
_HOT, _COLD = "#FFB000", "#0072B2"


@demos.register("57-hip")
def hip(picture: Path) -> Figures:
    """Draw the rounds of the search from one eye of the cat, and what dense, sparse and windowed attention make of noise."""
    clean = torch.from_numpy(photograph(_HEIGHT, _WIDTH))
    noisy = clean + _NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    q, k, v = _tokens(noisy)
    outputs = {
        "dense": attend(q, k, v, Causal(), scale=1.0),
        "HiP": hip_attention(q, k, v, _BUDGET, scale=1.0),
        "window": hip_attention(q, k, v, _WINDOW, scale=1.0),
    }
    results = {name: out[0, 0, :, :3].view(clean.shape) for name, out in outputs.items()}
    selection = search_blocks(q, k, _BUDGET)
    mass = {
        "HiP": kept_mass(q, k, selection, scale=1.0).mean().item(),
        "window": kept_mass(q, k, search_blocks(q, k, _WINDOW), scale=1.0).mean().item(),
    }

    figure, axes = plt.subplots(2, 4, figsize=(16, 6.4), layout="constrained")
    block = (_ASKED[0] * _WIDTH + _ASKED[1]) // _BUDGET.block_q
    for ax, rounds in zip(axes[0], _ROUNDS, strict=True):
        found = search_blocks(q, k, _BUDGET, rounds=rounds)
        _chosen(ax, noisy, found.index[0, 0, block], block, rounds, int(_BUDGET.rounds(found.ends)[block]))
    _show(axes[1, 0], noisy, f"With noise: {_psnr(noisy, clean):.1f} dB")
    titles = {
        "window": f"The last {_BUDGET.width} pixels only",
        "HiP": "HiP, as many pixels",
        "dense": "All pixels before",
    }
    for ax, (name, title) in zip(axes[1, 1:], titles.items(), strict=True):
        _show(ax, results[name], f"{title}: {_psnr(results[name], clean):.1f} dB")
    title = "asked about one eye (the frame), the tree search finds what looks like it among all pixels before"
    figure.suptitle(f"HiP attention: {title}", fontsize=17, x=0.01, ha="left")
    figure.savefig(picture, dpi=105)
    plt.close(figure)

    tokens = _HEIGHT * _WIDTH
    cost = hip_cost(tokens, _BUDGET)
    return {
        "setting": f"{tokens} pixels in reading order, at most {_BUDGET.width} keys per query",
        "dense attention's mass on the keys seen": f"HiP {mass['HiP']:.0%}, a window of that size {mass['window']:.0%}",
        "products of a query and a key": f"{(cost.search + cost.attention) / 1e6:.0f} M, dense {cost.dense / 1e6:.0f} M",
    }


def _tokens(noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, pixels, D): q_i . k_j = -|a_i - a_j|^2 / 2 sigma^2 + what only i depends on; a are surroundings."""
    pad = _SIDE // 2
    image = F.pad(noisy.permute(2, 0, 1)[None], (pad,) * 4, mode="reflect")
    around = F.unfold(image, _SIDE)[0].T  # (pixels, 3 * side^2)
    around = (around - around.mean(0)) / (_NOISE * around.shape[1] ** 0.5) * _SHARPNESS
    ones, norms = torch.ones(len(around), 1), -around.square().sum(1, keepdim=True) / 2
    q, k = torch.cat([around, ones], 1), torch.cat([around, norms], 1)
    v = F.pad(noisy.view(-1, 3), (0, q.shape[1] - 3))
    return q[None, None], k[None, None], v[None, None]


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * F.mse_loss(image, clean).log10().item()


def _show(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.clamp(0, 1).numpy())
    ax.set_title(title)
    ax.set_axis_off()


def _chosen(ax: Axes, image: Tensor, index: Tensor, block: int, rounds: int | None, last: int) -> None:
    """The photograph, dim, and bright where the search stands."""
    grey = image.mean(-1, keepdim=True).clamp(0, 1).numpy() * np.ones(3) * 0.45 + 0.25
    tokens = (index[:, None] + torch.arange(_BUDGET.chosen)).flatten().numpy()
    flat = grey.reshape(-1, 3)
    flat[tokens] = plt.matplotlib.colors.to_rgb(_HOT)  # type: ignore[attr-defined]
    ax.imshow(grey, interpolation="nearest")
    row, column = divmod(block * _BUDGET.block_q, _WIDTH)
    frame = Rectangle((column - 1.5, row - 2), _BUDGET.block_q + 2, 3, fill=False, color=_COLD, linewidth=2)
    ax.add_patch(frame)
    ax.set_title(
        f"After round {last} of {last}: what is attended to" if rounds is None else f"Round {rounds} of {last}"
    )
    ax.set_axis_off()

"""Routing Transformer reading Python's documentation: which cluster every word is routed to, and whom it attends to there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from heed.demos.registry import Figures, demos
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.language.routing import RoutingAttention, RoutingConfig, RoutingTransformerLM, gather_members, visible_bias

_WORDS, _LENGTH, _STEPS, _COLUMNS = 1500, 256, 150, 78
_CONFIG = RoutingConfig(
    vocab=_WORDS, dim=128, layers=2, skip_first=1, ffn_dim=256, cluster_heads=2, local_heads=2, clusters=8, window=48,
    block=(16,), relative=("local",), max_relative=33, length=_LENGTH, initial_count=1.0, fix_count=True, decay=0.9,
)  # fmt: skip
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


@demos.register("08-routing")
def routing(picture: Path) -> Figures:
    """Train a small model on words, and draw a held-out passage in the colours of one head's clusters, and its attention."""
    words, ids = _documentation()
    model, loss = _trained(ids[: len(ids) * 9 // 10])
    start = len(ids) * 9 // 10 + 40  # the end of an example, and prose after it
    passage, shown = ids[None, start : start + _LENGTH], words[start : start + _LENGTH]
    attention, cluster = _attention(model, passage)
    with torch.no_grad():
        held_out = F.cross_entropy(model(passage)[0, :-1], passage[0, 1:]).exp().item()
    asked = _asked(attention, shown)

    figure = plt.figure(figsize=(17, 8.6), layout="constrained")
    parts = figure.subfigures(1, 2, width_ratios=[1.72, 1], squeeze=False)
    left, right = parts[0]
    _draw_passage(left.subplots(), shown, cluster, attention[asked], asked)
    matrix, table = right.subplots(2, 1, height_ratios=[1.9, 1])
    _draw_matrix(matrix, attention, cluster)
    _draw_clusters(table, shown, cluster)
    figure.suptitle(
        "Routing Transformer: a head sorts the words of a text into clusters, and words attend inside their cluster",
        fontsize=17, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(picture, dpi=100)
    plt.close(figure)

    far = torch.arange(_LENGTH)[:, None] - torch.arange(_LENGTH) >= 2 * _CONFIG.block[0]
    pairs = int((attention > 0).sum())
    return {
        "setting": f"{_LENGTH} words, {_CONFIG.clusters} clusters of {_CONFIG.window} words, {_STEPS} steps of training",
        "perplexity": f"{held_out:.0f} on the passage, {loss:.0f} in the last training steps",
        "pairs of words that attend": f"{pairs}, dense {_LENGTH * (_LENGTH + 1) // 2}",
        "attention beyond the local window": f"{(attention * far).sum() / attention.sum():.0%}",
        "words in no cluster": int((attention.sum(1) == 0).sum()),
    }


def _documentation() -> tuple[list[str], Tensor]:
    """Words and punctuation of Python's language reference, and their numbers by frequency; 1 stands for rare ones."""
    from pydoc_data.topics import topics

    pages = (page for _, page in sorted(topics.items()))
    words = [word for page in pages for word in re.findall(r"[A-Za-z_]+|\d+|[^\w\s*\-=+|]", page)]
    common = Counter(word.lower() for word in words).most_common(_WORDS - 2)
    number = {word: i + 2 for i, (word, _) in enumerate(common)}
    return words, torch.tensor([number.get(word.lower(), 1) for word in words])


def _trained(ids: Tensor) -> tuple[RoutingTransformerLM, float]:
    """A model that has seen 8 passages in each step, and its perplexity in the last ones."""
    torch.manual_seed(0)
    model = RoutingTransformerLM(_CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, _STEPS)
    losses = []
    for _ in range(_STEPS):
        batch = ids[torch.randint(len(ids) - _LENGTH, (8, 1)) + torch.arange(_LENGTH + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + model.auxiliary_loss).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), float(np.exp(np.mean(losses[-20:])))


@torch.no_grad()
def _attention(model: RoutingTransformerLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last layer's head with the evenest clusters: weights (T, T), averaged over clusters, and clusters (T,)."""
    layer = next(part for part in reversed(list(model.modules())) if isinstance(part, RoutingAttention))
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(ids)
    hook.remove()
    assert layer.routed is not None
    q, k = layer.routed.prepare(*(t[:, : layer.settings.cluster_heads] for t in layer.project(seen[0], seen[0])[:2]))
    index, _, _ = layer.routed.route(q, k)
    groups = gather_members(q, index).flatten(0, 1)
    bias = visible_bias(groups, index.shape[-1], masked=True)
    _, weights = attend(groups, groups, groups, Full(), bias=bias, scale=1.0, return_weights=True)
    total, count = torch.zeros(_LENGTH, _LENGTH), torch.zeros(_LENGTH)
    nearest = layer.routed.clusters.distances(q)[0].argmin(-1)
    head = max(range(len(nearest)), key=lambda h: -int(torch.bincount(nearest[h]).square().sum()))
    for members, inside in zip(index[0, head], weights[head], strict=True):
        total[members[:, None], members] += inside.tril()
        count[members] += 1
    return total / count.clamp(min=1)[:, None], nearest[head]


def _asked(attention: Tensor, words: list[str]) -> int:
    """A late, long word that attends to several others far away."""
    far = attention.tril(-2 * _CONFIG.block[0])
    spread = -(far * far.clamp(min=1e-9).log()).sum(1)
    return max(range(_LENGTH // 2, _LENGTH), key=lambda t: spread[t].item() * (len(words[t]) > 5))


def _draw_passage(ax: Axes, words: list[str], cluster: Tensor, weights: Tensor, asked: int) -> None:
    """Words in the colours of their clusters; those the asked word attends to stand in frames, the thicker the more."""
    x, line = 0, 0
    for t, word in enumerate(words):
        tight = word in ".,;:)]}'`" and t > 0
        if x + len(word) + 1 > _COLUMNS:
            x, line = 0, line + 1
        x += 0 if tight or x == 0 else 1
        share = weights[t].item()
        frame = {"edgecolor": "black", "linewidth": 1 + 9 * share} if share > 0.03 else {"edgecolor": "none"}
        if t == asked:
            frame = {"edgecolor": "#D00000", "linewidth": 4}
        colour = _COLOURS[int(cluster[t])]
        box = FancyBboxPatch(
            (x - 0.1, line - 0.36), len(word) + 0.2, 0.72, boxstyle="round,pad=0,rounding_size=0.25",
            facecolor=(*plt.matplotlib.colors.to_rgb(colour), 0.55), **frame,  # type: ignore[attr-defined]
        )  # fmt: skip
        ax.add_patch(box)
        ax.text(x + len(word) / 2, line, word, ha="center", va="center", family="monospace", fontsize=10.5)
        x += len(word)
    ax.set(xlim=(-1, _COLUMNS + 1), ylim=(line + 1, -1))
    ax.set_title(
        f'A passage it was not trained on. Red: "{words[asked]}"; black: the words it attends to',
        loc="left",
        fontsize=13,
    )
    ax.set_axis_off()


def _draw_matrix(ax: Axes, attention: Tensor, cluster: Tensor) -> None:
    """Who attends to whom, in the colour of the asking word's cluster, over what local heads would see."""
    t = np.arange(_LENGTH)
    block = _CONFIG.block[0]
    local = (t[:, None] >= t) & (t[:, None] // block - t // block <= 1)
    image = np.ones((_LENGTH, _LENGTH, 3)) * np.where(local, 0.88, 1.0)[..., None]
    colours = np.array([plt.matplotlib.colors.to_rgb(c) for c in _COLOURS])[cluster.numpy()]  # type: ignore[attr-defined]
    strength = attention.numpy()[..., None] ** 0.35
    ax.imshow(image * (1 - strength) + colours[:, None] * strength, interpolation="nearest")
    ax.set(xlabel="word attended to", ylabel="word that asks", xticks=[0, 64, 128, 192], yticks=[0, 64, 128, 192])
    ax.set_title("Who attends to whom; grey: what a local head sees", loc="left", fontsize=13)


def _draw_clusters(ax: Axes, words: list[str], cluster: Tensor) -> None:
    """The most frequent words of every cluster."""
    for c, colour in enumerate(_COLOURS):
        own = Counter(word for word, at in zip(words, cluster.tolist(), strict=True) if at == c)
        listed = "  ".join(word for word, _ in own.most_common(9))
        ax.add_patch(
            FancyBboxPatch((0, c - 0.3), 0.5, 0.6, boxstyle="round,pad=0,rounding_size=0.15", facecolor=colour)
        )
        ax.text(0.8, c, f"{sum(own.values()):3d}   {listed[:58]}", va="center", family="monospace", fontsize=9)
    ax.set(xlim=(0, 12), ylim=(len(_COLOURS) - 0.4, -0.6))
    ax.set_title("Words by nearest centroid, and the most frequent of them", loc="left", fontsize=13)
    ax.set_axis_off()

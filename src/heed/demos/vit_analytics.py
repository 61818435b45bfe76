"""Demo of the analysis of heads: a small ViT learns to read digits; which of its heads matter, and where they look."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase, SubFigure
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from heed.data.images import load_images
from heed.demos.registry import Figures, demos
from heed.explain.heads import PatternOptions, Report, analyse, strength_profile

_EPOCHS, _BATCH = 10, 32
_COLOURS = {
    "self": "#882255", "near": "#0072b2", "row": "#009e73", "column": "#56b4e9", "left": "#e69f00", "right": "#e69f00",
    "up": "#cc79a7", "down": "#cc79a7", "global": "#7d7d7d", "CLS": "#999933", "content": "#d55e00",
}  # fmt: skip


@demos.register("51-vit-analytics")
def draw(picture: Path) -> Figures:
    data = load_images("digits")
    mean, std = (value.view(-1, 1, 1) for value in data.statistics())
    train, test = ((images.float() / 255 - mean) / std for images in (data.train_images, data.test_images))
    begin = time.perf_counter()
    model = _train(train, data.train_labels)
    seconds = time.perf_counter() - begin
    report = analyse(
        model, test, data.test_labels, name="ViT", limit=128, patterns=PatternOptions(maps_per_head=8, epochs=8)
    )

    figure = plt.figure(figsize=(13.6, 10.4), layout="constrained")
    top, bottom = _halves(figure, 2, 1, height_ratios=(1.32, 1))
    atlas, looks = _halves(top, 1, 2, width_ratios=(1, 1.18))
    _draw_atlas(atlas, report)
    _draw_looks(looks, report)
    importance, distance, curves = bottom.subplots(1, 3, width_ratios=(0.95, 1, 1.25))
    _draw_importance(importance, report)
    _draw_distance(distance, report)
    _draw_curves(curves, report)
    figure.suptitle("Inside a vision transformer that reads digits: which heads matter, and where they look", fontsize=17,
                    x=0.01, ha="left")  # fmt: skip
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    areas = {name: curve.area for name, curve in report.curves.items()}
    layer, head = divmod(int(report.importance["prob"].argmax()), report.heads)
    chance = np.mean([area for name, area in areas.items() if name.startswith("random")])
    return {
        "model": f"ViT of {report.layers} layers x {report.heads} heads, trained {_EPOCHS} epochs in {seconds:.0f} s",
        "accuracy": f"{report.accuracy:.1%} of {report.images} test digits",
        "most important head": (
            f"layer {layer}, head {head}: without it the true class loses {report.importance['prob'][layer, head]:.1%}"
        ),
        "mean accuracy while pruning": (
            f"{areas['jsd, least first']:.0%} least important first, {chance:.0%} by chance, "
            f"{areas['jsd, most first']:.0%} most important first"
        ),
        "rank correlation of prob and jsd": f"{report.agreement()['prob', 'jsd']:.2f}",
        "mean distance by layer": ", ".join(f"{value:.1f}" for value in report.profile.mean_distance.mean(1).tolist()),
    }


def _train(images: Tensor, labels: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2
    )
    # With so few steps, places and pixels have to tell tokens apart from the start: waves along both axes, large weights.
    model.pos_embed.data[0, 1:] = build_sincos2d_pos_embed([8, 8], 48, temperature=20.0)  # type: ignore[union-attr]
    nn.init.normal_(model.patch_embed.proj.weight, std=0.5)  # type: ignore[arg-type, union-attr]
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.02, betas=(0.9, 0.98))
    steps = _EPOCHS * -(-len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    for _ in range(_EPOCHS):
        for chosen in torch.randperm(len(images)).split(_BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()


def _halves(figure: FigureBase, rows: int, columns: int, **ratios: tuple[float, float]) -> tuple[SubFigure, SubFigure]:
    first, second = figure.subfigures(rows, columns, squeeze=False, **ratios).flat  # type: ignore[union-attr]
    return first, second


def _draw_atlas(figure: SubFigure, report: Report) -> None:
    """Where each head looks from a query in the middle."""
    figure.suptitle("Where each head looks, seen from the query (o)", fontsize=13)
    axes = figure.subplots(report.layers, report.heads)
    for number, ax in enumerate(axes.flat):
        layer, head = divmod(number, report.heads)
        shown = report.collected.displacement[layer, head].sqrt()
        ax.imshow(shown.numpy(), cmap="cividis")
        rows, columns = shown.shape
        ax.plot(columns // 2, rows // 2, "o", markersize=6, markerfacecolor="none", markeredgecolor="white")
        name = report.collected.head_patterns[number]
        ax.set_title(name, color=_COLOURS[name], fontsize=12, fontweight="bold", pad=3)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(color=_COLOURS[name], linewidth=2.5)
        if head == 0:
            ax.set_ylabel(f"layer {layer}", fontsize=11)


def _draw_looks(figure: SubFigure, report: Report) -> None:
    """The digits, and where the most important heads look from the patch in the middle."""
    order = report.importance["prob"].flatten().argsort(descending=True)[:3].tolist()
    figure.suptitle("What the three most important heads see from the ringed pixel", fontsize=13)
    axes = figure.subplots(len(order) + 1, len(report.collected.shown))
    rows, columns = report.grid
    for column, image in enumerate(report.collected.shown):
        axes[0, column].imshow(image[0].numpy(), cmap="gray")
        for row, number in enumerate(order):
            layer, head = divmod(number, report.heads)
            axes[row + 1, column].imshow(report.collected.rows[layer, head, column].sqrt().numpy(), cmap="cividis")
            if column == 0:
                axes[row + 1, 0].set_ylabel(f"layer {layer}, head {head}", fontsize=10)
    for ax in axes.flat:
        ax.plot(columns // 2, rows // 2, "o", markersize=9, markerfacecolor="none", markeredgecolor="#ff5c39", mew=2)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)


def _draw_importance(ax: Axes, report: Report) -> None:
    values = report.importance["prob"].numpy() * 100
    top = max(abs(values).max(), 1e-9)
    ax.imshow(values, cmap="PuOr_r", vmin=-top, vmax=top)
    for (layer, head), value in np.ndenumerate(values):
        ax.text(head, layer, f"{value:.1f}", ha="center", va="center", fontsize=12,
                color="white" if abs(value) > 0.6 * top else "black")  # fmt: skip
    ax.set_title("Points of true-class probability\nlost without the head", fontsize=13)
    ax.set_xticks(range(report.heads), [f"head {head}" for head in range(report.heads)])
    ax.set_yticks(range(report.layers), [f"layer {layer}" for layer in range(report.layers)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _draw_distance(ax: Axes, report: Report) -> None:
    rings = report.profile.ring_total.mean(1)
    for layer, colour in zip(range(report.layers), ("#56b4e9", "#0072b2", "#003355"), strict=True):
        ax.plot(rings[layer].numpy() * 100, "o-", color=colour, linewidth=2.2, label=f"layer {layer}")
    tokens = report.grid[0] * report.grid[1] + report.prefix
    even = strength_profile(torch.full((tokens, tokens), 1 / tokens), report.grid).ring_total
    ax.plot(even.numpy() * 100, ":", color="gray", label="evenly spread")
    ax.set_title("How far: attention by ring around the query", fontsize=13)
    ax.set(xlabel="distance in pixels (0 is the query itself)", ylabel="% of attention")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_curves(ax: Axes, report: Report) -> None:
    for name, curve in report.curves.items():
        colour = "#009e73" if "least" in name else "#d55e00" if "most" in name else "#b0b0b0"
        label = "random order" if name == "random 0" else f"{name.removeprefix('jsd, ')}" if "jsd" in name else None
        ax.plot(curve.accuracy.numpy() * 100, color=colour, linewidth=1.2 if "random" in name else 2.6, label=label)
    ax.set_title("Accuracy while heads are switched off", fontsize=13)
    ax.set(xlabel="heads switched off", ylabel="accuracy, %", ylim=(0, 100))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)

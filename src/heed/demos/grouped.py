"""Key-driven grouped-query attention on a photograph: how strong each key head's keys are, and how many queries it gets.

A small ViT learns to say from which of 24 parts of the photograph a crop was taken. Then its eight key-value heads are
averaged to four, and it is trained a little more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from torch import Tensor

import heed
from heed.demos.registry import Figures, demos, photograph
from heed.layers.grouped import KDGQA, grouped_layers
from heed.layers.grouped_report import AllocationLog, grouped_report
from heed.vision.grouped_vit import GroupedViT, uptrain

_SIZE, _CELL = (192, 288), 48  # 4 x 6 parts
_CROP, _PATCH = 72, 12  # 6 x 6 tokens
_DEPTH, _HEADS, _GROUPS = 4, 8, 4
_STEPS, _MORE, _BATCH = 400, 100, 16
_CORNER = (44, 64)  # of the crop in the picture
_SCHEMES = {"gqa": "GQA", "kdgqa": "KDGQA", "dgqa_ema": "DGQA (ema)", "pgqa": "PGQA"}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, one per key head


@demos.register("46-kdgqa")
def grouped(picture: Path) -> Figures:
    """Train, convert and up-train; draw keys, allocations and accuracy."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)
    normalised = (photo - photo.mean((1, 2), keepdim=True)) / photo.std()
    begin = time.perf_counter()
    vit = _model("mhsa")
    uptrain(vit, _crops(normalised, _STEPS), epochs=1, learning_rate=1e-3)
    test = _crops(normalised, 20)
    accuracy = {"trained": _accuracy(vit, test)}
    more = _crops(normalised, _MORE)
    logs: dict[str, AllocationLog] = {}
    models: dict[str, GroupedViT] = {}
    for scheme in ("mhsa", *_SCHEMES):
        torch.manual_seed(1)
        model = models[scheme] = _model(scheme).load_timm(vit.state_dict(), load_head=True)
        accuracy[f"{scheme} converted"] = _accuracy(model, test)
        log = logs[scheme] = AllocationLog(model)
        uptrain(model, more, epochs=1, learning_rate=5e-4, after_step=log)
        accuracy[f"{scheme} trained"] = _accuracy(model, test)
    seconds = time.perf_counter() - begin

    row, column = _CORNER
    crop = (slice(None), slice(row, row + _CROP), slice(column, column + _CROP))
    model = models["kdgqa"]
    keys, norms = _key_strength(model, normalised[crop][None])
    counts = model.allocations()
    figure = plt.figure(figsize=(14, 8.6), layout="constrained")
    left, right = cast(np.ndarray, figure.subfigures(1, 2, width_ratios=(1, 1.05)))
    _draw_keys(left.subplots(_DEPTH, _GROUPS + 1), photo[crop], keys, norms, counts)
    left.suptitle("Norms of the keys of four key heads, and the query heads that each serves", fontsize=12)
    axes = right.subplot_mosaic([["a", "b"], ["c", "d"], ["bars", "bars"]], height_ratios=(1, 1, 1.3))
    shown = ((0, "kdgqa"), (0, "dgqa_ema"), (_DEPTH - 1, "kdgqa"), (_DEPTH - 1, "dgqa_ema"))
    for i, (block, scheme) in enumerate(shown):
        history = logs[scheme].history[f"blocks.{block}.attn"]
        _draw_history(axes["abcd"[i]], history, f"{_SCHEMES[scheme]}, block {block + 1}")
    _draw_accuracy(axes["bars"], accuracy)
    figure.suptitle(
        "Key-driven groups: eight query heads share four key-value heads, and the strongest keys get most of them",
        fontsize=16,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    cost = grouped_report(model, (_CROP // _PATCH) ** 2 + 1)
    figures: Figures = {
        "setting": f"{_DEPTH} blocks, {_HEADS} query heads, {_GROUPS} key-value heads, {(_CROP // _PATCH) ** 2} patches",
        "keys and values": f"{cost.kv_bytes:,} bytes, {cost.kv_bytes / cost.multi_head_kv_bytes:.0%} of multi-head",
        "accuracy with multi-head attention": f"{accuracy['trained']:.0%}, {accuracy['mhsa trained']:.0%} trained as long",
    }
    for scheme, name in _SCHEMES.items():
        figures[name] = (
            f"{accuracy[f'{scheme} converted']:.0%} converted, {accuracy[f'{scheme} trained']:.0%} up-trained"
        )
    for i, block in enumerate(counts.tolist()):
        figures[f"KDGQA, queries per key head, block {i + 1}"] = ", ".join(map(str, block))
    return figures | {"training": f"{_STEPS} steps, and {_MORE} for each scheme, in {seconds:.0f} s"}


def _model(scheme: str) -> GroupedViT:
    return cast(
        GroupedViT,
        heed.create_model(
            "grouped_vit_micro",
            att_scheme=scheme,
            img_size=_CROP,
            patch_size=_PATCH,
            in_chans=3,
            num_classes=_SIZE[0] * _SIZE[1] // _CELL**2,
            depth=_DEPTH,
            num_heads=_HEADS,
            num_kv_heads=_GROUPS,
        ),
    )


def _crops(photo: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of crops anywhere in the photograph, and the part that holds the middle of each."""
    batches = []
    for _ in range(count):
        corners = torch.stack([torch.randint(side - _CROP + 1, (_BATCH,)) for side in _SIZE], 1)
        crops = torch.stack([photo[:, r : r + _CROP, c : c + _CROP] for r, c in corners.tolist()])
        cells = (corners + _CROP // 2) // _CELL
        batches.append((crops + 0.05 * torch.randn_like(crops), cells[:, 0] * (_SIZE[1] // _CELL) + cells[:, 1]))
    return batches


@torch.no_grad()
def _accuracy(model: GroupedViT, batches: list[tuple[Tensor, Tensor]]) -> float:
    right = [(model.eval()(crops).argmax(1) == parts).float().mean() for crops, parts in batches]
    return torch.stack(right).mean().item()


@torch.no_grad()
def _key_strength(model: GroupedViT, crop: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the keys per patch, (depth, G, rows, columns), and of all of a head, (depth, G), class token included.

    `model` then holds the allocation of this crop.
    """
    found: list[Tensor] = []

    def watch(layer: KDGQA) -> Callable[..., None]:
        def hook(_: object, __: object, keys: Tensor) -> None:
            found.append(keys[0].unflatten(-1, (layer.num_kv_heads, -1)).norm(dim=-1).T)

        return hook

    hooks = [layer.k.register_forward_hook(watch(cast(KDGQA, layer))) for layer in grouped_layers(model).values()]
    model(crop)
    for hook in hooks:
        hook.remove()
    keys = torch.stack(found)
    return keys[..., 1:].unflatten(2, (_CROP // _PATCH, -1)), keys.norm(dim=-1)


def _draw_keys(axes: np.ndarray, image: Tensor, keys: Tensor, norms: Tensor, counts: Tensor) -> None:
    """A row per block: the crop lit by the norm of each key head, in its colour; dots are the query heads it serves."""
    place = (0, _CROP, _CROP, 0)
    for i, row in enumerate(axes):
        row[0].imshow(image.permute(1, 2, 0), extent=place)
        row[0].set_title(f"block {i + 1}", fontsize=12, loc="left")
        # Weakest to strongest key of the block: what the rule compares.
        span = Normalize(float(keys[i].min()), float(keys[i].max()))
        for g, ax in enumerate(row[1:]):
            count = int(counts[i, g])
            light = np.asarray(span(keys[i, g].numpy()))[..., None]
            tint = np.array([int(_COLOURS[g][k : k + 2], 16) / 255 for k in (1, 3, 5)])
            ax.imshow(image.mean(0), cmap="gray", extent=place)
            ax.imshow(np.clip(light * (0.35 * tint + 0.65) * (0.3 + 0.7 * tint) * 1.4, 0, 1), extent=place, alpha=0.8)
            ax.set_title(f"|k| = {norms[i, g]:.1f}", fontsize=11, loc="left")
            for dot in range(count):
                ax.plot(5 + 8.8 * dot, 77, "o", color=_COLOURS[g], markersize=8, clip_on=False)
            if not count:
                ax.text(0, 77, "no queries", fontsize=10, va="center", color="grey")
            ax.add_patch(plt.Rectangle((0, 0), _CROP, _CROP, fill=False, edgecolor=_COLOURS[g], linewidth=3))
        for ax in row:
            ax.set_axis_off()
            ax.set(xlim=(0, _CROP), ylim=(_CROP, 0))


def _draw_history(ax: Axes, history: list[list[int]], title: str) -> None:
    steps = np.arange(1, len(history) + 1)
    ax.stackplot(steps, np.array(history).T, colors=_COLOURS, step="mid", edgecolor="white", linewidth=0.6)
    ax.set(
        xlim=(1, len(history)),
        ylim=(0, _HEADS),
        yticks=(0, _HEADS // 2, _HEADS),
        xlabel="step of up-training",
        ylabel="query heads",
    )
    ax.set_title(title, fontsize=11, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _draw_accuracy(ax: Axes, accuracy: dict[str, float]) -> None:
    places = np.arange(len(_SCHEMES))
    for offset, when, colour in ((-0.2, "converted", "#BBBBBB"), (0.2, "trained", "#333333")):
        values = [accuracy[f"{scheme} {when}"] for scheme in _SCHEMES]
        label = "right after conversion" if when == "converted" else f"after {_MORE} steps more"
        bars = ax.bar(places + offset, values, 0.36, color=colour, label=label)
        ax.bar_label(
            bars, [f"{v:.0%}" for v in values], padding=-16, color="white" if offset > 0 else "black", fontsize=11
        )
    ax.hlines(accuracy["mhsa trained"], -0.5, len(_SCHEMES) - 0.48, color="#D55E00", linewidth=1.5, linestyle="--")
    label = f"multi-head,\n{_MORE} steps\nmore: {accuracy['mhsa trained']:.0%}"
    ax.text(len(_SCHEMES) - 0.42, accuracy["mhsa trained"], label, color="#D55E00", va="center")
    ax.set_xticks(places, list(_SCHEMES.values()), fontsize=12)
    ax.set(xlim=(-0.5, len(_SCHEMES)), ylim=(0, 1.25), yticks=[])
    ax.set_title("Accuracy at telling 24 parts of the photograph apart", fontsize=12, loc="left")
    ax.legend(frameon=False, ncols=2, loc="upper right", fontsize=11)
    ax.spines[["top", "right", "left"]].set_visible(False)

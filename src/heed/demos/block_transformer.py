"""Block Transformer on Python's help pages, byte by byte: what a byte may see, what is hard to predict, what the cache holds.

A small model is trained while you wait. Its first byte of a block knows the text before it only through one vector; the
others also see the bytes of their block.
"""

from __future__ import annotations

import pydoc_data.topics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from heed.demos.registry import Figures, demos
from heed.language.block_transformer import (
    BlockTransformer,
    BlockTransformerConfig,
    cache_bytes,
    vanilla_cache_bytes,
)
from heed.models import create_model

_STEPS, _ROWS, _LENGTH = 700, 8, 96
_RATE = 8e-3
_SHOWN, _ASKED = 24, 14  # bytes in the picture of what sees what, and the one that asks
_TALL = 160  # bytes of the text that is coloured
_BLOCK, _TOKEN, _DIM = "#0072B2", "#D55E00", "#E4E4E4"


@demos.register("15-block-transformer")
def block_transformer(picture: Path) -> Figures:
    """Train on bytes, draw what sees what, the losses of a text byte by byte, and the caches."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    ids = torch.tensor(list(text))
    cut = len(ids) * 9 // 10
    share = (ids[:cut].bincount() / cut).double()
    entropy = -(share * share.clamp(min=1e-12).log()).sum().item()
    begin = time.perf_counter()
    model = _train(ids[:cut])
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        rows = ids[cut:][: 64 * 256].view(64, -1)
        by_position = _by_position(model, rows)
        start = cut + text[cut:].index(b"The ")
        piece = ids[start : start + _TALL]
        losses = model.token_losses(piece[None])[0]
        made = model.generate(ids[start : start + 41][None], max_new_tokens=59)[0]

    figure = plt.figure(figsize=(15, 9.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.1, 1))
    prompt = text[start : start + _SHOWN].decode(errors="replace")
    _sees(figure.add_subplot(grid[0, :2]), prompt, model.config)
    _positions(figure.add_subplot(grid[0, 2]), by_position, entropy)
    _text(figure.add_subplot(grid[1, :2]), piece, losses)
    _caches(figure.add_subplot(grid[1, 2]), model.config)
    title = "the past is one vector per four bytes; only the bytes of a block see each other"
    figure.suptitle(f"Block Transformer: {title}", fontsize=17, x=0.01, ha="left")
    figure.savefig(picture, dpi=105)
    plt.close(figure)

    layers, width = model.config.block_layers + model.config.token_layers, model.config.block_width
    held, whole = cache_bytes(model.config, 2048).total, vanilla_cache_bytes(layers, width, 2048)
    return {
        "setting": f"{model.layer_parameters() / 1e6:.1f} M parameters in the layers, {_STEPS} steps of {_ROWS * _LENGTH} "
        f"bytes in {seconds:.0f} s",
        "nats per byte": f"{by_position.mean():.2f} on unseen text, entropy of single bytes {entropy:.2f}",
        "first to last byte of a block": ", ".join(f"{value:.2f}" for value in by_position.tolist()),
        "cache of 2,048 bytes of text": f"{held / 1024:.0f} KiB, vanilla {whole / 1024:.0f} KiB ({whole / held:.1f} times)",
        "continues": repr(bytes(made.tolist()).decode(errors="replace")),
    }


def _train(ids: Tensor) -> BlockTransformer:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    sizes = {"embedder_width": 16, "block_width": 64, "token_width": 64, "block_layers": 2, "token_layers": 2}
    model = create_model("block_bytes_b4", **sizes)
    assert isinstance(model, BlockTransformer)
    optimiser = torch.optim.AdamW(model.parameters(), _RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, _STEPS, pct_start=0.1)
    for step in range(_STEPS):
        starts = torch.randint(len(ids) - _LENGTH, (_ROWS,), generator=generator).tolist()
        batch = torch.stack([ids[s : s + _LENGTH] for s in starts])
        optimiser.zero_grad()
        model.token_losses(batch, padding=step % 4).nanmean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def _by_position(model: BlockTransformer, rows: Tensor) -> Tensor:
    """Mean loss of each place in the block (L,), every byte taken in every place."""
    length = model.config.block_length
    total = torch.zeros(length)
    for padding in range(length):
        losses = model.token_losses(rows, padding=padding)
        place = (torch.arange(rows.shape[1]) + padding) % length
        total += torch.stack([losses[:, place == i].nanmean() for i in range(length)]) / length
    return total


def _letter(character: str) -> str:
    return {"\n": "↵", " ": "␣"}.get(character, character)


def _sees(ax: Axes, text: str, config: BlockTransformerConfig) -> None:
    """Bytes in their blocks, block embeddings above, and the ways by which one byte learns of the others."""
    length = config.block_length
    block = _ASKED // length
    for i, character in enumerate(text):
        own = block * length <= i < _ASKED
        colour = _TOKEN if own else "#F5C9A9" if i == _ASKED else _DIM
        past = i < block * length
        ax.add_patch(Rectangle((i + 0.06, 0), 0.88, 0.9, facecolor="#BBD7EA" if past else colour, edgecolor="none"))
        shown = "?" if i == _ASKED else _letter(character)
        ax.text(i + 0.5, 0.45, shown, ha="center", va="center", family="monospace", fontsize=15,
                color="white" if own else "black", alpha=0.35 if i > _ASKED else 1)  # fmt: skip
    for b in range(len(text) // length):
        seen = b < block
        centre = (b + 0.5) * length
        for height, name in ((2.0, "embedding"), (3.6, "state")):
            box = Rectangle((centre - 1.6, height), 3.2, 0.8, facecolor=_BLOCK if seen else _DIM, edgecolor="none")
            ax.add_patch(box)
            if seen:
                ax.text(centre, height + 0.4, f"{name} {b + 1}", ha="center", va="center", fontsize=11, color="white")
        if seen:
            for i in range(length):
                ax.plot([b * length + i + 0.5, centre], [0.92, 1.98], color=_BLOCK, linewidth=1)
            target = (block - 0.5) * length
            ax.annotate("", (target + 0.3 * (b - block + 1), 3.58), (centre, 2.82), arrowprops={
                "arrowstyle": "->", "color": _BLOCK, "linewidth": 1.4 if b == block - 1 else 1.0})  # fmt: skip
    ax.annotate("", (_ASKED + 0.5, 0.95), ((block - 0.5) * length + 1.65, 3.95), arrowprops={
        "arrowstyle": "->", "color": _TOKEN, "linewidth": 2.2, "connectionstyle": "arc3,rad=-0.35"})  # fmt: skip
    for i in range(block * length, _ASKED):
        ax.annotate("", (_ASKED + 0.35, -0.05), (i + 0.5, -0.05), arrowprops={
            "arrowstyle": "->", "color": _TOKEN, "linewidth": 1.6, "connectionstyle": "arc3,rad=0.45"})  # fmt: skip
    ax.text(0, 4.75, "Block decoder: attention over whole blocks", color=_BLOCK, fontsize=12)
    ax.text(0, -1.25, "Token decoder: attention inside the block, and the state of the block before", color=_TOKEN,
            fontsize=12)  # fmt: skip
    ax.set_title("What the byte “?” is predicted from", loc="left")
    ax.set_xlim(-0.2, len(text) + 0.2)
    ax.set_ylim(-1.5, 5.2)
    ax.set_axis_off()


def _positions(ax: Axes, losses: Tensor, entropy: float) -> None:
    names = [f"{i + 1}{suffix}" for i, suffix in enumerate(("st", "nd", "rd", "th"))]
    bars = ax.bar(names, losses.tolist(), color=[_BLOCK, *[_TOKEN] * 3], width=0.65)
    ax.bar_label(bars, fmt="%.2f", padding=2)
    ax.axhline(entropy, color="black", linewidth=1, linestyle=":")
    ax.text(3.4, entropy + 0.04, "from the frequencies of bytes alone", ha="right", fontsize=10)
    ax.set(title="Loss on unseen text, by place in the block", ylabel="nats per byte", xlabel="byte of the block")
    ax.set_ylim(0, entropy * 1.12)
    ax.spines[["top", "right"]].set_visible(False)


def _text(ax: Axes, piece: Tensor, losses: Tensor) -> None:
    """The text, coloured by how surprising each byte was; a bar under the first byte of every block."""
    colours, across = plt.get_cmap("YlOrRd"), 40
    for i, (byte, loss) in enumerate(zip(piece.tolist(), losses.tolist(), strict=True)):
        row, column = divmod(i, across)
        face = "white" if np.isnan(loss) else colours(min(loss / 6, 1.0))
        ax.add_patch(Rectangle((column, -row), 0.96, -0.86, facecolor=face, edgecolor="none"))
        if (i - 1) % 4 == 0:  # the first byte has a block of its own: 3 pad tokens stand before it
            ax.plot([column + 0.05, column + 0.91], [-row - 0.92] * 2, color=_BLOCK, linewidth=2.5)
        dark = not np.isnan(loss) and loss > 4.2
        ax.text(column + 0.48, -row - 0.43, _letter(chr(byte)), ha="center", va="center", family="monospace",
                fontsize=13, color="white" if dark else "black")  # fmt: skip
    ax.set_title("Unseen text: the redder, the less expected; a bar marks where a block begins", loc="left")
    ax.set_xlim(0, across)
    ax.set_ylim(-(len(piece) // across) - 0.15, 0.1)
    ax.set_axis_off()


def _caches(ax: Axes, config: BlockTransformerConfig) -> None:
    tokens = np.arange(4, 2049, 4)
    layers = config.block_layers + config.token_layers
    whole = [vanilla_cache_bytes(layers, config.block_width, int(t)) / 1024 for t in tokens]
    held = [cache_bytes(config, int(t)).total / 1024 for t in tokens]
    ax.plot(tokens, whole, color="#666666")
    ax.plot(tokens, held, color=_BLOCK, linewidth=2)
    ax.text(1500, whole[-1] * 0.93, "a vanilla decoder\nas deep and wide", ha="right", va="top", color="#666666",
            fontsize=11)  # fmt: skip
    ax.text(2040, held[-1] + whole[-1] * 0.04, f"Block Transformer: {whole[-1] / held[-1]:.1f} times less", ha="right",
            color=_BLOCK, fontsize=11)  # fmt: skip
    ax.set(title="Keys and values in bfloat16", xlabel="bytes of text", ylabel="KiB per sequence")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylim(bottom=0)

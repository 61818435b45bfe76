"""SeerAttention on real text: what each head of a small language model attends to, and what its gate has learned to expect.

A Llama of two layers is trained here on the topics of Python's help; then its gates learn from its attention alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

import heed
from heed.data.text import load_text
from heed.demos.registry import Figures, demos
from heed.language.seer import BlockChoice, GateDistillation, GateSettings, SeerAttention, SeerGates, distill

_TOKENS, _BLOCK = 512, 16
_STEPS, _GATE_STEPS, _EVERY = 150, 80, 10
_EARLY = (1, 2, 4, 6, 8)  # when much is learnt in few steps
_TEXTS = 4  # that the model and its gates have not seen
_CHOICE = BlockChoice("threshold", 0.04, last_dense=False)
_LIMITS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.09, 0.13, 0.2, 0.3)
_LEARNED, _GREY = "#D55E00", "#9a9a9a"


@demos.register("22-seerattention")
def seer(picture: Path) -> Figures:
    """Draw the true maps of all heads, pooled, the blocks their gates choose, and what is lost by visiting only these."""
    data = load_text()
    ids = data.train.long()
    texts = data.test[: _TEXTS * _TOKENS].long().view(_TEXTS, _TOKENS)
    model = _reader(ids)
    gates = SeerGates(model, GateSettings(block=_BLOCK), generator=torch.Generator().manual_seed(0))
    recall = {0: _look(model, gates, texts)[2]}

    def after(step: int, _: float) -> None:
        if step + 1 in _EARLY or (step + 1) % _EVERY == 0:
            recall[step + 1] = _look(model, gates, texts)[2]

    distill(model, gates, _batches(ids), steps=_GATE_STEPS, lr=1e-2, after=after)
    truths, chosen, _ = _look(model, gates, texts)

    dense = _perplexity(model, texts)
    curve = []
    with heed.apply(model, SeerAttention(gates, _CHOICE)) as handle:
        for limit in _LIMITS:
            handle.state.choice = BlockChoice("threshold", limit, last_dense=False)
            perplexity = _perplexity(model, texts)
            curve.append((handle.state.density().mean().item(), perplexity))
    half = min(curve, key=lambda point: abs(point[0] - 0.5))

    heads = [(layer, head) for layer in truths for head in range(truths[layer].shape[1])]
    figure = plt.figure(figsize=(15, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1.28, 1])
    above, below = (figure.add_subfigure(part) for part in grid)
    axes = above.subplots(2, len(heads))
    for column, (layer, head) in enumerate(heads):
        blocks, truth = chosen[layer][0, head], truths[layer][0, head]
        _true_map(axes[0, column], truth, f"layer {layer + 1}, head {head + 1}")
        _choice(axes[1, column], blocks, truth)
    axes[0, 0].set_ylabel("attention,\npooled", fontsize=11)
    axes[1, 0].set_ylabel("chosen by\nthe gate", fontsize=11)
    left, right = below.subplots(1, 2)
    _recall(left, recall)
    _curve(right, curve, dense)
    figure.suptitle(
        f"SeerAttention: gates learn which blocks of {_BLOCK} x {_BLOCK} characters a head will look at, "
        "and the others are skipped",
        fontsize=16, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(picture, dpi=105)
    plt.close(figure)

    share = {layer: _share(chosen[layer]) for layer in chosen}
    return {
        "setting": f"{len(texts)} unseen texts of {_TOKENS} characters, {len(heads)} heads, blocks of {_BLOCK}",
        "gates": f"{sum(x.numel() for x in gates.parameters()):,} weights, {_GATE_STEPS} steps",
        "attention on the chosen half of the blocks": f"{recall[0]:.0%} before, {max(recall.items())[1]:.0%} after",
        "density of heads": f"{min(map(min, share.values())):.0%} to {max(map(max, share.values())):.0%} at one threshold",
        "perplexity": f"{dense:.3f} dense, {half[1]:.3f} with {half[0]:.0%} of the blocks",
    }


def _reader(ids: Tensor) -> Any:
    """A language model of bytes, trained for some seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, _STEPS, pct_start=0.1)
    for _, batch in zip(range(_STEPS), _batches(ids), strict=False):
        loss = model(batch, labels=batch, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def _batches(ids: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        at = torch.randint(len(ids) - _TOKENS, (3, 1), generator=generator)
        yield ids[at + torch.arange(_TOKENS)]


@torch.no_grad()
def _look(model: Any, gates: SeerGates, texts: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor], float]:
    """Per layer the true maps and the chosen blocks (B, H, n, n); and the truth's share on the best half of the blocks."""
    with heed.apply(model, GateDistillation(gates)) as handle:
        handle.state.keep = True
        model(texts)
    state = handle.state
    half = BlockChoice("nz_ratio", 0.5, last_dense=False)
    shares = [(state.truths[i] * half.of_prompt(state.scores[i])).sum(-1).mean().item() for i in state.scores]
    chosen = {layer: _CHOICE.of_prompt(scores) for layer, scores in state.scores.items()}
    return state.truths, chosen, sum(shares) / len(shares)


@torch.no_grad()
def _perplexity(model: Any, texts: Tensor) -> float:
    logits = model(texts, use_cache=False).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).item())


def _share(blocks: Tensor) -> list[float]:
    """Chosen blocks over causal ones, per head."""
    size = blocks.shape[-1]
    return (blocks.sum((0, 2, 3)) / (len(blocks) * size * (size + 1) / 2)).tolist()


def _future(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _true_map(ax: Axes, truth: Tensor, title: str) -> None:
    """A map, every row by its largest entry, so that late rows can be seen."""
    shown = (truth / truth.amax(-1, keepdim=True)).sqrt().masked_fill(_future(len(truth)), math.nan)
    ax.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title, fontsize=10.5)
    _bare(ax)


def _choice(ax: Axes, blocks: Tensor, truth: Tensor) -> None:
    shown = blocks.float().masked_fill(_future(len(blocks)), math.nan)
    ax.imshow(shown.numpy(), cmap="Oranges", vmin=-0.12, vmax=1.5, interpolation="nearest")
    mass = (truth * blocks).sum(-1).mean().item()
    ax.set_xlabel(f"{_share(blocks[None, None])[0]:.0%} of the blocks,\n{mass:.0%} of the attention", fontsize=9.5)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)


def _recall(ax: Axes, recall: dict[int, float]) -> None:
    ax.plot(list(recall), [100 * value for value in recall.values()], color=_LEARNED, linewidth=2.5)
    ax.set(xlabel="steps of distillation, the model itself frozen")
    ax.set_title("Attention on the half of the blocks that the gates choose, %", loc="left")
    ax.margins(x=0.01)
    _light(ax)


def _curve(ax: Axes, curve: list[tuple[float, float]], dense: float) -> None:
    densities, perplexities = zip(*sorted(curve), strict=True)
    ax.plot([100 * x for x in densities], perplexities, color=_LEARNED, linewidth=2.5, marker="o")
    ax.axhline(dense, color=_GREY, linestyle="--")
    ax.annotate("all blocks", (100, dense), (0, 4), textcoords="offset points", ha="right", color="#555555")
    ax.set(xlabel="blocks visited, % of the causal ones: one gate, several thresholds", xlim=(0, 100))
    ax.set_title("Perplexity", loc="left")
    _light(ax)


def _light(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)

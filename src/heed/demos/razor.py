"""RazorAttention on a text that says a passage twice: which heads look it up, what each keeps, and what comes back.

A small Llama learns on the spot to continue random sequences that repeat, which takes heads that look for what came after the
same word before. Then it reads words of a real text, and is asked for the passage at the beginning again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor, nn

import heed
from heed.demos.registry import Figures, demos
from heed.errors import MissingExtra
from heed.language.razor import HeadScores, Razor, RetrievalHeads, profile_heads

_LAYERS, _HEADS, _WORDS = 2, 4, 40  # and so many different words
# Steps, rows and their length: short ones first, from which heads that look things up form sooner.
_LESSONS = ((450, 32, 64), (250, 8, 256))
_SIZES: dict[str, Any] = {"window": 8, "divisor": None, "sinks": 2}
_DROPPED, _FIRST, _LAST, _WHOLE = "#EEEEEE", "#E69F00", "#56B4E9", "#0072B2"
_RIGHT, _WRONG = "#009E73", "#D55E00"


@dataclass(frozen=True)
class _Reading:
    """What the model expects at the passage's second reading, word by word, with a cache; and the cache's bytes."""

    name: str
    said: Tensor
    known: Tensor
    nbytes: int
    cache: Any


@demos.register("65-razor")
def razor(picture: Path) -> Figures:
    """Draw the scores of all heads, what each keeps of a text, and a passage of it as four caches bring it back."""
    begin = time.perf_counter()
    model = _trained()
    seconds = time.perf_counter() - begin
    scores = profile_heads(model, segment=_WORDS - 2, repeats=4)
    heads = scores.select(0.25, 0.0)
    words, ids, passage = _text()
    others = _worst(scores, heads.count)
    readings = [
        _read(model, "All heads keep everything", None, ids, passage),
        _read(model, f"Razor: {heads.count} retrieval heads of {_LAYERS * _HEADS}", heads, ids, passage),
        _read(model, f"{others.count} other heads in their place", others, ids, passage),
        _read(model, "No head keeps everything", RetrievalHeads(((),) * _LAYERS, _HEADS), ids, passage),
    ]

    figure = plt.figure(figsize=(15, 11), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(1, 1.1, 1.5))
    top, middle, bottom = parts
    axes = top.subplots(1, 3, width_ratios=(1, 1, 1.3))
    induction, echo = scores.grouped()
    _scores(axes[0], induction, heads, "Induction: attention to what came next the last time")
    _scores(axes[1], echo, heads, "Echo: attention to the same word before")
    _bars(axes[2], readings)
    _kept(middle.subplots(), readings[1], heads, words)
    for ax, reading in zip(bottom.subplots(4, 1), readings, strict=True):
        _passage(ax, reading, dict(zip(ids[0].tolist(), ["start", *words], strict=True)), words[0])
    figure.suptitle(
        "RazorAttention: the few heads that look things up keep the whole text, the others its edges and a mean\n",
        fontsize=17,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=90)
    plt.close(figure)
    return {
        "setting": f"Llama of {_LAYERS} layers of {_HEADS} heads, trained for {seconds:.0f} s; {ids.shape[1]} words",
        **{
            reading.name: f"{reading.known.float().mean():.0%} of the passage, {reading.nbytes:,} bytes"
            for reading in readings
        },
    }


def _trained() -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=_WORDS,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.98), weight_decay=0)
        steps = sum(steps for steps, _, _ in _LESSONS)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, steps, pct_start=0.1)
        for batch, length in ((batch, length) for steps, batch, length in _LESSONS for _ in range(steps)):
            period = int(torch.randint(length // 8, length // 2 + 1, ()))
            rows = torch.randint(1, _WORDS, (batch, period)).repeat(1, length // period + 1)[:, :length]
            logits = model(rows[:, :-1], use_cache=False).logits[:, period:]
            optimiser.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), rows[:, period + 1 :].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()


def _text() -> tuple[list[str], Tensor, int]:
    """Words of scikit-learn's note on its digits, their ids (1, N), and how many of them are the passage."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "compare") from error
    digits: Any = load_digits()
    told = digits.DESCR.split("The data set contains")[1].split("For info")[0]
    words = ["The", "data", "set", "contains", *told.replace("\n", " ").split()]
    numbers: dict[str, int] = {}
    kept = []
    for word in words:
        if word not in numbers and len(numbers) == _WORDS - 1:
            break  # as far as the model's vocabulary goes
        numbers.setdefault(word, len(numbers) + 1)
        kept.append(word)
    return kept, torch.tensor([[0, *(numbers[word] for word in kept)]]), 24


def _worst(scores: HeadScores, count: int) -> RetrievalHeads:
    """As many heads with the lowest scores, from the last layer down where they tie."""
    induction, echo = scores.grouped()
    worst = (induction + echo).flatten().topk(count, largest=False).indices
    mask = torch.zeros(_LAYERS * _HEADS, dtype=torch.bool)
    mask[worst] = True
    return RetrievalHeads.of(mask.view(_LAYERS, _HEADS))


@torch.no_grad()
def _read(model: Any, name: str, heads: RetrievalHeads | None, ids: Tensor, passage: int) -> _Reading:
    """Read the text, then the passage word by word; a word is known if the model expects it after the one before."""
    every = RetrievalHeads.of(torch.ones(_LAYERS, _HEADS, dtype=torch.bool))
    with heed.apply(model, Razor(heads or every, **_SIZES)) as handle:
        cache = handle.state.cache()
        model(ids, past_key_values=cache)
        nbytes = cache.nbytes
        told = ids[:, 1 : passage + 2]
        logits = [model(told[:, i : i + 1], past_key_values=cache).logits for i in range(passage)]
    said = torch.cat(logits, 1).argmax(-1)[0]
    return _Reading(name, said, said == told[0, 1:], nbytes, cache)


def _scores(ax: Axes, scores: Tensor, heads: RetrievalHeads, title: str) -> None:
    ax.imshow(scores.numpy(), cmap="magma", vmin=0, vmax=1)
    for (layer, head), value in np.ndenumerate(scores.numpy()):
        light = value > 0.6
        ax.text(head, layer, f"{value:.2f}", ha="center", va="center", color="black" if light else "white", fontsize=11)
        if head in heads.layers[layer]:
            ax.add_patch(
                plt.Rectangle((head - 0.47, layer - 0.47), 0.94, 0.94, fill=False, edgecolor=_RIGHT, linewidth=4)
            )
    ax.set_title(title, fontsize=12)
    ax.set(xlabel="head", ylabel="layer", xticks=range(scores.shape[1]), yticks=range(scores.shape[0]))


def _bars(ax: Axes, readings: list[_Reading]) -> None:
    full = readings[0].nbytes / 1024
    for row, reading in enumerate(readings):
        size = reading.nbytes / 1024
        ax.barh(row, size, color=_WHOLE if row < 2 else "#999999")
        inside = size > 0.6 * full
        label = f"{size:.0f} KiB: {reading.name}"
        ax.text(size - 1 if inside else size + 1, row, label, va="center", fontsize=11, ha="right" if inside else "left",
                color="white" if inside else "black")  # fmt: skip
    ax.invert_yaxis()
    ax.set_title("Memory after reading the text", fontsize=12)
    ax.set(yticks=(), xticks=(), xlim=(0, full * 1.25))
    ax.spines[:].set_visible(False)


def _kept(ax: Axes, reading: _Reading, heads: RetrievalHeads, words: list[str]) -> None:
    """Every head's row: which of the text's words it holds."""
    tokens = len(words) + 1
    colours = torch.zeros(_LAYERS * _HEADS, tokens, dtype=torch.long)
    for number, layer in enumerate(reading.cache.layers):
        for (some, budget), store in zip(layer.groups, layer.held.stores, strict=True):
            at = store.at[0, store.extra :].long()
            at = at[at < tokens]
            for head in some:
                colours[number * _HEADS + head, at] = torch.where(at < budget.sinks, 1, 2)
        for head in heads.layers[number]:
            colours[number * _HEADS + head] = 3
    ax.imshow(
        colours.numpy(), cmap=ListedColormap([_DROPPED, _FIRST, _LAST, _WHOLE]), aspect="auto", vmin=0, vmax=3,
        interpolation="nearest",
    )  # fmt: skip
    for edge in range(1, _LAYERS * _HEADS):
        ax.axhline(edge - 0.5, color="white", linewidth=3 if edge % _HEADS == 0 else 1)
    ax.set_xticks(range(tokens), ["start", *words], rotation=90, fontsize=7)
    ax.set_yticks(range(_LAYERS * _HEADS), [f"{i // _HEADS}.{i % _HEADS}" for i in range(_LAYERS * _HEADS)], fontsize=8)
    ax.set_ylabel("layer.head")
    dropped = int(reading.cache.layers[0].held.stores[0].dropped[0]) if reading.cache.layers[0].held.stores else 0
    for colour, label in (
        (_WHOLE, "retrieval head: every word"),
        (_FIRST, "first words"),
        (_LAST, "last words"),
        (_DROPPED, f"{dropped} words in one mean token"),
    ):
        ax.plot([], [], "s", color=colour, markersize=11, markeredgecolor="#999999", label=label)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=12)
    ax.tick_params(length=0)


def _passage(ax: Axes, reading: _Reading, vocabulary: dict[int, str], first: str) -> None:
    """The words that the model expects next at every place of the passage, right ones in one colour, others in another."""
    ax.set_title(f"{reading.name}: {reading.known.float().mean():.0%} of the words come back", fontsize=12, loc="left")
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    words = [first, *(vocabulary.get(number, "?") for number in reading.said.tolist())]
    colours = ["#999999", *(_RIGHT if known else _WRONG for known in reading.known)]
    size, left = 1 / sum(len(word) + 1 for word in words), 0.0
    for word, colour in zip(words, colours, strict=True):
        width = (len(word) + 1) * size
        ax.text(left + width / 2, 0.45, word, ha="center", va="center", color=colour, fontsize=10.5, weight="bold",
                family="monospace")  # fmt: skip
        left += width

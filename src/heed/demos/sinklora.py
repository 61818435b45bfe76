"""SinkLoRA on a real text: what its heads may see while it is trained, and which letters H2O keeps afterwards.

A language model of two layers learns letters from the descriptions of scikit-learn's data sets, in some seconds, and reads
one it has not seen, with a cache of a fixed size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from heed.demos.registry import Figures, demos
from heed.errors import MissingExtra
from heed.language.h2o import H2O
from heed.language.sinklora import HeadGroups, visible_pairs
from heed.methods import apply

_SHOWN = 32  # words whose masks are drawn
_PROMPT, _SIZE = 100, 64
_BUDGETS = {"H2O": H2O(heavy=_SIZE // 2, recent=_SIZE // 2), "last letters only": H2O(heavy=0, recent=_SIZE)}
_LEARNT = ("iris", "wine", "breast_cancer", "diabetes", "linnerud")
_STEPS, _LENGTH, _BATCH = 300, 160, 8
_HEAVY, _RECENT, _EMPTY, _LEAK, _INK = "#E69F00", "#56B4E9", "#F4F4F4", "#D55E00", "#222222"
_COLUMNS = 66  # letters in a line


@demos.register("70-sinklora")
def sinklora(picture: Path) -> Figures:
    """Draw the masks of the kinds of heads, a text with what H2O still holds at its end, and the cache over time."""
    train, text = _texts()
    symbols = sorted(set(train + text))
    model = _trained(torch.tensor([symbols.index(letter) for letter in train]), len(symbols))
    ids = torch.tensor([symbols.index(letter) for letter in text])
    whole, _ = _read(model, ids, None)
    same, held = {}, {}
    for name, method in _BUDGETS.items():
        guesses, held[name] = _read(model, ids, method)
        same[name] = (guesses == whole).float().mean().item()

    figure = plt.figure(figsize=(16, 11.2), layout="constrained")
    above, below = cast("list[Figure]", figure.subfigures(2, 1, height_ratios=(1, 1.05)))
    s2, sf, rolled = HeadGroups(), HeadGroups(returned=0.5, sinks=4), HeadGroups(wrap=True)
    heads = {
        "S2-Attn, half of the heads:\nfour groups": s2.patterns(4, _SHOWN)[0],
        "S2-Attn, the other half:\nshifted by half a group": s2.patterns(4, _SHOWN)[3],
        "The same, rolled:\nthe first words see the future": rolled.patterns(4, _SHOWN)[3],
        "SF-Attn: three quarters as the\nfirst, and all see four sinks": sf.patterns(4, _SHOWN)[0],
    }
    for number, (ax, (title, pattern)) in enumerate(zip(above.subplots(1, 4), heads.items(), strict=True)):
        _mask(ax, pattern.mask(_SHOWN), text.split()[:_SHOWN] if number == 0 else [], sinks="sinks" in title)
        ax.set_title(title, fontsize=12)
    left, right = below.subplots(1, 2, width_ratios=(1.12, 1))
    _text(left, text, held["H2O"][-1])
    _timeline(right, held["H2O"])
    figure.suptitle(
        "SinkLoRA: trained in groups, which is cheap; used with full attention, or a cache of what matters (H2O)",
        fontsize=17, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(picture, dpi=100)
    plt.close(figure)

    tokens = 16384
    dense = tokens * (tokens + 1) / 2
    cost = {name: np.mean(visible_pairs(groups, 32, tokens)) / dense for name, groups in (("S2", s2), ("SF", sf))}
    return {
        "setting": f"{len(text)} letters, a cache of {_SIZE}",
        "next letter as with the whole cache": ", ".join(f"{name} {share:.0%}" for name, share in same.items()),
        "scores at 16,384 tokens, dense = 100 %": f"S2-Attn {cost['S2']:.1%}, SF-Attn {cost['SF']:.1%}",
    }


def _texts() -> tuple[str, str]:
    """What is learnt, and what is read."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtra("scikit-learn", "compare") from error
    learnt = " ".join(getattr(datasets, f"load_{name}")().DESCR for name in _LEARNT)
    read = cast(Any, datasets.load_digits()).DESCR
    read = read[read.index("The data set contains") : read.index("For info on NIST")]
    return " ".join(learnt.split()), " ".join(read.split())


def _trained(ids: Tensor, symbols: int) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=symbols, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, _STEPS)
    for _ in range(_STEPS):
        starts = torch.randint(0, len(ids) - _LENGTH, (_BATCH,)).tolist()
        some = torch.stack([ids[start : start + _LENGTH] for start in starts])
        optimiser.zero_grad()
        model(some, labels=some, use_cache=False).loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _read(model: Any, ids: Tensor, method: H2O | None) -> tuple[Tensor, Tensor]:
    """The likeliest next letter after the prompt and each letter, and how many heads hold which then (reads, letters)."""
    handle = None if method is None else apply(model, method)
    cache = None if handle is None else handle.state.cache()
    guesses, held = [], torch.zeros(len(ids) - _PROMPT + 1, len(ids))
    for step, stop in enumerate(range(_PROMPT, len(ids) + 1)):
        new = ids[None, :_PROMPT] if step == 0 else ids[None, stop - 1 : stop]
        out = model(new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        guesses.append(out.logits[0, -1].argmax())
        if handle is not None:
            for layer in cache.layers:
                held[step].index_add_(
                    0, layer.held.positions[0].flatten().long(), torch.ones(layer.held.scores.numel())
                )
    if handle is not None:
        handle.remove()
    return torch.stack(guesses), held


def _mask(ax: Axes, mask: Tensor, words: list[str], sinks: bool) -> None:
    picture = mask.long()
    picture[mask.triu(1)] = 2
    if sinks:
        picture[:, :4] *= 3
    ax.imshow(picture.numpy(), cmap=ListedColormap([_EMPTY, "#0072B2", _LEAK, _HEAVY]), vmin=0, vmax=3)
    ax.set_xticks(np.arange(-0.5, len(mask)), minor=True)
    ax.set_yticks(np.arange(-0.5, len(mask)), minor=True)
    ax.grid(which="minor", color="white", linewidth=0.8)
    ax.tick_params(which="both", length=0)
    ax.set_xticks([])
    ax.set_yticks(range(len(words)), words, fontsize=7.5)
    ax.set_xlabel("words seen")


def _colours(held: Tensor, read: int) -> np.ndarray:
    """(letters, 3): the stronger, the more heads hold a letter; the last ones in another colour."""
    share = (held / held.max()).numpy()[:, None]
    share = np.where(share > 0, 0.15 + 0.85 * share, 0)
    colour = np.tile(to_rgb(_HEAVY), (len(held), 1))
    colour[max(0, read - _SIZE // 2) : read] = to_rgb(_RECENT)
    return share * colour + 1 - share


def _text(ax: Axes, text: str, held: Tensor) -> None:
    """The text in lines, each letter on the colour of its fate."""
    colours = _colours(held, len(text))
    starts, line = [0], 0
    for at, letter in enumerate(text):  # the last space before the end of a line ends it
        if letter == " ":
            line = at + 1
        if at - starts[-1] >= _COLUMNS:
            starts.append(line)
    for row, (start, stop) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True)):
        for column, at in enumerate(range(start, stop)):
            ax.add_patch(plt.Rectangle((column - 0.5, row - 0.4), 1, 0.8, color=colours[at], linewidth=0))
            ax.text(column, row, text[at], family="monospace", fontsize=12, ha="center", va="center", color=_INK)
    ax.set_xlim(-1, _COLUMNS + 1)
    ax.set_ylim(len(starts), -1)
    ax.set_axis_off()
    title = "What H2O holds at the end: letters with most attention (the more heads hold one,"
    ax.set_title(f"{title}\nthe stronger), and the last ones", fontsize=12)


def _timeline(ax: Axes, held: Tensor) -> None:
    """Which letters are in the cache after each letter."""
    letters = held.shape[1]
    picture = np.stack([_colours(row, _PROMPT + step) for step, row in enumerate(held)], 1)
    ax.imshow(picture, interpolation="nearest", aspect="auto", extent=(_PROMPT, letters, letters, 0))
    ax.set_xlabel("letters read")
    ax.set_ylabel("place of the letter in the text")
    ax.set_title("The cache after every letter: a line that ends is a letter\nthat the heads have evicted", fontsize=12)

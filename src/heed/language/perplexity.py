"""Perplexity of a text for contexts of several lengths, by windows that move along it.

    ppl(L) = exp( mean over scored tokens of -log p(x_t | up to L - 1 tokens before it) )

A window of L tokens moves by `stride`; of each the last `stride` tokens are scored, of the first all. With a stride of L the
windows do not overlap, and most tokens have less context; LongLoRA and SinkLoRA move by 256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

import heed.methods
from heed.catalogue import provides
from heed.methods import Method


@provides("70-sinklora")
@torch.no_grad()
def perplexity_by_length(
    model: Any,
    ids: Int[Tensor, " T"],
    lengths: Sequence[int],
    *,
    stride: int | None = 256,
    method: Method | None = None,
    batch: int = 1,
) -> dict[int, float]:
    """Perplexity of a text for every context length.

    Args:
        model: of transformers, for causal language modelling; in evaluation mode for as long as this takes.
        ids: (T,) the text, at least as long as the longest context.
        lengths: tokens that a window has, each >= 2.
        stride: tokens by which it moves, at most its length; None for windows that do not overlap.
        method: applied to the model meanwhile.
        batch: windows at once.

    Returns:
        length to perplexity, for the text's first floor((T - length) / stride) + 1 windows.

    Raises:
        ValueError: a text that is shorter than a window, or lengths or a stride that are not possible.
    """
    if (stride is not None and stride < 1) or batch < 1:
        raise ValueError(f"stride={stride} and batch={batch} must be at least 1")
    for length in lengths:
        if not 2 <= length <= len(ids):
            raise ValueError(f"length={length} must lie between 2 and the {len(ids)} tokens of the text")
    training, found = model.training, {}
    model.eval()
    try:
        with nullcontext() if method is None else heed.methods.apply(model, method):
            for length in lengths:
                found[length] = _perplexity(model, ids, length, min(stride or length, length), batch)
    finally:
        model.train(training)
    return found


def _perplexity(model: Any, ids: Tensor, length: int, step: int, batch: int) -> float:
    windows = ids.to(next(model.parameters()).device).unfold(0, length, step)
    total, scored = 0.0, 0
    for begin in range(0, len(windows), batch):
        window = windows[begin : begin + batch]
        logits = model(window, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")
        keep = torch.zeros_like(loss, dtype=torch.bool)
        keep[:, -step:] = True
        if begin == 0:
            keep[0] = True
        total, scored = total + loss[keep].double().sum().item(), scored + int(keep.sum())
    return math.exp(total / scored)

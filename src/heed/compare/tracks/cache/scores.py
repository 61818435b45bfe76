"""How well a model goes on with a text, and what that takes: the prompt at once, then token by token.

    perplexity = exp( mean over prompts and following tokens of -log p(x_t | x_<t) )

Only tokens after the prompt count, each given alone: so a method's cache is what predicts them, and methods that choose keys
for a block of queries together see none that are yet to come.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from heed.language.caches.layer import cache_nbytes


@dataclass(frozen=True)
class Continued:
    """What was found.

    Args:
        perplexity: of the following tokens.
        bytes: of the cache at the end, per token and sequence.
        prefill: prompt tokens per second.
        decode: following tokens per second.
    """

    perplexity: float
    bytes: float
    prefill: float
    decode: float


@torch.no_grad()
def continued(
    model: Any,
    texts: Int[Tensor, "T L"],
    prompt: int,
    cache: Callable[[], Any],
    batch: int,
    tell: Callable[[int], None],
) -> Continued:
    """Go on with texts.

    Args:
        model: of transformers, perhaps with a method applied.
        texts: (T, prompt + following) tokens.
        prompt: how many tokens are read at once.
        cache: a new, empty cache.
        batch: texts at once.
        tell: told how many texts are done.
    """
    loss, tokens, size, prefill, decode = 0.0, 0, 0, 0.0, 0.0
    for start in range(0, len(texts), batch):
        rows = texts[start : start + batch].to(model.device)
        kept = cache()
        begin = _now(model)
        logits = model(rows[:, :prompt], past_key_values=kept, logits_to_keep=1).logits
        read = _now(model)
        for at in range(prompt, rows.shape[1]):
            loss += functional.cross_entropy(logits[:, -1].double(), rows[:, at], reduction="sum").item()
            logits = model(rows[:, at : at + 1], past_key_values=kept).logits
        prefill, decode = prefill + read - begin, decode + _now(model) - read
        tokens, size = tokens + rows[:, prompt:].numel(), size + cache_nbytes(kept)
        tell(start + len(rows))
    return Continued(math.exp(loss / tokens), size / texts.numel(), len(texts) * prompt / prefill, tokens / decode)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()

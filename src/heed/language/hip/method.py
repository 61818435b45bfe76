"""HiP on a language model of transformers: attention over what the tree search finds, in the layers that are not dense.

prompt      the first dense_queries see everything; then every block of block_q queries is searched for
decoding    a search every `refresh` tokens; in between its choice is used again, and the window grows by a token each
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall
from heed.language.hip.attention import choose_blocks, hip_attention, sparse_attention
from heed.language.hip.search import HiPBudget, Selection
from heed.language.spans import Span
from heed.language.sparse import SpanRule, sparse_layers
from heed.methods import Handle, Method

# Prompts up to this many tokens begin with no dense queries in the authors' release.
_SHORT = 32


@provides("57-hip")
@dataclass(frozen=True)
class HiP(HiPBudget, Method):
    """Sparse attention for long prompts and long caches, without training.

        with heed.apply(model, HiP(mask_k=1024)) as handle:
            model.generate(ids)
            print(handle.state.searches, handle.state.reuses)

    Prompts, prompts in parts (`prefill_chunk_size`) and decoding work, as do padding, grouped-query heads, beams, training
    and static caches. A prompt of at most mask_k + window tokens gets dense attention exactly. The cache is as large as
    before. Layers with a sliding window of their own are left as they are.

    Of the follow-up InfiniteHiP (arXiv 2502.08910) nothing is implemented: neither pruning in stages, nor the extension of
    the context by other rotary positions, nor moving keys and values to another memory. Of the authors' draft, scores from
    all keys of a run (`oracle_rep`) and several searches united (sifters) are left out too.

    Args:
        mask_k, block_q, block_k, group, window, sinks, scale_window: see `HiPBudget`.
        dense_layers: numbers of the attention layers that stay as they are; negative ones count from the last. The first
            three in the paper; (0, 1, 2, 3, 31) for a model of 32 layers in the authors' later versions.
        dense_queries: so many tokens at the beginning of a prompt see everything before them; None for the authors' number,
            which grows with the prompt (`dense_start`).
        refresh: tokens decoded with one choice.
    """

    dense_layers: tuple[int, ...] = (0, 1, 2)
    dense_queries: int | None = None
    refresh: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None:
            raise ValueError("window=None: a decoder needs its last tokens; give a window of at least block_q")
        if self.refresh < 1:
            raise ValueError(f"refresh={self.refresh} must be at least 1, a search for every token")
        if self.dense_queries is not None and self.dense_queries < 0:
            raise ValueError(f"dense_queries={self.dense_queries} must be >= 0, or None for the authors' number")

    def attach(self, host: nn.Module, handle: Handle) -> HiPState:
        layers = sparse_layers(host, "HiP", self.dense_layers)
        state = HiPState()
        attach_rule(host, _HiPRule(self, state), handle, layers)
        return state


@provides("57-hip")
def dense_start(queries: int, keys: int, mask_k: int) -> int:
    """How many of the queries, the last ones of `keys` tokens, the authors' first release computes densely.

    3 mask_k (1 + log2(keys / mask_k / 2)) tokens from the beginning on, where dense attention was faster for them.
    """
    if queries <= _SHORT:
        return 0
    tokens = int((math.log2(keys / mask_k / 2) * mask_k + mask_k) * 3)
    return min(queries, max(0, tokens - keys + queries))


@dataclass
class _Choice:
    """What a layer chose for a span of rows, when it had so many keys of which this was the last."""

    selection: Selection
    keys: int
    last: Tensor
    age: int = 1

    def fits(self, k: Tensor) -> bool:
        """Whether k (B, G, K, D) are the same keys and one more: not another prompt, nor other beams."""
        return (
            k.shape[2] == self.keys + 1 and k.shape[:2] == self.last.shape[:2] and torch.equal(k[:, :, -2], self.last)
        )


class HiPState:
    """What HiP keeps about a host: the choices of its layers between two searches of a decoder, and how often it searched.

    Attributes:
        searches: tokens for which a layer searched while decoding.
        reuses: tokens for which it used an earlier choice.
    """

    def __init__(self) -> None:
        self.searches = self.reuses = 0
        self._choices: dict[tuple[int, tuple[int, ...], int], _Choice] = {}

    def forget(self, layer: int) -> None:
        """A new prompt, or more of it: what was chosen is of no use."""
        for key in [key for key in self._choices if key[0] == layer]:
            del self._choices[key]

    def choice(self, layer: int, span: Span, q: Tensor, k: Tensor, budget: HiPBudget, refresh: int) -> Selection:
        """The key blocks of one query per row (B, H, 1, D): those chosen before, or new ones."""
        place = (layer, span.rows, span.first)
        found = self._choices.get(place)
        if found is not None and found.age < refresh and found.fits(k):
            found.keys, found.last, found.age = k.shape[2], k[:, :, -1].clone(), found.age + 1
            self.reuses += 1
        else:
            found = _Choice(choose_blocks(q, k, budget), k.shape[2], k[:, :, -1].clone())
            self._choices[place] = found
            self.searches += 1
        return found.selection


class _HiPRule(SpanRule):
    """Computes the attention of a layer by HiP."""

    def __init__(self, method: HiP, state: HiPState) -> None:
        super().__init__()
        self.method, self.state = method, state

    def core(self, call: AttentionCall) -> Tensor | None:
        if call.query.shape[2] > 1:
            self.state.forget(call.layer)
        return super().core(call)

    def attend(self, call: AttentionCall, span: Span) -> Tensor:
        """(rows, H, queries, E) attention of the span's rows."""
        method = self.method
        q, k, v = span.queries(call.query), span.keys(call.key), span.keys(call.value)
        queries, keys = q.shape[2], k.shape[2]
        if call.query.shape[2] == 1 and not bool(method.sees_all(torch.tensor(keys))):
            selection = self.state.choice(call.layer, span, q, k, method, method.refresh)
            return sparse_attention(q, k, v, selection, scale=call.scale, dropout=call.dropout)
        if method.dense_queries is None:
            dense = dense_start(queries, keys, method.mask_k)
        else:
            dense = max(0, method.dense_queries - keys + queries)
        return hip_attention(q, k, v, method, dense_queries=dense, scale=call.scale, dropout=call.dropout)

"""Any of the engine's patterns as the attention of a language model of transformers.

    o_i = softmax over { j <= i : pattern keeps (i, j) } of scale q_i k_j^T, times v_j      i, j positions without padding

This is the way to a sliding window, a dilated or strided one, both together (`Window(256) | Strided(64)`), or what else the
algebra of patterns gives, in models that were written for dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heed.engine.attend import attend
from heed.engine.pattern import Pattern
from heed.engine.sequences import Causal, Full
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall
from heed.language.spans import Span
from heed.language.sparse import SpanRule, sparse_layers
from heed.methods import Handle, Method


@dataclass(frozen=True)
class Patterned(Method):
    """Let the layers of a decoder attend under a pattern, and causally; training, prompts, decoding and padding work.

    A pattern is taken for all tokens there are so far: one that depends on how many that is (`Blocks` of a grid, say) may
    change for earlier tokens as the text grows, and so may not fit a model that keeps a cache.

    Args:
        pattern: one that does not depend on the content, e.g. `heed.patterns.Window(256)`; causality is added.
        dense_layers: numbers of layers that are left as they are; negative ones count from the last.

    Raises:
        ValueError: the pattern depends on batch, head or content.
    """

    pattern: Pattern
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise TypeError(f"pattern={self.pattern!r} must be one of heed.patterns")
        if not self.pattern.static:
            raise ValueError(f"pattern={self.pattern} is chosen by content; give one that is the same for every text")

    def attach(self, host: nn.Module, handle: Handle) -> None:
        attach_rule(host, _PatternedRule(self.pattern), handle, sparse_layers(host, "Patterned", self.dense_layers))


class _PatternedRule(SpanRule):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def attend(self, call: AttentionCall, span: Span) -> Tensor:
        q, k, v = span.queries(call.query), span.keys(call.key), span.keys(call.value)
        queries, keys = q.shape[2], k.shape[2]
        if queries == keys:
            return attend(q, k, v, Causal() & self.pattern, scale=call.scale, dropout=call.dropout)
        # The last queries only: their rows of the mask, dense, since there are few.
        self.pattern.check(keys, keys)
        keep = (Causal() & self.pattern).rule(keys, keys, q.device)
        zero = torch.zeros((), dtype=torch.long, device=q.device)
        at, key = torch.arange(keys - queries, keys, device=q.device), torch.arange(keys, device=q.device)
        mask = torch.zeros(queries, keys, device=q.device).masked_fill(
            ~keep(zero, zero, at[:, None], key[None]), -torch.inf
        )
        return attend(q, k, v, Full(), bias=mask[None, None], scale=call.scale, dropout=call.dropout)

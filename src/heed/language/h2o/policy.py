"""Which tokens H2O keeps: the attention that keys received, and the choice by it.

    s_j = sum_i A[i, j]                        over the queries i of a call and the heads of a key-value head
    kept = top-heavy of s over the tokens before the last `recent`,  and the last `recent`

The authors' code sums over the batch; here every sequence has its own scores and its own choice. That the heads of a
key-value head add their attention up is heed's own rule: the authors' models had a key head for every query head.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.hosts.rules import AttentionCall
from heed.language.saliency import probe_saliency

_QUERIES_AT_ONCE = 512  # of a long prompt; they see no keys after the last of them


@provides("70-sinklora")
def attention_received(call: AttentionCall, tokens: Bool[Tensor, "B K"] | None = None) -> Float[Tensor, "B G K"]:
    """The attention weights of a call, summed over its queries, in float32; no matrix of queries and keys is formed.

    Args:
        call: of causal attention, its queries being the last of its keys.
        tokens: (B, K), False for padding, which neither gives nor gets any. None for none.

    Returns:
        (B, G, K), G key-value heads.
    """
    batch, queries, keys = len(call.query), call.query.shape[2], call.key.shape[2]
    total = torch.zeros(*call.key.shape[:3], device=call.key.device)
    for begin in range(0, queries, _QUERIES_AT_ONCE):
        stop = min(begin + _QUERIES_AT_ONCE, queries)
        seen = keys - queries + stop
        part = call.replace(
            query=call.query[:, :, begin:stop],
            key=call.key[:, :, :seen],
            mask=None if call.mask is None else call.mask.expand(batch, -1, queries, keys)[:, :, begin:stop, :seen],
        )
        real = None if tokens is None else tokens[:, :seen]
        counts = [stop - begin] if real is None else real[:, begin - stop :].sum(-1).tolist()
        weights = probe_saliency(part, [torch.arange(count) for count in counts], real, "accumulated")
        total[..., :seen] += weights if real is None else weights.masked_fill(~real[:, None], 0)
    return total


@provides("70-sinklora")
def heavy_hitters(
    scores: Float[Tensor, "B G K"],
    heavy: Int[Tensor, " B"],
    recent: Int[Tensor, " B"],
    tokens: Bool[Tensor, "B K"] | None = None,
) -> Bool[Tensor, "B G K"]:
    """The tokens that stay: in every head min(tokens, heavy + recent) of them.

    Args:
        scores: the attention that each of them got.
        heavy, recent: how many to keep of those that got most, and of the last ones, for every sequence.
        tokens: (B, K), False for padding. None for none.
    """
    if tokens is None:
        tokens = torch.ones(scores.shape[0], scores.shape[2], dtype=torch.bool, device=scores.device)
    heavy, recent = (x.to(scores.device)[:, None] for x in (heavy, recent))
    from_the_end = tokens.flip(-1).cumsum(-1).flip(-1)
    last = tokens & (from_the_end <= recent)
    candidates = (tokens & ~last)[:, None]
    rank = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return last[:, None] | (candidates & (rank < heavy[:, None]))

"""Attention over heads that keep different tokens, one of which may stand for N_d others.

    out = [sum_n exp(s_n) v_n + N_d exp(s_c) v_c] / [sum_n exp(s_n) + N_d exp(s_c)],     s = scale q k^T

That is attention over one more key, with ln N_d added to its score: what fused kernels compute with a row of biases. Tang et
al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", ICLR 2025, arXiv 2407.15891, equation 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal
from heed.hosts.rules import AttentionCall, attention_weights, repeat_heads
from heed.language.caches.rule import CacheRule
from heed.language.razor.store import WindowStore

if TYPE_CHECKING:
    from heed.language.razor.layer import RazorLayer


class RazorRule(CacheRule):
    """Computes the attention over what a `RazorLayer` holds; that over a prompt is left to the host."""

    layer: RazorLayer | None

    def core(self, call: AttentionCall) -> Tensor | None:  # type: ignore[override]
        return None if self.layer is None else self.layer.attend(call)


@provides("65-razor")
def compensated_attention(
    q: Float[Tensor, "B H N D"], store: WindowStore, *, scale: float | None = None
) -> Float[Tensor, "B H N E"]:
    """Attention over a store whose last N tokens are the queries' own.

    Args:
        q: (B, H, N, D), H a multiple of the store's heads.
        store: what the heads hold, the queries' own tokens included.
        scale: factor on q k^T, default D ** -0.5.
    """
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    call = AttentionCall(torch.nn.Identity(), 0, q, store.keys, store.values, None, causal=True, scale=factor)
    return attend_columns(call, column_bias(store, q.dtype))


def column_bias(store: WindowStore, dtype: torch.dtype) -> Float[Tensor, "B 1 1 M"] | None:
    """What is added to the scores of a store's columns: ln N_d, 0, or -inf for an empty one; None for nothing.

    In half precision ln N_d has few digits. The softmax depends on differences of scores alone, so all other columns are
    given what is missing, which is small and therefore exact enough.
    """
    if not store.extra and not store.ragged:
        return None
    bias = torch.zeros(store.at.shape, dtype=dtype, device=store.at.device)
    if store.extra:
        wanted = store.dropped.clamp(min=1).to(store.mean_keys.dtype).log()  # type: ignore[union-attr]
        rounded = wanted.to(dtype)
        bias += (rounded - wanted).to(dtype)[:, None]
        bias[:, 0] = rounded
    if store.ragged:
        bias = bias.masked_fill(store.at < 0, -torch.inf)
    return bias[:, None, None]


def attend_columns(call: AttentionCall, bias: Float[Tensor, "#B #H #N M"] | None) -> Float[Tensor, "B H N E"]:
    """softmax(scale q k^T + bias) v; the last N of the M columns are the queries' own tokens, seen causally.

    Args:
        call: queries (B, H, N, D), keys and values (B, g, M, D), scale, dropout and softcap; its mask is not looked at.
        bias: added to the scores; one row for all queries, or one for each, which then says what it may see.
    """
    q, k, v = call.query, call.key, call.value
    (heads, queries), (groups, columns) = q.shape[1:3], k.shape[1:3]
    own = bias is not None and bias.shape[2] > 1
    if call.softcap is not None:
        mask = k.new_zeros(1, 1, 1, columns) if bias is None else bias
        if not own:
            seen = torch.ones(queries, columns, dtype=torch.bool, device=q.device).tril(columns - queries)
            mask = mask.masked_fill(~seen, -torch.inf)
        weights = attention_weights(call.replace(mask=mask, causal=False))
        return F.dropout(weights, call.dropout) @ repeat_heads(v, heads)
    if queries == 1:  # the heads of a group as its queries: their keys are read once
        q = q.view(len(q), groups, heads // groups, -1)
        if bias is not None and bias.shape[1] > 1:
            bias = bias.view(len(bias), groups, heads // groups, columns)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=call.dropout, scale=call.scale)
        return out.reshape(len(q), heads, 1, -1)
    # Each query's own row of biases is causal already.
    return attend(q, k, v, Causal(columns - queries), bias=bias, scale=call.scale, dropout=call.dropout)

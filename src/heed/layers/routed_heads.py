"""Attention of the chosen (token, head) pairs alone: what makes Mixture-of-Head attention cheaper (card 27).

    out[b, n, i] = g[b, n, i] softmax(scale * q[b, i, n] . k[b, i, :]) v[b, i, :]   where token n uses head i, else 0

For every routed head the queries of its tokens are gathered, attend to all keys, and are scattered back. Heads (of any
batch element) with about as many tokens share one call, filled up with queries whose gate is 0. Keys, values and all
projections are as in multi-head attention; Jin et al., arXiv 2410.11842, describe the saving; their code computes all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heed.engine.attend import attend
from heed.engine.patterns import Full

# Heads share a call while the smallest has at least this share of the largest's tokens: the rest is wasted work.
_ALIKE = 0.8
# Gathering and scattering cost about as much as this many scores for every token and head, chosen or not. Measured on
# CPUs at head width 64: half of the heads pay from 520 tokens on, three quarters from 1,040. Elsewhere: a guess.
_OVERHEAD = {"cpu": 260}
_OVERHEAD_ELSEWHERE = 512


def gathering_pays(tokens: int, heads: int, active: int, device: torch.device) -> bool:
    """Whether `attend_routed` is expected to beat computing all heads; a compiled graph cannot gather by content.

    Args:
        tokens: N, keys and queries.
        heads: all heads.
        active: heads per token.
        device: where it runs.
    """
    if torch.compiler.is_compiling():
        return False
    return (heads - active) * tokens > heads * _OVERHEAD.get(device.type, _OVERHEAD_ELSEWHERE)


def attend_routed(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    gates: Float[Tensor, "B N H"],
    mask: Bool[Tensor, "B N E"],
    *,
    scale: float | Float[Tensor, ...] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B N H Dv"]:
    """Gated attention output per head, computed for the chosen pairs alone; forward and backward.

    Args:
        q, k, v: (B, H, N, D) queries, keys, values; shared heads first.
        gates: (B, N, H) weights of the heads.
        mask: (B, N, E) bool, which of the last E heads a token uses; all tokens use the heads before.
        scale: factor on q k^T, default D ** -0.5, or a tensor that broadcasts to (B, H, N, 1).
        dropout: probability of dropping a weight.

    Returns:
        (B, N, H, Dv), equal to `gated_heads` of all heads' outputs up to rounding.

    Raises:
        ValueError: gates or a mask of other tokens or heads.
    """
    batch, heads, n, _ = q.shape
    if gates.shape != (batch, n, heads):
        raise ValueError(f"gates {tuple(gates.shape)} must be (B, N, heads) = {(batch, n, heads)}")
    routed = mask.shape[-1]
    if mask.shape[:2] != (batch, n) or not 0 < routed <= heads:
        raise ValueError(f"mask {tuple(mask.shape)} must be (B, N, routed) = ({batch}, {n}, 1 to {heads})")
    if isinstance(scale, Tensor):
        q, scale = q * scale, 1.0
    gates, shared = gates.to(v.dtype), heads - routed
    out = v.new_zeros(batch, n, heads, v.shape[-1])
    if shared:
        always = attend(q[:, :shared], k[:, :shared], v[:, :shared], Full(), scale=scale, dropout=dropout)
        out[:, :, :shared] = always.transpose(1, 2) * gates[..., :shared, None]
    q, k, v = (x[:, shared:] for x in (q, k, v))
    queries = q.flatten(0, 2)
    for rows, tokens in _packs(mask.transpose(1, 2).flatten(0, 1)):
        element, head = rows // routed, rows % routed
        chosen = queries.index_select(0, (rows[:, None] * n + tokens).flatten()).unflatten(0, tokens.shape)
        if len(rows) == batch * routed:
            y = attend(chosen.unflatten(0, (batch, routed)), k, v, Full(), scale=scale, dropout=dropout)
        else:
            keys, values = (x[element, head, None] for x in (k, v))
            y = attend(chosen[:, None], keys, values, Full(), scale=scale, dropout=dropout)
        place = ((element[:, None] * n + tokens) * heads + shared + head[:, None]).flatten()
        weight = gates.flatten().index_select(0, place)
        out.view(-1, v.shape[-1]).index_copy_(0, place, y.flatten(0, 2) * weight[:, None])
    return out


def _packs(mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of a (rows, N) mask with about equal counts, as (rows (R,), tokens (R, count of the largest)).

    A row's own tokens come first, others follow. All rows together keep their order, so that nothing need be copied.
    """
    counts = mask.sum(1)
    tokens = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    found = counts.tolist()
    if min(found) >= _ALIKE * max(found):
        return [(torch.arange(len(found), device=mask.device), tokens[:, : max(found)])]
    packs: list[list[int]] = []
    for row in sorted(range(len(found)), key=found.__getitem__, reverse=True):
        if found[row] == 0:
            break
        if not packs or found[row] < _ALIKE * found[packs[-1][0]]:
            packs.append([])
        packs[-1].append(row)
    result = []
    for pack in packs:
        rows = torch.tensor(pack, device=mask.device)
        result.append((rows, tokens[rows, : found[pack[0]]]))
    return result

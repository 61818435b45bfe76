"""Attention inside one group of tokens, with learned relative positions for keys and for values.

    r[i, j] = clip(j - (M - L + i), -R, R) + R      L queries stand at the last L of the group's M places
    S = q k^T + q . Rk[r] + bias                    q (G, C, L, d);  k, v (G, C, M, d);  Rk, Rv (2 R + 1, d);  S (G, C,
    L, M) y = A v + A . Rv[r],   A = dropout(softmax(S))  (G, C, L, d)

A place is a rank inside the group, not a position in the text. Positions as in Shaw et al., NAACL 2018, arXiv
1803.02155, here with one table for all heads, as Roy et al. have it (arXiv 2003.05997).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full

# What the authors add to the score of a key that must not be seen. A row with no other key becomes their mean.
_HIDDEN = -1e9


@provides("08-routing")
class RelativePositions(nn.Module):
    """Vectors for the relative ranks -R .. R, for keys and for values, shared by heads.

    Args:
        reach: R; farther ranks share the vectors at the ends.
        dim: width d of a head.
    """

    def __init__(self, reach: int, dim: int) -> None:
        super().__init__()
        self.reach = reach
        self.keys = nn.Parameter(torch.empty(2 * reach + 1, dim))
        self.values = nn.Parameter(torch.empty(2 * reach + 1, dim))
        for table in (self.keys, self.values):
            nn.init.xavier_uniform_(table, gain=0.2**0.5)

    def attend(
        self,
        q: Float[Tensor, "G C L d"],
        k: Float[Tensor, "G C M d"],
        v: Float[Tensor, "G C M d"],
        bias: Float[Tensor, "#G #C #L M"],
        dropout: float = 0.0,
    ) -> Float[Tensor, "G C L d"]:
        """The equations that open this module. The softmax is written out, since Rv needs the weights after dropout."""
        queries, keys = q.shape[-2], k.shape[-2]
        low, high = max(-self.reach, 1 - keys), min(self.reach, queries - 1)  # the offsets that occur, clipped
        offsets = torch.arange(keys, device=q.device) - torch.arange(keys - queries, keys, device=q.device)[:, None]
        r = (offsets.clamp(low, max(low, high)) - low).expand(*q.shape[:-1], keys)
        used = slice(low + self.reach, max(low, high) + self.reach + 1)
        scores = q @ k.transpose(-1, -2) + (q @ self.keys[used].to(q.dtype).T).gather(-1, r) + bias.to(q.dtype)
        weights = F.dropout(scores.float().softmax(-1), dropout).to(v.dtype)
        by_offset = weights.new_zeros(*q.shape[:-1], used.stop - used.start).scatter_add(-1, r, weights)
        return weights @ v + by_offset @ self.values[used].to(v.dtype)


@provides("08-routing")
def attend_group(
    q: Float[Tensor, "G C L d"],
    k: Float[Tensor, "G C M d"],
    v: Float[Tensor, "G C M d"],
    bias: Float[Tensor, "#G #C #L M"],
    relative: RelativePositions | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "G C L d"]:
    """Attention of every group (G, C) on its own; q brings its scale with it.

    Args:
        q: (G, C, L, d) queries of the last L places.
        k, v: (G, C, M, d) keys and values.
        bias: added to the scores, see `visible_bias`.
        relative: the tables, or None for softmax(q k^T + bias) v.
        dropout: probability of dropping a weight.
    """
    if relative is not None:
        return relative.attend(q, k, v, bias, dropout)
    bias = bias.to(q.dtype)
    # Beside -1e9 scores round away, and fused kernels cannot find the weights again for the gradient of such a row.
    blind = bias.numel() > 0 and bool((bias.amax(-1) < _hidden(bias.dtype) / 2).any())
    return attend(
        q, k, v, Full(), bias=bias, scale=1.0, dropout=dropout, backend="reference" if blind else "auto"
    )  # fmt: skip


@provides("08-routing")
def visible_bias(
    v: Float[Tensor, "G C M d"], queries: int, *, masked: bool, padding: Bool[Tensor, "G C M"] | None = None
) -> Float[Tensor, "G C 1 M"] | Float[Tensor, "G C L M"]:
    """0 for keys that may be seen and -1e9 for the others, (G, C, 1, M), or (G, C, L, M) where later ranks are hidden.

    Args:
        v: values; a key whose value is exactly zero counts as padding, as in the authors' code.
        queries: L, at the last places.
        masked: a query sees no rank above its own.
        padding: (G, C, M) True where a key is padding all the same.
    """
    hidden = v.detach().abs().sum(-1) == 0
    if padding is not None:
        hidden = hidden | padding
    hidden = hidden[..., None, :]
    if masked and queries > 1:
        keys = v.shape[-2]
        hidden = hidden | torch.ones(queries, keys, dtype=torch.bool, device=v.device).triu(keys - queries + 1)
    return torch.zeros_like(hidden, dtype=v.dtype).masked_fill(hidden, _hidden(v.dtype))


def _hidden(dtype: torch.dtype) -> float:
    return max(_HIDDEN, torch.finfo(dtype).min)

"""What a gate learns from: the model's own attention map, pooled over blocks, without ever forming the map (card 22).

    A = softmax(scale q k^T), causal                (B, H, N, T), some rows at a time
    G[i, j] = max of A over the b x b tile (i, j)   (B, H, m, n), rows divided by their sum: for the gate of prompts
    R[t, j] = max of A[t] over the b keys of j      (B, H, N, n): for the gate of decoding
    O = A V

Exact, in float32; memory holds some 2^22 scores at a time. The authors' kernel keeps running maxima instead, and rounds
to bfloat16.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.hosts.rules import repeat_heads

_SCORES = 1 << 22


@overload
def pooled_truth(
    q: Tensor, k: Tensor, v: None = None, *, block: int = 64, scale: float | None = None
) -> tuple[Tensor, None]: ...
@overload
def pooled_truth(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = 64, scale: float | None = None
) -> tuple[Tensor, Tensor]: ...


@provides("22-seerattention")
@torch.no_grad()
def pooled_truth(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K E"] | None = None,
    *,
    block: int = 64,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H m n"], Float[Tensor, "B H Q E"] | None]:
    """Causal attention pooled over blocks, rows of which sum to 1, and what attention gives; without gradient.

    Args:
        q: (B, H, Q, d) queries as attention gets them (rotated), the last Q of the K tokens.
        k: (B, G, K, d) keys; G divides H.
        v: (B, G, K, E) values; None where the outputs are not wanted.
        block: tokens per block.
        scale: factor on q k^T, default d ** -0.5.

    Returns:
        (B, H, m, n) in float32, m blocks of queries of n blocks of keys, 0 in the future; and (B, H, Q, E) or None.

    Raises:
        ValueError: no token, or more queries than keys.
    """
    # The first block is short where the cache holds its first tokens.
    lead = (k.shape[2] - q.shape[2]) % block
    tiles, outs = _rows(q, k, v, block, scale, lead)
    pooled = torch.cat([_tiles(rows, block) for rows in tiles], 2)
    return pooled / pooled.sum(-1, keepdim=True), None if v is None else torch.cat(outs, 2)


@provides("22-seerattention")
@torch.no_grad()
def row_maxima(
    q: Float[Tensor, "B H Q D"], k: Float[Tensor, "B G K D"], *, block: int = 64, scale: float | None = None
) -> Float[Tensor, "B H Q n"]:
    """The largest weight of every query in every block of keys, in float32; arguments as in `pooled_truth`."""
    return torch.cat(_rows(q, k, None, block, scale)[0], 2)


def _rows(
    q: Tensor, k: Tensor, v: Tensor | None, block: int, scale: float | None, lead: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs of rows, one after the other: their maxima (B, H, some, n) and outputs (B, H, some, E).

    Runs end where blocks end, the first row having `lead` tokens of its block before it, for which there are rows of 0.
    """
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    if not 0 < queries <= keys:
        raise ValueError(f"{queries} queries and {keys} keys: the queries must be the last tokens, at least one")
    factor: float = width**-0.5 if scale is None else scale
    k = repeat_heads(k, heads)
    v = None if v is None else repeat_heads(v, heads)
    offset, blocks = keys - queries, -(-keys // block)
    step = max(1, _SCORES // (batch * heads * keys * block)) * block
    maxima, outs, begin, missing = [], [], 0, lead
    while begin < queries:
        stop = min(queries, begin + step - missing)
        seen = offset + stop
        scores = (q[:, :, begin:stop] @ k[:, :, :seen].mT).float() * factor
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(offset + begin + 1)
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        found = F.pad(weights, (0, -seen % block)).unflatten(-1, (-1, block)).amax(-1)
        maxima.append(F.pad(found, (0, blocks - found.shape[-1], missing, 0)))
        if v is not None:
            outs.append(weights.to(v.dtype) @ v[:, :, :seen])
        begin, missing = stop, 0
    return maxima, outs


def _tiles(maxima: Tensor, block: int) -> Tensor:
    """(B, H, rows, n) to (B, H, blocks, n); the last block may be short."""
    return F.pad(maxima, (0, 0, 0, -maxima.shape[2] % block)).unflatten(2, (-1, block)).amax(3)

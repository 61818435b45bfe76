"""How much attention a token gets from the queries that can see it, from a few probe queries (ZipCache).

    A = softmax(q_probe k^T / sqrt(d))                         (H, R, N), R of the Q queries
    s[j] = sum over probes and the H / G heads of a key-value head of A[., ., j]  /  #{queries that see j}      (G, N)

The plain sum, "accumulated" (H2O, MiKV), favours early tokens, which more queries see. Probes are the last 5 % of the
queries and 5 % drawn at random, so no Q x N matrix is formed. A prompt has Q = N; a step of generation Q = 1. He et al.,
"ZipCache", NeurIPS 2024, arXiv 2405.14256; queries that are fewer than the tokens (a second prompt, a prompt in chunks) and
padding are heed's own reading. A probe counts as one query, but the sum is divided by all that see a key: the estimate
leans towards the last tokens, which all recent probes see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.hosts.rules import AttentionCall, attention_weights

Saliency = Literal["normalised", "accumulated"]
_PROBES_AT_ONCE = 128  # rows of the attention matrix in memory


@provides("34-zipcache")
@dataclass(frozen=True)
class Probes:
    """Which queries are probes.

    Args:
        recent: fraction of the queries, the last ones; the last query always is one.
        random: fraction of the queries, drawn with replacement from the others.
    """

    recent: float = 0.05
    random: float = 0.05

    def __post_init__(self) -> None:
        for name in ("recent", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a fraction between 0 and 1")

    def rows(self, queries: int, draws: Float[Tensor, " D"]) -> Int[Tensor, " R"]:
        """Numbers of the probes among `queries` queries.

        Args:
            queries: how many there are.
            draws: uniform in [0, 1); the first of them choose the random probes.
        """
        if queries == 0:
            return torch.zeros(0, dtype=torch.long)
        first = min(int(queries - self.recent * queries), queries - 1)
        number = int(self.random * queries) if first > 0 else 0
        return torch.cat([torch.arange(first, queries), (draws[:number] * first).long()])


def real_tokens(call: AttentionCall) -> Bool[Tensor, "B K"] | None:
    """Which keys are no padding: those that the last query sees. None for all."""
    allowed = call.allowed()
    if call.mask is None or allowed is None:
        return None
    tokens = allowed[:, 0, -1].expand(call.query.shape[0], call.key.shape[2]).clone()  # no view of the whole mask
    return None if bool(tokens.all()) else tokens


@provides("34-zipcache")
def probe_saliency(
    call: AttentionCall,
    rows: list[Int[Tensor, " _"]],
    tokens: Bool[Tensor, "B K"] | None = None,
    kind: Saliency = "normalised",
) -> Float[Tensor, "B G K"]:
    """Saliency of every key in a call of attention, in float32; infinite for padding.

    Args:
        call: queries (B, H, Q, D), which are the last Q of the K keys (B, G, K, D).
        rows: the probes of every row of the batch, or one list for all: numbers among its queries without padding.
        tokens: (B, K), False for padding; None for none.
        kind: "normalised" by the number of queries that see a key, or "accumulated".

    Returns:
        (B, G, K)
    """
    batch, heads, queries, _ = call.query.shape
    groups, keys = call.key.shape[1:3]
    probes, used = (x.to(call.query.device) for x in _positions(rows, batch, queries, tokens))
    total = torch.zeros(batch, groups, keys, device=call.query.device)
    for some, counts in zip(probes.split(_PROBES_AT_ONCE, 1), used.split(_PROBES_AT_ONCE, 1), strict=True):
        # The heads of a group one after the other, so that its keys need not be repeated for them.
        query = call.query.take_along_dim(some[:, None, :, None], 2).unflatten(1, (groups, -1)).flatten(2, 3)
        mask = _mask_rows(call, some).repeat(1, 1, heads // groups, 1)
        weights = attention_weights(call.replace(query=query, mask=mask, causal=False))
        if tokens is not None:
            weights = weights * counts.repeat(1, heads // groups)[:, None, :, None]
        total += weights.sum(2, dtype=torch.float32)
    if kind == "normalised":
        total /= _seen_by(queries, keys, tokens, total.device)
    return total if tokens is None else total.masked_fill(~tokens[:, None], torch.inf)


def _mask_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """The mask (B, 1, R, K) of some queries (B, R); the causal one is not formed as a whole."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is None:
        last = rows + keys - queries if call.causal else torch.full_like(rows, keys - 1)
        return (torch.arange(keys, device=rows.device) <= last[..., None])[:, None]
    mask = call.mask[:, :1].expand(len(rows), 1, queries, keys)
    return mask.take_along_dim(rows[:, None, :, None], 2)


def _positions(rows: list[Tensor], batch: int, queries: int, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probes (B, R) among all queries, padding included, and which of them are not there to fill up the rows."""
    if len(rows) == 1:
        rows = rows * batch
    size = max(len(some) for some in rows)
    found = torch.zeros(batch, size, dtype=torch.long)
    used = torch.zeros(batch, size, dtype=torch.bool)
    for b, some in enumerate(rows):
        found[b, : len(some)], used[b, : len(some)] = some, True
    if tokens is not None:
        # Queries that are tokens, in order, come first in a stable sort.
        order = (~tokens[:, -queries:]).to(torch.uint8).argsort(dim=-1, stable=True)
        found = order.gather(1, found.to(order.device))
    return found, used


def _seen_by(queries: int, keys: int, tokens: Tensor | None, device: torch.device) -> Tensor:
    """How many of the last `queries` tokens are at or after each key: (1 or B, 1, K)."""
    asks = torch.zeros(1, keys, device=device)
    asks[:, keys - queries :] = 1
    if tokens is not None:
        asks = asks * tokens
    return asks.flip(-1).cumsum(-1).flip(-1).clamp(min=1)[:, None]

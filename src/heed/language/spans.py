"""What a host's mask lets the rows of a batch see, where it is causality and padding and nothing else.

    row b:   query i stands at i + offset and sees the keys t with  first <= t <= i + offset,  t < last

Padding on the left makes `first`, padding on the right or the empty end of a static cache makes `last`. Sparse attention
runs on the part of a row that is left, as if there were no padding, so that a batch gives what its rows give alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heed.hosts.rules import AttentionCall

_ROWS = 1024  # queries whose masks are compared at once


@dataclass(frozen=True)
class Span:
    """Rows of a batch that have the same tokens: queries begin..stop of the call, keys first..last, ends excluded.

    Args:
        rows: numbers of the rows.
    """

    rows: tuple[int, ...]
    begin: int
    stop: int
    first: int
    last: int

    def queries(self, x: Tensor) -> Tensor:
        """The queries of the span in x (B, H, Q, D)."""
        return self._rows(x)[:, :, self.begin : self.stop]

    def keys(self, x: Tensor) -> Tensor:
        """The keys of the span in x (B, G, K, D)."""
        return self._rows(x)[:, :, self.first : self.last]

    def _rows(self, x: Tensor) -> Tensor:
        return x if len(self.rows) == len(x) else x[list(self.rows)]


def causal_spans(call: AttentionCall) -> list[Span]:
    """The spans of a call; rows without any token are in none.

    Raises:
        ValueError: attention is not causal.
        NotImplementedError: the mask is something other than causality and padding (a bias on the scores, a window,
            several documents in one row, other keys for every head).
    """
    batch, queries, keys = len(call.query), call.query.shape[2], call.key.shape[2]
    if call.mask is None:
        if not call.causal and queries > 1:
            raise ValueError("attention is not causal here: every query sees all keys. Only decoders are supported")
        return [Span(tuple(range(batch)), 0, queries, 0, keys)]
    allowed = call.allowed()
    assert allowed is not None  # there is a mask
    if allowed.shape[1] > 1 or (call.mask.is_floating_point() and bool((call.mask[allowed] != 0).any())):
        raise NotImplementedError(
            "the host adds a bias to its scores, or has a mask for every head; only causality and padding are supported"
        )
    allowed = allowed[:, 0].expand(batch, queries, keys)
    rows: dict[tuple[int, ...], list[int]] = {}
    for row in range(batch):
        seen, real = allowed[row].any(0).nonzero(), allowed[row].any(1).nonzero()
        if len(seen) == 0:
            continue
        first, last, begin = int(seen[0]), int(seen[-1]) + 1, int(real[0])
        offset = int(allowed[row, begin].nonzero()[-1]) - begin
        _check_causal(allowed[row], offset, first, last)
        rows.setdefault((begin, min(queries, last - offset), first, last), []).append(row)
    return [Span(tuple(members), *place) for place, members in rows.items()]


def _check_causal(allowed: Tensor, offset: int, first: int, last: int) -> None:
    """NotImplementedError unless the mask (Q, K) is that of the equation."""
    key = torch.arange(allowed.shape[1], device=allowed.device)
    inside = (key >= first) & (key < last)
    for part in torch.arange(len(allowed), device=allowed.device).split(_ROWS):
        wanted = inside & (key <= part[:, None] + offset)
        if not torch.equal(wanted, allowed[part]):
            raise NotImplementedError(
                "the host's mask is more than causality and padding (a sliding window, several documents in one row); "
                "leave such layers out"
            )

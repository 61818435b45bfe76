"""Intervals of keys along one axis: the closed form that most patterns share.

Along an axis the queries stand in `places` 0..X-1 and the keys in places 0..Y-1. A pattern says that the query at place p
sees the keys at places first[p]..last[p] (both included; last < first means none). Over several axes (a row-major grid)
the conditions are ANDed, so the keys of a query form a box. Dilation, groups and random subsets become intervals once
the tokens are put in another order, which is what `query_order` and `key_order` record.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a box pattern.

    Args:
        first: (X,) first key place seen from each query place.
        last: (X,) last key place seen, included.
        keys: Y, the number of key places.
        query_order: (X,) position of the query that stands at each place; None when place equals position.
        key_order: (Y,) the same for keys.
        anchor: (X,) key place that relative offsets are counted from; defaults to the query's own place.
        pieces: lengths of consecutive runs of query places that differ in kind (dilation groups, blocks). A tile of
            queries that stays within a piece sees the fewest keys.
    """

    first: Tensor
    last: Tensor
    keys: int
    query_order: Tensor | None = None
    key_order: Tensor | None = None
    anchor: Tensor | None = None
    pieces: tuple[int, ...] = field(default=())

    @property
    def queries(self) -> int:
        return self.first.numel()

    def anchors(self) -> Tensor:
        return torch.arange(self.queries) if self.anchor is None else self.anchor

    def query_places(self) -> Tensor:
        """(X,) place of the query at each position."""
        return _inverse(self.query_order, self.queries)

    def key_places(self) -> Tensor:
        """(Y,) place of the key at each position."""
        return _inverse(self.key_order, self.keys)

    def same_places(self, other: Axis) -> bool:
        return (
            self.queries == other.queries
            and self.keys == other.keys
            and _same(self.query_order, other.query_order)
            and _same(self.key_order, other.key_order)
        )

    def intersect(self, other: Axis) -> Axis:
        return Axis(
            torch.maximum(self.first, other.first),
            torch.minimum(self.last, other.last),
            self.keys,
            self.query_order,
            self.key_order,
            self.anchor if self.anchor is not None else other.anchor,
            self.pieces if len(self.pieces) >= len(other.pieces) else other.pieces,
        )


def _inverse(order: Tensor | None, size: int) -> Tensor:
    if order is None:
        return torch.arange(size)
    places = torch.empty_like(order)
    places[order] = torch.arange(size)
    return places


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))

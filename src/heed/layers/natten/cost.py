"""What a window costs (card 13): multiply-adds, and the share of scores that tiles compute in vain.

    multiply-adds = B * H * pairs * (d + dv)       pairs = prod over axes of (query, key) pairs; X * w without causality
    wasted        = 1 - pairs / (visited tiles * tile area)

Tiles are boxes: a box of queries visits the boxes of keys that its windows touch, each dilation group by itself. After
the simulator of "Generalized Neighborhood Attention" (arXiv 2504.16922), written anew from its description.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heed.catalogue import provides
from heed.engine.axis import Axis
from heed.engine.checks import per_axis
from heed.engine.patterns import Neighborhood


@provides("13-fna")
def neighborhood_flops(
    windows: Neighborhood,
    *,
    batch: int = 1,
    heads: int = 1,
    head_dim: int,
    head_dim_v: int | None = None,
    additional_tokens: int = 0,
) -> int:
    """Multiply-adds of a forward pass: scores and mixing, exact for any stride, dilation and causal axes.

    Args:
        windows: the layout and its windows, e.g. `heed.patterns.Neighborhood((56, 56), 7)`.
        batch: B.
        heads: query heads H.
        head_dim: d.
        head_dim_v: dv, default d.
        additional_tokens: keys that every query sees besides its window.
    """
    n = math.prod(windows.grid)
    pairs = math.prod(_pairs(axis) for axis in windows.axes(n, n)) + n * additional_tokens
    return batch * heads * pairs * (head_dim + (head_dim if head_dim_v is None else head_dim_v))


@dataclass(frozen=True)
class TileCount:
    """What tiles of given sizes do for one head.

    Args:
        visited: tiles of scores that are computed.
        full: those of them in which every score counts, so that they need no mask.
        total: tiles of dense attention.
        pairs: scores that count.
        scores: scores that are computed.
    """

    visited: int
    full: int
    total: int
    pairs: int
    scores: int

    @property
    def wasted(self) -> float:
        """Share of computed scores that do not count."""
        return 1 - self.pairs / self.scores

    @property
    def masked(self) -> float:
        """Share of visited tiles that need a mask."""
        return 1 - self.full / self.visited


@provides("13-fna")
def count_tiles(windows: Neighborhood, query_tile: int | tuple[int, ...], key_tile: int | tuple[int, ...]) -> TileCount:
    """Simulate attention by tiles: which tiles of scores are visited, and how much of them is needed.

    Args:
        windows: the layout and its windows.
        query_tile: queries per tile and axis; one value for all axes or one each.
        key_tile: the same for keys. Tiles at the end of an axis count whole.

    Raises:
        ValueError: tile sizes that are not integers >= 1, or not one per axis.
    """
    n, rank = math.prod(windows.grid), len(windows.grid)
    query_sizes, key_sizes = per_axis("query_tile", query_tile, rank), per_axis("key_tile", key_tile, rank)
    axes = windows.axes(n, n)
    counts = [_count(*setting) for setting in zip(axes, query_sizes, key_sizes, strict=True)]
    visited, full, total = (math.prod(column) for column in zip(*counts, strict=True))
    scores = visited * math.prod(query_sizes) * math.prod(key_sizes)
    return TileCount(visited, full, total, math.prod(_pairs(axis) for axis in axes), scores)


def _pairs(axis: Axis) -> int:
    return int((axis.last - axis.first + 1).sum())


def _count(axis: Axis, query_tile: int, key_tile: int) -> tuple[int, int, int]:
    """Visited, full and total tiles along one axis; a tile of the grid is visited or full when it is on every axis."""
    q_begin, q_end = _cut(axis, query_tile)
    k_begin, k_end = _cut(axis, key_tile)
    reach = torch.arange(query_tile)
    places = torch.minimum(q_begin[:, None] + reach, q_end[:, None])
    first, last = axis.first[places], axis.last[places]
    visited = (first.amin(1)[:, None] <= k_end) & (k_begin <= last.amax(1)[:, None])
    whole = (q_end - q_begin + 1 == query_tile)[:, None] & (k_end - k_begin + 1 == key_tile)
    full = whole & (first.amax(1)[:, None] <= k_begin) & (k_end <= last.amin(1)[:, None])
    return int(visited.sum()), int(full.sum()), visited.numel()


def _cut(axis: Axis, size: int) -> tuple[Tensor, Tensor]:
    """First and last place of every tile; tiles stay within the axis's pieces, its dilation groups."""
    begins, ends, offset = [], [], 0
    for length in axis.pieces or (axis.queries,):
        begin = torch.arange(offset, offset + length, size)
        begins.append(begin)
        ends.append((begin + size - 1).clamp(max=offset + length - 1))
        offset += length
    return torch.cat(begins), torch.cat(ends)

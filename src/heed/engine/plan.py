"""Plans: how a pattern becomes work.

A plan cuts the queries into tiles and says which blocks of keys every tile visits. Tiles of equal sizes form a group; a
group is executed as batched matrix products over (tile of queries) x (its keys), so nothing of size queries x keys is
ever formed. Pairs of a tile that the pattern does not keep are masked by a small table of masks that tiles share.

Patterns with axes get their plan from `boxes`, all others (compositions, chosen blocks) from `blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tiles:
    """A group of tiles. G is 1 when all heads share the group, else it counts batch elements x heads.

    Args:
        queries: (T, tq) token of every query; the number of queries where a tile is padded.
        keys: (G, T, nb) key block in every slot; a block holds `key_block` consecutive keys.
        key_block: keys per block; 1 means that `keys` names tokens.
        mask: (U, tq, width) additive masks, 0 or -inf, that tiles share; None when every pair is kept.
        mask_of: (G, T, slots) which mask each run of `width` keys of a tile uses; slots * width = nb * key_block.
        offsets: per axis (U, tq, width) relative offset of key and query, for relative biases; None without axes.
        key_grid: per axis (U, tq, n_a) the same offsets, without their repetition along the other axes, where the keys of a
            tile are a grid of n_0 x n_1 x ... in its order; else None.
        rows: the first query when the group's queries are consecutive and unpadded, else None.
        band: (start, step) when tile t visits the consecutive keys from start + t * step on, else None: such keys are
            read in place, as a strided view.
    """

    queries: Tensor
    keys: Tensor
    key_block: int
    mask: Tensor | None
    mask_of: Tensor
    offsets: tuple[Tensor, ...] | None = None
    key_grid: tuple[Tensor, ...] | None = None
    rows: int | None = None
    band: tuple[int, int] | None = None

    @property
    def tiles(self) -> int:
        return self.queries.shape[0]

    @property
    def tile(self) -> int:
        return self.queries.shape[1]

    @property
    def width(self) -> int:
        """Keys per tile."""
        return self.keys.shape[2] * self.key_block

    def to(self, device: torch.device) -> Tiles:
        return Tiles(
            self.queries.to(device),
            self.keys.to(device),
            self.key_block,
            None if self.mask is None else self.mask.to(device),
            self.mask_of.to(device),
            None if self.offsets is None else tuple(offset.to(device) for offset in self.offsets),
            None if self.key_grid is None else tuple(offset.to(device) for offset in self.key_grid),
            self.rows,
            self.band,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """The groups of tiles that together cover all n queries once; `empty` when some query may see no key."""

    n: int
    m: int
    groups: tuple[Tiles, ...]
    empty: bool

    @property
    def work(self) -> float:
        """Scores computed over n * m; above the pattern's density by what the tiles waste."""
        return sum(g.tiles * g.tile * g.width for g in self.groups) / (self.n * self.m)

"""Plans of patterns with axes: tiles of queries are boxes of the grid, and each visits one box of keys.

Along every axis the places are cut into runs; the keys of a run are the hull of its queries' intervals, widened to one
common size and moved inside the axis, so that all tiles are alike. What the hull adds is masked. Along an axis most
runs see their keys at the same relative places, so the masks reduce to a few classes per axis, and the mask of a tile is
the outer product of its axes' masks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heed.engine.axis import Axis
from heed.engine.plan import Plan, Tiles

# Costs of a tile beyond its scores, in rows of queries and in keys: what makes tiny tiles slow. Fitted on CPUs.
_ROW_COST, _KEY_COST = 24, 16
_LARGEST_TILE = 256
_BUCKETS = 8


@dataclass(frozen=True, eq=False)
class _Runs:
    """An axis cut into runs of `size` query places that each see `width` keys from `start` on."""

    axis: Axis
    places: Tensor  # (R, size) query place; the run's last place where it is padded
    valid: Tensor  # (R, size) bool
    start: Tensor  # (R,)
    width: int

    @property
    def count(self) -> int:
        return self.places.shape[0]

    @property
    def size(self) -> int:
        return self.places.shape[1]


def box_plan(axes: tuple[Axis, ...], n: int, m: int) -> Plan:
    """The plan of a box pattern over n queries and m keys."""
    runs = _cheapest(axes)
    empty = any(bool((axis.last < axis.first).any()) for axis in axes)
    if len(axes) == 1:
        return Plan(n, m, tuple(g for part in _buckets(runs[0]) for g in _sequence_groups(part, n)), empty)
    return Plan(n, m, _split(_grid_group(runs, n), n), empty)


def _cheapest(axes: tuple[Axis, ...]) -> tuple[_Runs, ...]:
    """The cut of every axis that makes the whole cheapest."""
    options = [_options(axis) for axis in axes]

    def cost(choice: tuple[_Runs, ...]) -> float:
        tile = math.prod(run.size for run in choice)
        width = math.prod(run.width for run in choice)
        return math.prod(run.count for run in choice) * (tile + _ROW_COST) * (width + _KEY_COST)

    fitting = [c for c in itertools.product(*options) if math.prod(run.size for run in c) <= _LARGEST_TILE]
    return min(fitting, key=cost)


def _options(axis: Axis) -> list[_Runs]:
    sizes = [s for s in (1, 2, 4, 8, 16, 32, 64, 128) if s < 2 * axis.queries]
    if axis.queries <= 16:
        sizes.append(axis.queries)
    options = [_cut(axis, size, ()) for size in sorted(set(sizes))]
    if len(axis.pieces) > 1:
        longest = max(axis.pieces)
        within = {s for s in (*sizes, longest, -(-longest // 2)) if s <= min(longest, _LARGEST_TILE)}
        options += [_cut(axis, size, axis.pieces) for size in sorted(within)]
    return options


def _cut(axis: Axis, size: int, pieces: tuple[int, ...]) -> _Runs:
    lengths = torch.tensor(pieces or (axis.queries,))
    ends = torch.cumsum(lengths, 0)
    per_piece = (lengths + size - 1) // size
    piece = torch.repeat_interleave(torch.arange(len(lengths)), per_piece)
    within = torch.arange(len(piece)) - (torch.cumsum(per_piece, 0) - per_piece)[piece]
    begin = (ends - lengths)[piece] + within * size
    place = begin[:, None] + torch.arange(size)
    valid = place < ends[piece][:, None]
    places = torch.minimum(place, ends[piece][:, None] - 1)
    first, last = axis.first[places], axis.last[places]
    some = first <= last
    low = first.masked_fill(~some, axis.keys).amin(1)
    high = last.masked_fill(~some, -1).amax(1)
    width = max(1, int((high - low + 1).max()))
    start = low.clamp(max=axis.keys - width)
    return _Runs(axis, places, valid, start, width)


def _buckets(runs: _Runs) -> list[_Runs]:
    """Runs whose hulls differ much in width (causal patterns, unequal groups) fall into parts of similar width."""
    first, last = runs.axis.first[runs.places], runs.axis.last[runs.places]
    low = first.masked_fill(last < first, runs.axis.keys).amin(1)
    need = (last.amax(1) - low + 1).clamp(min=1)
    if runs.count < 2 * _BUCKETS or need.float().mean() > 0.8 * runs.width:
        return [runs]
    parts = []
    for chosen in need.argsort().chunk(_BUCKETS):
        chosen = chosen.sort().values
        width = int(need[chosen].max())
        start = low[chosen].clamp(max=runs.axis.keys - width)
        parts.append(_Runs(runs.axis, runs.places[chosen], runs.valid[chosen], start, width))
    return parts


def _classes(runs: _Runs) -> tuple[Tensor, Tensor, Tensor]:
    """Runs that see their keys at the same relative places.

    Returns:
        kept (U, size, width) bool, offsets (U, size, width), and the class (R,) of every run.
    """
    start = runs.start[:, None]
    first = (runs.axis.first[runs.places] - start).clamp(0, runs.width)
    last = (runs.axis.last[runs.places] - start).clamp(-1, runs.width - 1)
    anchor = runs.axis.anchors()[runs.places] - start
    alike, of_run = torch.unique(torch.stack([first, last, anchor], 1), dim=0, return_inverse=True)
    first, last, anchor = alike.unbind(1)
    key = torch.arange(runs.width)
    kept = (first[..., None] <= key) & (key <= last[..., None])
    return kept, key - anchor[..., None], of_run


def _sequence_groups(runs: _Runs, n: int) -> list[Tiles]:
    """Groups for one axis: the runs whose keys advance evenly become a band, the others are gathered."""
    kept, offsets, of_run = _classes(runs)
    mask = _additive(kept)
    queries = _tokens(runs.axis.query_order, runs.places).masked_fill(~runs.valid, n)
    groups = []
    for chosen, band in _bands(runs):
        own = queries[chosen]
        places = runs.start[chosen][:, None] + torch.arange(runs.width)
        groups.append(
            Tiles(
                queries=own,
                keys=_tokens(runs.axis.key_order, places)[None],
                key_block=1,
                mask=mask,
                mask_of=of_run[chosen][None, :, None],
                offsets=(offsets,),
                rows=_consecutive(own, n),
                band=band if runs.axis.key_order is None else None,
            )
        )
    return groups


def _bands(runs: _Runs) -> list[tuple[Tensor, tuple[int, int] | None]]:
    """The longest stretch of runs whose key starts form an arithmetic progression, and the rest."""
    start, count = runs.start, runs.count
    if count < 4:
        return [(torch.arange(count), None)]
    steps = start.diff()
    values, lengths = torch.unique_consecutive(steps, return_counts=True)
    longest = int(lengths.argmax())
    begin = int(lengths[:longest].sum())
    end = begin + int(lengths[longest]) + 1
    if int(values[longest]) < 0 or 2 * (end - begin) < count:
        return [(torch.arange(count), None)]
    rest = torch.cat([torch.arange(begin), torch.arange(end, count)])
    groups: list[tuple[Tensor, tuple[int, int] | None]] = [
        (torch.arange(begin, end), (int(start[begin]), int(values[longest])))
    ]
    return groups + ([(rest, None)] if len(rest) else [])


def _grid_group(runs: tuple[_Runs, ...], n: int) -> Tiles:
    """The one group for several axes: everything is a product of the axes."""
    classes = [_classes(run) for run in runs]
    kept = _product([c[0] for c in classes], torch.logical_and)
    counts = [c[0].shape[0] for c in classes]
    of_tile = torch.zeros((), dtype=torch.long)
    query = key = torch.zeros((), dtype=torch.long)
    valid = torch.ones((), dtype=torch.bool)
    rank = len(runs)
    for a, (run, (_, _, of_run)) in enumerate(zip(runs, classes, strict=True)):
        of_tile = of_tile * counts[a] + of_run.view([-1 if i == a else 1 for i in range(rank)])
        tokens = _tokens(run.axis.query_order, run.places)
        query = query * run.axis.queries + _spread(tokens, a, rank)
        valid = valid & _spread(run.valid, a, rank)
        places = run.start[:, None] + torch.arange(run.width)
        key = key * run.axis.keys + _spread(_tokens(run.axis.key_order, places), a, rank)
    tiles = math.prod(run.count for run in runs)
    offsets, key_grid = [], []
    for a in range(rank):
        for found, width in ((offsets, None), (key_grid, 1)):
            blank = [torch.zeros_like(c[1][..., :width]) for c in classes]
            blank[a] = classes[a][1]
            found.append(_product(blank, torch.add))
    queries = query.masked_fill(~valid, n).reshape(tiles, -1)
    return Tiles(
        queries=queries,
        keys=key.reshape(1, tiles, -1),
        key_block=1,
        mask=_additive(kept),
        mask_of=of_tile.reshape(1, tiles, 1),
        offsets=tuple(offsets),
        key_grid=tuple(key_grid),
        rows=_consecutive(queries, n),
    )


def _split(group: Tiles, n: int) -> tuple[Tiles, ...]:
    """Tiles that share the commonest mask, and the others: one mask for a whole group costs nothing to apply."""
    of_tile = group.mask_of[0, :, 0]
    counts = torch.bincount(of_tile)
    common = of_tile == counts.argmax()
    if group.mask is None or common.all() or 4 * int(counts.max()) < group.tiles:
        return (group,)
    parts = []
    for chosen in (common, ~common):
        queries = group.queries[chosen]
        parts.append(
            replace(
                group,
                queries=queries,
                keys=group.keys[:, chosen],
                mask_of=group.mask_of[:, chosen],
                rows=_consecutive(queries, n),
            )
        )
    return tuple(parts)


def _product(parts: list[Tensor], join) -> Tensor:
    """Outer combination of per-axis tables (U_a, size_a, width_a) into (prod U, prod size, prod width)."""
    rank = len(parts)
    total = None
    for a, part in enumerate(parts):
        shape = [1] * (3 * rank)
        shape[a], shape[rank + a], shape[2 * rank + a] = part.shape
        total = part.view(shape) if total is None else join(total, part.view(shape))
    assert total is not None  # a grid has at least one axis
    sizes = [math.prod(part.shape[i] for part in parts) for i in range(3)]
    return total.reshape(sizes)


def _spread(values: Tensor, a: int, rank: int) -> Tensor:
    """(R, size) of axis a as a tensor with 2 * rank axes: all run axes, then all size axes."""
    shape = [1] * (2 * rank)
    shape[a], shape[rank + a] = values.shape
    return values.view(shape)


def _tokens(order: Tensor | None, places: Tensor) -> Tensor:
    return places if order is None else order[places]


def _consecutive(queries: Tensor, n: int) -> int | None:
    flat = queries.flatten()
    begin = int(flat[0])
    steady = int(flat[-1]) < n and torch.equal(flat, torch.arange(begin, begin + len(flat)))
    return begin if steady else None


def _additive(kept: Tensor) -> Tensor | None:
    """0 where kept, -inf elsewhere; None when everything is kept."""
    if kept.all():
        return None
    return torch.zeros(kept.shape).masked_fill_(~kept, -torch.inf)

"""Plans of patterns without axes: compositions, chosen blocks, anything that has only its index arithmetic.

Queries and keys are cut into blocks. For every pair of blocks the pattern answers with two bounds: `some`, whether a pair
of tokens may be kept there, and `every`, whether all of them surely are. The bounds compose like intervals:

    A & B: some_A & some_B, every_A & every_B      A | B: some_A | some_B, every_A | every_B
    ~A:    ~every_A, ~some_A

A tile visits the key blocks with `some`; those without `every` get a mask from the pattern's own arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heed.engine.pattern import And, Not, Or, Pattern
from heed.engine.patterns import Grouped, Selected
from heed.engine.plan import Plan, Tiles

_BUCKETS = 6
_DENSE_CHUNK = 1 << 24  # pairs of tokens evaluated at once

Bounds = tuple[Tensor, Tensor]


def block_plan(pattern: Pattern, n: int, m: int, device: torch.device, batch: int = 1, heads: int = 1) -> Plan:
    """The plan of any pattern; for one chosen by content, with tiles of its own for every batch element and head."""
    tile, key_block = pattern.grain
    some, every = block_bounds(pattern, n, m, tile, key_block, device, batch, heads)
    if m % key_block:  # the keys beyond the last one must be masked
        every = every.clone()
        every[..., -1] = False
    some, every = some.flatten(0, 1), every.flatten(0, 1)
    rows = torch.arange(some.shape[1] * tile, device=device)
    queries = rows.masked_fill(rows >= n, n).view(-1, tile)
    counts = some.sum(-1).amax(0)
    groups = [
        _group(pattern, n, m, some, every, queries, chosen, key_block, heads)
        for chosen in _by_count(counts, static=some.shape[0] == 1)
    ]
    return Plan(n, m, tuple(groups), empty=True)


def _by_count(counts: Tensor, *, static: bool) -> list[Tensor]:
    """Tiles that visit similar numbers of blocks, so that padding slots stay few."""
    tiles = torch.arange(len(counts), device=counts.device)
    if not static or len(counts) < 2 * _BUCKETS or counts.float().mean() > 0.8 * counts.max():
        return [tiles]
    return [chosen.sort().values for chosen in counts.argsort().chunk(_BUCKETS)]


def _group(
    pattern: Pattern,
    n: int,
    m: int,
    some: Tensor,
    every: Tensor,
    queries: Tensor,
    chosen: Tensor,
    key_block: int,
    heads: int,
) -> Tiles:
    some, every, queries = some[:, chosen], every[:, chosen], queries[chosen]
    counts = some.sum(-1)
    slots = max(1, int(counts.max()))
    if (counts == slots).all():
        keys = some.nonzero()[:, 2].view(*some.shape[:2], slots)
    else:
        keys = some.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :slots]
    visited, full = some.gather(-1, keys), every.gather(-1, keys)
    masks, mask_of = _masks(pattern, n, m, keys, visited, full, queries, key_block, heads)
    begin = int(queries[0, 0])
    rows = begin if int(queries[-1, -1]) == begin + queries.numel() - 1 < n else None
    return Tiles(queries, keys.masked_fill(~visited, 0), key_block, masks, mask_of, rows=rows)


def _masks(
    pattern: Pattern,
    n: int,
    m: int,
    keys: Tensor,
    visited: Tensor,
    full: Tensor,
    queries: Tensor,
    key_block: int,
    heads: int,
) -> tuple[Tensor | None, Tensor]:
    """The distinct masks (U, tile, key_block) and which of them each slot uses: 0 keeps all, 1 nothing."""
    mask_of = torch.where(visited, 0, 1)
    partial = visited & ~full
    if not partial.any() and visited.all():
        return None, mask_of
    g, t, slot = partial.nonzero(as_tuple=True)
    tile = queries.shape[1]
    distinct = [torch.ones(1, tile, key_block, dtype=torch.bool, device=keys.device)]
    distinct.append(torch.zeros_like(distinct[0]))
    if len(g):
        rule = pattern.rule(n, m, keys.device)
        kept = []
        for part in torch.arange(len(g), device=keys.device).split(max(1, _DENSE_CHUNK // (tile * key_block))):
            gp, tp, sp = g[part], t[part], slot[part]
            q = queries[tp][:, :, None].clamp(max=n - 1)
            k = (keys[gp, tp, sp][:, None] * key_block + torch.arange(key_block, device=keys.device))[:, None, :]
            b, h = (gp // heads)[:, None, None], (gp % heads)[:, None, None]
            kept.append((rule(b, h, q, k.clamp(max=m - 1)) & (k < m)).expand(len(part), tile, key_block))
        kinds, of_slot = torch.unique(torch.cat(kept).flatten(1), dim=0, return_inverse=True)
        distinct.append(kinds.view(-1, tile, key_block))
        mask_of[g, t, slot] = of_slot + 2
    masks = torch.cat(distinct)
    return torch.zeros(masks.shape, device=keys.device).masked_fill_(~masks, -torch.inf), mask_of


def block_bounds(
    pattern: Pattern, n: int, m: int, tile: int, key_block: int, device: torch.device, batch: int = 1, heads: int = 1
) -> Bounds:
    """`some` and `every`, each (batch or 1, heads or 1, query blocks, key blocks) bool."""
    args = (n, m, tile, key_block, device, batch, heads)
    match pattern:
        case And() | Or():
            some_a, every_a = block_bounds(pattern.left, *args)
            some_b, every_b = block_bounds(pattern.right, *args)
            if isinstance(pattern, And):
                return some_a & some_b, every_a & every_b
            return some_a | some_b, every_a | every_b
        case Not():
            some, every = block_bounds(pattern.pattern, *args)
            return ~every, ~some
        case Selected() if pattern.block[0] % tile == 0 and pattern.block[1] % key_block == 0:
            visited = pattern.block_map(m).to(device)
            visited = visited.repeat_interleave(pattern.block[0] // tile, 2)[:, :, : -(-n // tile)]
            visited = visited.repeat_interleave(pattern.block[1] // key_block, 3)[..., : -(-m // key_block)]
            visited = visited.expand(batch, heads, -1, -1)
            return visited, visited
        case Grouped():
            return _label_bounds(pattern, tile, key_block, device, batch, heads)
    return _interval_bounds(pattern, n, m, tile, key_block, device) or _dense_bounds(pattern, *args)


def _label_bounds(pattern: Grouped, tile: int, key_block: int, device: torch.device, batch: int, heads: int) -> Bounds:
    def extremes(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        labels = labels.to(device).view(1, 1, -1) if labels.ndim == 1 else labels.to(device)
        if not pattern.static:
            labels = labels.expand(batch, heads, -1)
        padded = F.pad(labels.double(), (0, -labels.shape[-1] % size), mode="replicate")
        blocks = padded.unflatten(-1, (-1, size))
        return blocks.amin(-1), blocks.amax(-1)

    (q_low, q_high), (k_low, k_high) = extremes(pattern.labels, tile), extremes(pattern.keys, key_block)
    some = (q_low[..., None] <= k_high[..., None, :]) & (k_low[..., None, :] <= q_high[..., None])
    every = (q_low == q_high)[..., None] & (k_low == k_high)[..., None, :] & some
    return some, every


def _interval_bounds(
    pattern: Pattern, n: int, m: int, tile: int, key_block: int, device: torch.device
) -> Bounds | None:
    """Bounds in closed form from the leading axis, when its tokens stand in their natural order."""
    axes = pattern.axes(n, m)
    if axes is None or axes[0].query_order is not None or axes[0].key_order is not None:
        return None
    axis = axes[0]
    per_query, per_key = n // axis.queries, m // axis.keys  # tokens per place of the leading axis

    def spans(tokens: int, size: int, per_place: int) -> tuple[Tensor, Tensor]:
        begin = torch.arange(0, tokens, size)
        return begin // per_place, (begin + size - 1).clamp(max=tokens - 1) // per_place

    first, last = axis.first, axis.last
    begin, end = spans(n, tile, per_query)
    reach = int((end - begin).max()) + 1
    places = torch.minimum(begin[:, None] + torch.arange(reach), end[:, None])
    seen = first[places] <= last[places]
    low = first[places].masked_fill(~seen, m).amin(1)[:, None]
    high = last[places].masked_fill(~seen, -1).amax(1)[:, None]
    k_begin, k_end = spans(m, key_block, per_key)
    some = (low <= k_end) & (k_begin <= high)
    if len(axes) == 1:
        every = (first[places].amax(1)[:, None] <= k_begin) & (k_end <= last[places].amin(1)[:, None])
    else:
        every = torch.zeros_like(some)
    return some[None, None].to(device), every[None, None].to(device)


def _dense_bounds(
    pattern: Pattern, n: int, m: int, tile: int, key_block: int, device: torch.device, batch: int, heads: int
) -> Bounds:
    """Exact bounds by evaluating the pattern everywhere, some rows of blocks at a time."""
    k = torch.arange(m, device=device)
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[None, :, None, None]
    if pattern.static:
        b = h = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    rule = pattern.rule(n, m, device)
    step = max(1, _DENSE_CHUNK // (m * tile * b.numel() * h.numel())) * tile
    some, every = [], []
    for begin in range(0, n, step):
        q = torch.arange(begin, min(begin + step, n), device=device)
        kept = rule(b, h, q[:, None], k).expand(b.shape[0], h.shape[1], len(q), m)
        grow = (0, -m % key_block, 0, -len(q) % tile)
        for value, bound, reduce in ((False, some, torch.any), (True, every, torch.all)):
            cells = F.pad(kept, grow, value=value).unflatten(3, (-1, key_block)).unflatten(2, (-1, tile))
            bound.append(reduce(reduce(cells, 5), 3))
    return torch.cat(some, 2), torch.cat(every, 2)

"""The arithmetic of the tiled backend: attention of query tiles to their keys as one operator, forward and backward.

For every tile, with the table holding mask and bias:

    S = scale * Q K^T + table        P = softmax(S)        O = P V
    dV = P^T dO      dP = dO V^T     dS = P * (dP - sum(dP * P) + dL)      dQ = scale * dS K      dK = scale * dS^T Q

where dL is the gradient of the logsumexp. Tiles are worked off in chunks that fit the cache, and the backward pass
computes the scores again instead of keeping them, so memory stays linear in the tokens. All of it is batched products of
plain tensors, so the same code serves any device; forward, PyTorch's fused attention takes a chunk at once where nothing
but the output is wanted. Keys of a band are read in place through a strided view; others are gathered.

It is a custom operator so that torch.compile takes it as one node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from heed.engine.plan import Plan, Tiles

# Scores per chunk. On a CPU 2 MB of float32 stay in a core's cache, and fused attention, which never holds the scores,
# is bound only by the gathered keys; a GPU wants larger batches.
_CHUNK = {"cpu": 1 << 19}
_FUSED_CHUNK = {"cpu": 1 << 21}
_LARGE_CHUNK = 1 << 25
# Rows up to this width are added by scatter_add (vectorised over rows), wider ones by index_add (over columns).
_NARROW = 1024


def tiled_attention(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    table_of: list[Tensor],
    key_bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    """Run a plan.

    Args:
        plan: the plan; key tokens are padded to a multiple of every group's key block.
        q: (B * H, N, D) queries, contiguous.
        k, v: (B * Hkv, M', D) and (B * Hkv, M', Dv), contiguous, M' >= M.
        tables: per group (X, U, tq, width), X divides B * H: what is added to the scores; empty where nothing is.
        table_of: per group (G, T, slots) which table each run of keys uses.
        key_bias: (B, M') added to the scores of each key, or None.
        scale: factor on q k^T.
        dropout: probability of dropping a weight, drawn from `seed`.
        lse: whether the logsumexp is wanted.

    Returns:
        out (B * H, N, Dv) in v's dtype and lse (B * H, N) float32 (empty when not wanted).
    """
    index = [t for group, of in zip(plan.groups, table_of, strict=True) for t in (group.queries, group.keys, of)]
    layout = [
        value
        for group in plan.groups
        for value in (group.key_block, -1 if group.rows is None else group.rows, *(group.band or (-1, -1)))
    ]
    return _attention(q, k, v, tables, index, layout, key_bias, scale, dropout, seed, lse, plan.empty)


@torch.library.custom_op("heed::tiled_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    index: list[Tensor],
    layout: list[int],
    key_bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    lse: bool,
    empty: bool,
) -> tuple[Tensor, Tensor]:
    work = _Work(q, k, v, tables, key_bias, scale, dropout, seed, empty)
    n = q.shape[1]
    rows = _written_rows(index, n)
    out = v.new_empty(q.shape[0], rows, v.shape[2])
    sums = torch.empty(q.shape[0], rows if lse else 0, dtype=work.precision, device=q.device)
    fused = work.fused and not lse
    for chunk in _chunks(index, layout, tables, q, fused):
        if fused:
            chunk.put(out, work.mixed(chunk))
            continue
        scores = work.scores(chunk, work.queries(chunk), work.keys(chunk, k))
        weights = work.dropped(chunk, work.weights(scores))
        chunk.put(out, torch.bmm(weights, work.keys(chunk, v)))
        if lse:
            chunk.put(sums, torch.logsumexp(scores, -1, keepdim=True))
    return out[:, :n].contiguous(), sums[:, :n].float().contiguous() if lse else sums.float()


def _written_rows(index: list[Tensor], n: int) -> int:
    """Rows of an output: one more than there are queries where tiles are padded, to take what padding writes."""
    return n + max(int((queries == n).any()) for queries in index[::3])


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    index: list[Tensor],
    layout: list[int],
    key_bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    lse: bool,
    empty: bool,
) -> tuple[Tensor, Tensor]:
    n = q.shape[1]
    return v.new_empty(q.shape[0], n, v.shape[2]), q.new_empty(q.shape[0], n if lse else 0, dtype=torch.float32)


@torch.library.custom_op("heed::tiled_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    index: list[Tensor],
    layout: list[int],
    key_bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    empty: bool,
    tables_too: bool,
) -> list[Tensor]:
    work = _Work(q, k, v, tables, key_bias, scale, dropout, seed, empty)
    acc = {"dtype": work.precision, "device": q.device}
    n = q.shape[1]
    dq = torch.empty(q.shape[0], _written_rows(index, n), q.shape[2], **acc)
    dk, dv = torch.zeros(k.shape, **acc), torch.zeros(v.shape, **acc)
    dtables = [torch.zeros(table.shape if tables_too else (0,), **acc) for table in tables]
    for chunk in _chunks(index, layout, tables, q, fused=False):
        queries, keys, values = work.queries(chunk), work.keys(chunk, k), work.keys(chunk, v)
        weights = work.weights(work.scores(chunk, queries, keys))
        dout = chunk.take(grad).to(work.precision)
        if chunk.padded:  # padding repeats a query; it must not count twice
            dout = dout * chunk.real
        chunk.add_keys(dv, work.group_size, torch.bmm(work.dropped(chunk, weights).mT, dout))
        dweights = work.dropped(chunk, torch.bmm(dout, values.mT))
        dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
        if grad_lse is not None:
            dlse = chunk.take(grad_lse[..., None]).to(work.precision)
            dscores.addcmul_(weights, dlse * chunk.real if chunk.padded else dlse)
        if tables_too and tables[chunk.group].numel():
            chunk.add_table(dtables[chunk.group], dscores)
        chunk.put(dq, torch.bmm(dscores, keys))
        chunk.add_keys(dk, work.group_size, torch.bmm(dscores.mT, queries))
    return [dq[:, :n].mul(scale).to(q.dtype), dk.mul_(scale).to(k.dtype), dv.to(v.dtype), *dtables]


@_attention_backward.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    index: list[Tensor],
    layout: list[int],
    key_bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    empty: bool,
    tables_too: bool,
) -> list[Tensor]:
    precision = torch.promote_types(q.dtype, torch.float32)
    dtables = [q.new_empty(table.shape if tables_too else (0,), dtype=precision) for table in tables]
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *dtables]


def _save(ctx, inputs, output) -> None:
    q, k, v, tables, index, layout, key_bias, scale, dropout, seed, lse, empty = inputs
    ctx.save_for_backward(q, k, v, *tables, *index, *([] if key_bias is None else [key_bias]))
    ctx.counts = (len(tables), len(index))
    ctx.rest = (layout, scale, dropout, seed, empty)
    ctx.lse = lse
    ctx.tables_too = any(table.requires_grad for table in tables)


def _backward(ctx, grad: Tensor, grad_lse: Tensor | None):
    q, k, v, *rest = ctx.saved_tensors
    n_tables, n_index = ctx.counts
    tables, index, key_bias = rest[:n_tables], rest[n_tables : n_tables + n_index], rest[n_tables + n_index :]
    layout, scale, dropout, seed, empty = ctx.rest
    dq, dk, dv, *dtables = _attention_backward(
        grad.contiguous(),
        grad_lse if ctx.lse else None,
        q,
        k,
        v,
        tables,
        index,
        layout,
        key_bias[0] if key_bias else None,
        scale,
        dropout,
        seed,
        empty,
        ctx.tables_too,
    )
    tables_grad = dtables if ctx.tables_too else [None] * n_tables
    return dq, dk, dv, tables_grad, [None] * n_index, None, None, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True, eq=False)
class _Work:
    """The tensors of a call and what is computed from them chunk by chunk."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: list[Tensor]
    key_bias: Tensor | None
    scale: float
    dropout: float
    seed: int
    empty: bool

    @property
    def precision(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def group_size(self) -> int:
        """Query heads per key head."""
        return self.q.shape[0] // self.k.shape[0]

    @property
    def fused(self) -> bool:
        """Whether PyTorch's fused attention can do the forward pass; queries without keys it treats well on CPUs only."""
        return self.dropout == 0 and self.key_bias is None and (self.q.device.type == "cpu" or not self.empty)

    def mixed(self, chunk: _Chunk) -> Tensor:
        """(c, tq, Dv) the output of the chunk, fused."""
        table = chunk.take_table(self.tables[chunk.group])
        return F.scaled_dot_product_attention(
            chunk.take(self.q)[None],
            chunk.take_keys(self.k, self.group_size)[None],
            chunk.take_keys(self.v, self.group_size)[None],
            attn_mask=None if table is None else table[None].to(self.q.dtype),
            scale=self.scale,
        )[0]

    def queries(self, chunk: _Chunk) -> Tensor:
        return chunk.take(self.q).to(self.precision)

    def keys(self, chunk: _Chunk, x: Tensor) -> Tensor:
        return chunk.take_keys(x, self.group_size).to(self.precision)

    def scores(self, chunk: _Chunk, queries: Tensor, keys: Tensor) -> Tensor:
        """(c, tq, width) scaled scores with table and key bias; -inf where a pair is masked."""
        table = chunk.take_table(self.tables[chunk.group])
        if table is None:
            scores = torch.bmm(queries * self.scale, keys.mT)
        else:
            scores = torch.baddbmm(table.to(self.precision), queries, keys.mT, alpha=self.scale)
        if self.key_bias is not None:
            scores += chunk.take_key_bias(self.key_bias, self.q.shape[0] // self.key_bias.shape[0])[:, None, :]
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        if self.empty:  # softmax over nothing but -inf is NaN; such a query gives 0
            weights.masked_fill_(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
        return weights

    def dropped(self, chunk: _Chunk, weights: Tensor) -> Tensor:
        """Dropout whose draw depends on the seed and the chunk alone, so that the backward pass repeats it."""
        if self.dropout == 0:
            return weights
        generator = torch.Generator(weights.device).manual_seed(self.seed + chunk.number)
        kept = torch.rand(weights.shape, device=weights.device, generator=generator) >= self.dropout
        return weights * kept / (1 - self.dropout)


def _chunks(index: list[Tensor], layout: list[int], tables: list[Tensor], q: Tensor, fused: bool) -> Iterator[_Chunk]:
    """All tiles of all groups: a stretch of tiles of one head, or all tiles of a few heads when they are few."""
    heads = q.shape[0]
    budget = (_FUSED_CHUNK if fused else _CHUNK).get(q.device.type, _LARGE_CHUNK)
    number = 0
    for group in range(len(tables)):
        queries, keys, table_of = index[3 * group : 3 * group + 3]
        key_block, rows, start, step = layout[4 * group : 4 * group + 4]
        tiles = Tiles(
            queries,
            keys,
            key_block,
            None,
            table_of,
            rows=None if rows < 0 else rows,
            band=None if step < 0 else (start, step),
        )
        size = max(1, budget // (tiles.tile * tiles.width))
        per_head = min(size, tiles.tiles)
        together = max(1, size // tiles.tiles)
        padded = tiles.rows is None and bool((queries == q.shape[1]).any())
        one_table = tables[group].numel() > 0 and table_of.shape[2] == 1 and bool((table_of == table_of[0, 0]).all())
        for h in range(0, heads, together):
            for t in range(0, tiles.tiles, per_head):
                last_tile = min(t + per_head, tiles.tiles)
                yield _Chunk(
                    group, number, tiles, h, min(h + together, heads), t, last_tile, padded, one_table, q.shape[1]
                )
                number += 1


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Tiles t0..t1 of heads h0..h1 (heads counted over the batch); c = (h1 - h0) * (t1 - t0) tiles."""

    group: int
    number: int
    tiles: Tiles
    h0: int
    h1: int
    t0: int
    t1: int
    padded: bool
    one_table: bool
    n: int

    @property
    def heads(self) -> Tensor:
        return torch.arange(self.h0, self.h1, device=self.tiles.keys.device)

    @property
    def real(self) -> Tensor:
        """(c, tq, 1) 1 for queries, 0 for padding."""
        real = (self.tiles.queries[self.t0 : self.t1] < self.n).repeat(self.h1 - self.h0, 1)
        return real[..., None]

    def _rows(self, x: Tensor) -> Tensor | None:
        """The chunk's queries in x (B * H, N or N + 1, D) as a view (heads, rows, D), when they are consecutive."""
        if self.tiles.rows is None:
            return None
        begin = self.tiles.rows + self.t0 * self.tiles.tile
        return x[self.h0 : self.h1, begin : begin + (self.t1 - self.t0) * self.tiles.tile]

    def take(self, x: Tensor) -> Tensor:
        """The chunk's queries of x (B * H, N, D) as (c, tq, D)."""
        rows = self._rows(x)
        if rows is None:
            index = self.tiles.queries[self.t0 : self.t1].flatten().clamp(max=self.n - 1)
            rows = x[self.h0 : self.h1].index_select(1, index) if self.h1 - self.h0 > 1 else x[self.h0][index]
        return rows.reshape(-1, self.tiles.tile, x.shape[2])

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write (c, tq, D) values to the chunk's queries of x (B * H, N + 1, D) or (B * H, N + 1)."""
        if x.ndim == 2:
            x = x[..., None]
        values = values.to(x.dtype).view(self.h1 - self.h0, -1, x.shape[2])
        rows = self._rows(x)
        if rows is not None:
            rows.copy_(values)
        else:
            x[self.h0 : self.h1].index_copy_(1, self.tiles.queries[self.t0 : self.t1].flatten(), values)

    def _blocks(self, group_size: int, blocks: int) -> Tensor:
        """(c * nb) index of every visited key block among the `blocks` blocks of all key heads."""
        keys = self.tiles.keys
        heads = self.heads
        own = keys[heads % keys.shape[0], self.t0 : self.t1] if keys.shape[0] > 1 else keys[:, self.t0 : self.t1]
        return (own + (heads // group_size * blocks)[:, None, None]).flatten()

    def take_keys(self, x: Tensor, group_size: int) -> Tensor:
        """The chunk's keys of x (B * Hkv, M', D) as (c, width, D)."""
        band, width = self.tiles.band, self.tiles.width
        if band is not None and self.h1 - self.h0 == 1:
            return self._strided(x, group_size, 0, width)
        size = self.tiles.key_block
        blocks = x.view(-1, size * x.shape[2])
        return blocks.index_select(0, self._blocks(group_size, x.shape[1] // size)).view(-1, width, x.shape[2])

    def _strided(self, x: Tensor, group_size: int, begin: int, width: int) -> Tensor:
        """Keys begin..begin + width of every tile of a band, (t, width, D), in place."""
        assert self.tiles.band is not None  # checked by the callers
        start, step = self.tiles.band
        head, rows, columns = self.h0 // group_size, x.shape[1], x.shape[2]
        offset = (head * rows + start + self.t0 * step + begin) * columns
        return x.as_strided((self.t1 - self.t0, width, columns), (step * columns, columns, 1), offset)

    def add_keys(self, x: Tensor, group_size: int, values: Tensor) -> None:
        """Add (c, width, D) values to the chunk's keys of x; keys that several tiles share get the sum."""
        band, width = self.tiles.band, self.tiles.width
        if band is not None and self.h1 - self.h0 == 1:
            step = band[1]
            if step == 0:
                self._strided(x, group_size, 0, width)[0].add_(values.sum(0))
                return
            for begin in range(0, width, step):  # slices of one step never overlap
                size = min(step, width - begin)
                self._strided(x, group_size, begin, size).add_(values[:, begin : begin + size])
            return
        size = self.tiles.key_block
        rows = x.view(-1, size * x.shape[2])
        index, values = self._blocks(group_size, x.shape[1] // size), values.view(-1, rows.shape[1])
        if rows.shape[1] <= _NARROW:
            rows.scatter_add_(0, index[:, None].expand_as(values), values)
        else:
            rows.index_add_(0, index, values)

    def _tables(self, table: Tensor) -> Tensor:
        """(c * slots) index of every slot's table among all X * U."""
        heads, of = self.heads, self.tiles.mask_of
        own = of[heads % of.shape[0], self.t0 : self.t1] if of.shape[0] > 1 else of[:, self.t0 : self.t1]
        return (own + (heads % table.shape[0] * table.shape[1])[:, None, None]).flatten()

    def take_table(self, table: Tensor) -> Tensor | None:
        """What is added to the chunk's scores (c, tq, width); None when nothing is."""
        if table.numel() == 0:
            return None
        if self.one_table and (table.shape[0] == 1 or self.h1 - self.h0 == 1):
            shared = table[self.h0 % table.shape[0], self.tiles.mask_of[0, 0, 0]]
            return shared.expand((self.h1 - self.h0) * (self.t1 - self.t0), -1, -1)
        chosen = table.flatten(0, 1).index_select(0, self._tables(table))
        slots = self.tiles.mask_of.shape[2]
        if slots == 1:
            return chosen
        return chosen.unflatten(0, (-1, slots)).transpose(1, 2).reshape(-1, self.tiles.tile, self.tiles.width)

    def add_table(self, x: Tensor, values: Tensor) -> None:
        """Add the chunk's (c, tq, width) values to the tables x they came from."""
        slots = self.tiles.mask_of.shape[2]
        if slots > 1:
            values = values.unflatten(2, (slots, -1)).transpose(1, 2).flatten(0, 1)
        x.flatten(0, 1).index_add_(0, self._tables(x), values)

    def take_key_bias(self, bias: Tensor, heads: int) -> Tensor:
        """The chunk's share of a bias (B, M') per key, (c, width); `heads` counts query heads per batch element."""
        size = self.tiles.key_block
        chosen = bias.view(-1, size).index_select(0, self._blocks(heads, bias.shape[1] // size))
        return chosen.view(-1, self.tiles.width)


@register_flop_formula(torch.ops.heed.tiled_attention)
def _flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], tables, index: list[tuple[int, ...]], layout: list[int],
    *args: object, **kwargs: object,
) -> int:  # fmt: skip
    """2 x multiply-adds of the scores that are computed and of mixing the values."""
    pairs = _pairs(index, layout)
    return 2 * q[0] * pairs * (q[2] + v[2])


@register_flop_formula(torch.ops.heed.tiled_attention_backward)
def _backward_flops(
    grad: tuple[int, ...], grad_lse, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], tables,
    index: list[tuple[int, ...]], layout: list[int], *args: object, **kwargs: object,
) -> int:  # fmt: skip
    """Scores again, then dQ and dK (width D each), dP and dV (width Dv each)."""
    pairs = _pairs(index, layout)
    return 2 * q[0] * pairs * (3 * q[2] + 2 * v[2])


def _pairs(index: list[tuple[int, ...]], layout: list[int]) -> int:
    """Scores per head: over the groups, tiles x queries per tile x keys per tile."""
    return sum(
        queries[0] * queries[1] * keys[2] * layout[4 * group]
        for group, (queries, keys) in enumerate(zip(index[::3], index[1::3], strict=True))
    )

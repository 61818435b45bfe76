"""Causal attention over chosen blocks, which skips all others (SeerAttention, card 22).

    O_i = softmax(scale q_i [K_j : M[i, j]]^T, causal) [V_j : M[i, j]]        q_i (b, d) block i of queries, K_j (b, d)

Blocks of queries that visit as many blocks of keys make one batch of rectangles (b, visited * b) for `heed.attend`, the
diagonal block last, so that one causal mask serves them all and nothing is padded. Memory is linear in the tokens,
forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal, Full, Selected

# Keys gathered at once: what stays in the cache of a CPU's cores and still keeps calls few; a GPU wants many.
_KEYS, _MANY = 1 << 14, 1 << 20


@provides("22-seerattention")
def block_sparse_attention(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K E"],
    blocks: Bool[Tensor, "B H m n"],
    block: int = 64,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Causal attention in which a block of queries sees the blocks of keys that were chosen for it.

    Args:
        q: (B, H, Q, d) queries, the last Q of the K tokens.
        k: (B, G, K, d) keys; G divides H.
        v: (B, G, K, E) values.
        blocks: (B, H, m, n) what each block of queries visits; blocks are counted from key 0 on, and m of the n hold the
            queries. Nothing is visited above the diagonal. A row without any block gives 0.
        block: tokens per block.
        scale: factor on q k^T, default d ** -0.5.
        dropout: on the weights.
        backend: None gathers the chosen blocks. Otherwise a backend of `heed.attend` runs the pattern
            `Causal() & Selected(...)`: "flex" makes a BlockMask of it, for GPUs; "reference" is the slow specification.

    Raises:
        ValueError: more queries than keys, or a map of other blocks.
    """
    (batch, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
    if not 0 < queries <= keys:
        raise ValueError(f"{queries} queries and {keys} keys: the queries must be the last tokens, at least one")
    first, lead = divmod(keys - queries, block)
    columns = -(-keys // block)
    rows = columns - first
    if blocks.shape != (batch, heads, rows, columns):
        raise ValueError(
            f"a map {tuple(blocks.shape)} does not fit: {queries} queries of {keys} keys in blocks of {block} make "
            f"(batch, heads, rows, columns) = {(batch, heads, rows, columns)}"
        )
    # On the grid of blocks; what is added is never seen, or never returned.
    q = F.pad(q, (0, 0, lead, -keys % block)) if lead or keys % block else q
    blocks = blocks.tril(first)
    if backend is not None:
        pattern = Causal(first * block) & Selected(_listed(blocks), (block, block))
        k, v = (F.pad(x, (0, 0, 0, -keys % block)) for x in (k, v))
        out = attend(q, k, v, pattern, scale=scale, dropout=dropout, backend=backend)
        return out[:, :, lead : lead + queries]
    k, v = (F.pad(x, (0, 0, 0, -keys % block)) if keys % block else x for x in (k, v))
    tiles = q.reshape(batch * heads * rows, 1, block, -1)
    gather = _Gather(k, v, block)
    begins = torch.arange(batch * heads, device=q.device) // (heads // groups) * columns
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out = v.new_zeros(*tiles.shape[:3], v.shape[3])
    outs, places = [], []
    for run, visited, diagonal in _runs(blocks, first, begins, block):
        pattern = Causal((visited.shape[1] - 1) * block) if diagonal else Full()

        def attention(tiles: Tensor, visited: Tensor = visited, pattern: Causal | Full = pattern) -> Tensor:
            keys, values = gather(visited, reuse=not grad)
            return attend(tiles, keys, values, pattern, scale=scale, dropout=dropout)

        if grad:
            outs.append(checkpoint(attention, tiles[run], use_reentrant=False))
            places.append(run)
        else:
            out[run] = attention(tiles[run])
    if outs:
        out = out.index_copy(0, torch.cat(places), torch.cat(outs))
    return out.view(batch, heads, rows * block, -1)[:, :, lead : lead + queries]


def _runs(blocks: Tensor, first: int, begins: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """(c,) blocks of queries that visit equally many, (c, w) the blocks of keys, and whether the last is the diagonal.

    Blocks of queries are counted over (batch, head, row), those of keys over (batch, key head, column), a head's keys
    beginning at begins[head].
    """
    rows = blocks.shape[2]
    flat = blocks.flatten(0, 2)
    tile, column = flat.nonzero(as_tuple=True)
    column = column + begins[tile // rows]
    counts = flat.sum(-1)
    start = counts.cumsum(0) - counts
    own = blocks.diagonal(first, 2, 3).flatten()
    order = (2 * counts + own).argsort(stable=True)
    kinds, sizes = (2 * counts + own).unique(return_counts=True)  # ascending, as the order is
    most = (_KEYS if blocks.device.type == "cpu" else _MANY) // block
    for kind, run in zip(kinds.tolist(), order.split(sizes.tolist()), strict=True):
        count, diagonal = divmod(kind, 2)
        if count:
            for some in run.split(max(1, most // count)):
                slots = start[some][:, None] + torch.arange(count, device=blocks.device)
                yield some, column[slots], bool(diagonal)


def _listed(blocks: Tensor) -> Tensor:
    """(B, H, m, slots) the chosen blocks of every row, -1 where there are fewer."""
    slots = max(1, int(blocks.sum(-1).max()))
    found = blocks.to(torch.uint8).topk(slots, -1)
    return found.indices.masked_fill(found.values == 0, -1)


class _Gather:
    """Blocks of keys and values side by side: where no gradient is wanted always in the same memory, which is faster."""

    def __init__(self, k: Tensor, v: Tensor, block: int) -> None:
        self.widths = (k.shape[3], v.shape[3])
        self.tables = [x.reshape(-1, block * x.shape[3]) for x in (k, v)]
        self.buffers = [table[:0] for table in self.tables]

    def __call__(self, visited: Tensor, *, reuse: bool) -> list[Tensor]:
        """(c, w) blocks to (c, 1, w * block, D) keys and values."""
        index = visited.flatten()
        if reuse:
            if len(self.buffers[0]) < len(index):
                self.buffers = [table.new_empty(len(index), table.shape[1]) for table in self.tables]
            found = [
                torch.index_select(table, 0, index, out=buffer[: len(index)])
                for table, buffer in zip(self.tables, self.buffers, strict=True)
            ]
        else:
            found = [table.index_select(0, index) for table in self.tables]
        return [x.view(len(visited), 1, -1, width) for x, width in zip(found, self.widths, strict=True)]

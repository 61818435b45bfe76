"""Attention over the keys that the tree search chose, the first keys and the last ones (HiP, card 57).

    A_i = {t <= i:  t < sinks,  or t in a chosen block of i's query block,  or t >= end - window}      end of its block
    o_i = softmax(scale q_i K[A_i]^T) V[A_i]

Every query block sees the same number of keys, its window last. Gathered side by side they make one causal rectangle
(block_q, sinks + mask_k + window) per query block for `heed.attend`; a key that is there twice is masked once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal, Full
from heed.language.hip.search import HiPBudget, Selection, block_ends, block_runs, blocks_at_once, search_blocks

# Keys and values gathered at once on a CPU, as in the search.
_PER_CORE = 1 << 13


@provides("57-hip")
def hip_attention(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K E"],
    budget: HiPBudget | None = None,
    *,
    dense_queries: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Q E"]:
    """Causal attention of which every query sees the first keys, the last ones, and those that the tree search finds.

    Query blocks that would see every key are computed densely, so a prompt of at most mask_k + window tokens gets dense
    attention exactly. Memory is linear in the tokens, forward and backward; no gradient flows through the choice.

    Args:
        q: (B, H, Q, D) queries, the last Q of the K tokens.
        k: (B, G, K, D) keys; G divides H (grouped-query heads).
        v: (B, G, K, E) values.
        budget: default `HiPBudget()`.
        dense_queries: so many queries at the beginning see all keys before them; query blocks are counted after them.
        scale: factor on q k^T, default D ** -0.5.
        dropout: on the weights.

    Raises:
        ValueError: more queries than keys, or shapes that do not fit.
    """
    budget = HiPBudget() if budget is None else budget
    queries, keys = q.shape[2], k.shape[2]
    if queries > keys:
        raise ValueError(f"{queries} queries are more than the {keys} keys; the queries must be the last tokens")
    offset = keys - queries
    whole = budget.sees_all(block_ends(queries, budget.block_q, offset, q.device)).long().cumprod(0).sum()
    dense = min(queries, max(dense_queries, int(whole) * budget.block_q))
    parts = []
    if dense:
        seen = offset + dense
        pattern = Causal(offset) if dense > 1 else Full()
        parts.append(attend(q[:, :, :dense], k[:, :, :seen], v[:, :, :seen], pattern, scale=scale, dropout=dropout))
    if dense < queries:
        rest = q[:, :, dense:]
        selection = choose_blocks(rest, k, budget)
        parts.append(sparse_attention(rest, k, v, selection, scale=scale, dropout=dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def choose_blocks(q: Float[Tensor, "B H Q D"], k: Float[Tensor, "B G K D"], budget: HiPBudget) -> Selection:
    """`search_blocks` for any number of keys: those after the last whole group are not searched."""
    keys = k.shape[2]
    return search_blocks(q, k[:, :, : keys - keys % budget.group], budget, keys - q.shape[2])


@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *,
    scale: float | None = None, dropout: float = 0.0, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *,
    scale: float | None = None, dropout: float = 0.0, return_lse: Literal[True],
) -> tuple[Tensor, ...]: ...  # fmt: skip


@provides("57-hip")
def sparse_attention(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K E"],
    selection: Selection,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over a selection, with its budget's sinks and window.

    A selection may be older than the keys, as between two searches of a decoder: the window then begins where it did
    when the search was made, so that no key is out of reach.

    Args:
        q, k, v, scale, dropout: as in `hip_attention`.
        selection: of these queries.
        return_lse: also return the logsumexp of the scores (B, H, Q).

    Returns:
        (B, H, Q, E), or that and the logsumexp.

    Raises:
        ValueError: a selection of other queries.
    """
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, k.shape
    budget, device = selection.budget, q.device
    ends = block_ends(queries, budget.block_q, keys - queries, device)
    if selection.index.shape[:3] != (batch, heads, len(ends)):
        raise ValueError(
            f"the selection is for (batch, heads, query blocks) = {tuple(selection.index.shape[:3])}, the queries make "
            f"{(batch, heads, len(ends))}"
        )
    late = int((ends - selection.ends).max())
    first = torch.arange(batch * heads, device=device) // (heads // key_heads) * keys
    fetch = _Fetch(k.flatten(0, 1).flatten(0, 1), v.flatten(0, 1).flatten(0, 1))
    size = blocks_at_once(budget.width + late, _PER_CORE, device)
    parts: list[list[Tensor]] = []
    block = 0
    for begin, stop, rows in block_runs(queries, budget.block_q):
        blocks = (stop - begin) // rows
        run = slice(block, block + blocks)
        block += blocks
        chosen = selection.index[:, :, run].flatten(0, 2)
        tiles = q[:, :, begin:stop].unflatten(2, (-1, rows)).flatten(0, 2)[:, None]
        together = _consecutive(budget, ends[run], keys, late)
        grad, joined, outs = fetch.grad(q), v.new_empty(len(tiles), 1, rows, v.shape[3]), []
        for t in torch.arange(len(tiles), device=device).split(size):
            j = t % blocks
            tokens, seen = _tokens(chosen[t], selection.count[run][j], ends[run][j], budget, late)
            tokens = tokens.clamp(0, keys - 1)
            visible = _visible(tokens, seen, ends[run][j], rows, q.dtype, budget)
            index = ((tokens[:, ::together] + first[t // blocks, None]) // together).flatten()
            attention = _rectangle(fetch, index, together, visible, scale, dropout, return_lse)
            some = slice(int(t[0]), int(t[-1]) + 1)
            if grad or return_lse:
                outs.append(checkpoint(attention, tiles[some], use_reentrant=False) if grad else attention(tiles[some]))
            else:
                joined[some] = attention(tiles[some])
        whole = [torch.cat(x) for x in zip(*outs, strict=True)] if return_lse else [torch.cat(outs) if grad else joined]
        parts.append([x.view(batch, heads, stop - begin, *x.shape[3:]) for x in whole])
    results = tuple(x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*parts, strict=True))
    return results if return_lse else results[0]


def _tokens(index: Tensor, count: Tensor, ends: Tensor, budget: HiPBudget, late: int) -> tuple[Tensor, Tensor]:
    """(c, width) the keys of query blocks, and which of them are meant: those that exist, each once."""
    steps = torch.arange(budget.chosen, device=index.device)
    chosen = (index[..., None] + steps).flatten(1)
    meant = torch.arange(budget.slots, device=index.device) < count[:, None]
    meant = meant.repeat_interleave(budget.chosen, 1)
    if budget.window is None:
        return chosen, meant & (chosen < ends[:, None])
    length = budget.window + late
    begin = ends[:, None] - length
    sinks = torch.arange(budget.sinks, device=index.device).expand(len(ends), -1)
    window = begin + torch.arange(length, device=index.device)
    meant &= (chosen >= budget.sinks) & (chosen < begin)
    return torch.cat([sinks, chosen, window], 1), torch.cat([sinks < begin, meant, window >= 0], 1)


def _consecutive(budget: HiPBudget, ends: Tensor, keys: int, late: int) -> int:
    """How many keys are always fetched together, so that copies are longer and fewer: sinks, choices and window allowing."""
    sizes = [budget.chosen, keys]
    if budget.window is not None:
        sizes += [budget.sinks, budget.window + late, *(ends - ends[0]).unique().tolist(), int(ends[0])]
    return math.gcd(*sizes)


def _visible(
    tokens: Tensor, seen: Tensor, ends: Tensor, rows: int, dtype: torch.dtype, budget: HiPBudget
) -> dict[str, Any]:
    """What `attend` is told about the rectangles of query blocks with so many rows."""
    if budget.window is not None:  # all keys but those of the last `rows` positions lie before the block
        mask = None if bool(seen.all()) else seen
        return {"pattern": Causal(tokens.shape[1] - rows), "key_mask": mask}
    positions = ends[:, None] - rows + torch.arange(rows, device=ends.device)
    allowed = seen[:, None] & (tokens[:, None] <= positions[:, :, None])
    bias = torch.zeros(allowed.shape, dtype=dtype, device=ends.device).masked_fill_(~allowed, -math.inf)
    return {"pattern": Full(), "bias": bias[:, None]}


def _rectangle(
    fetch: _Fetch, index: Tensor, together: int, visible: dict[str, Any], scale: float | None, dropout: float, lse: bool
) -> Callable[[Tensor], Any]:
    """Attention of tiles (c, 1, rows, D) to keys, of which `index` (c * width / together) names so many at once."""

    def attention(tiles: Tensor) -> Any:
        k, v = fetch(index, together, len(tiles))
        return attend(tiles, k, v, **visible, scale=scale, dropout=dropout, return_lse=lse)

    return attention


class _Fetch:
    """Gathers keys and values (B * G * K, D): where no gradient is wanted always into the same memory, which is faster."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.tables = (k, v)
        self.buffers = [k[:0], v[:0]]

    def grad(self, q: Tensor) -> bool:
        """Whether a gradient is wanted."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (q, *self.tables))

    def __call__(self, index: Tensor, together: int, tiles: int) -> list[Tensor]:
        """(tiles, 1, width, D) keys and values."""
        tables = [table.view(-1, together * table.shape[1]) for table in self.tables]
        if torch.is_grad_enabled():
            found = [table.index_select(0, index) for table in tables]
        else:
            if len(self.buffers[0]) < len(index) * together:
                self.buffers = [table.new_empty(len(index) * together, table.shape[1]) for table in self.tables]
            found = [
                torch.index_select(table, 0, index, out=buffer[: len(index) * together].view(len(index), -1))
                for table, buffer in zip(tables, self.buffers, strict=True)
            ]
        return [x.view(tiles, 1, -1, table.shape[1]) for x, table in zip(found, self.tables, strict=True)]

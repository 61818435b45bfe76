"""Finds, for every block of queries, the key blocks that matter: a binary tree search over the key axis (HiP, card 57).

    f(s)  = max over rows r and tokens t of block s of  q_r . k_t      r = 1, 3, 5, ... of the query block
    slots (s_i, n_i), i < M = mask_k / block_k: the B blocks before the window, cut into M runs; n_i blocks from s_i on

    repeat ceil(log2(B / M)) times:
        (s, n) -> (s, floor(n / 2)) and (s + floor(n / 2), ceil(n / 2)),  scored by f of their first block
        keep the M best of the 2 M children

After the last round every slot is one block. A child that starts where its parent did has its parent's score, so a round
computes f of M blocks, not of 2 M. All query blocks are searched at once, some at a time: O(T log T) products, O(T) memory.

Lee et al., "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention", ICLR 2025, arXiv 2406.09827. The search is the deterministic one of the authors' draft for CPUs: their first
release samples the keys of a run at random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.catalogue import provides

# Keys gathered at once: those of a few query blocks for every core of a CPU, so that they stay in its cache; a GPU wants
# many.
_PER_CORE, _AT_ONCE = 1 << 14, 1 << 20


@provides("57-hip")
@dataclass(frozen=True)
class HiPBudget:
    """How many keys a query may see, and in which units they are chosen.

    The authors use (mask_k, block_q, block_k, group) = (512, 32, 2, 1) in their first release and (512, 32, 1, 8) in the
    draft of their second; blocks of 64 queries, as in their third, cost a third less than blocks of 32. Sizes need not be
    powers of two, as the authors' kernels want them.

    Args:
        mask_k: key tokens chosen by the search, a multiple of block_k * group.
        block_q: queries that share a choice.
        block_k: keys (or groups of keys) that are chosen together.
        group: consecutive keys that the search sees as one, through their elementwise minimum and maximum.
        window: the last keys, which are always seen, >= block_q; counted from the end of a query block, so that its
            first query sees window - block_q + 1. None: neither window nor sinks.
        sinks: the first keys, which are always seen; any number.
        scale_window: whether the search reaches up to the window. False, as the authors have it: it ends window * group
            keys before the end, so that with group > 1 some keys are for a while in neither.
    """

    mask_k: int = 512
    block_q: int = 64
    block_k: int = 2
    group: int = 1
    window: int | None = 128
    sinks: int = 32
    scale_window: bool = False

    def __post_init__(self) -> None:
        for name in ("mask_k", "block_q", "block_k", "group"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        if self.mask_k % self.chosen:
            raise ValueError(
                f"mask_k={self.mask_k} is not a multiple of block_k * group = {self.chosen}, the tokens chosen together: "
                f"try {max(self.mask_k // self.chosen, 1) * self.chosen}"
            )
        if self.window is not None and self.window < self.block_q:
            raise ValueError(
                f"window={self.window} is less than block_q={self.block_q}, so the first query of a block could see "
                "nothing; widen the window, or pass None for no window at all"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be >= 0")

    @property
    def chosen(self) -> int:
        """Consecutive tokens that are chosen together."""
        return self.block_k * self.group

    @property
    def slots(self) -> int:
        """M: choices per query block."""
        return self.mask_k // self.chosen

    @property
    def width(self) -> int:
        """Keys that a query block sees at most."""
        return self.mask_k if self.window is None else self.sinks + self.mask_k + self.window

    def searched(self, ends: Tensor) -> Tensor:
        """T': how many groups of keys are searched for query blocks that see the keys before `ends`."""
        window = self.window or 0
        whole = ends // self.group
        if not self.scale_window:
            return (whole - window).clamp(min=0)
        return torch.minimum(-(-(ends - window).clamp(min=0) // self.group), whole)

    def candidates(self, ends: Tensor) -> Tensor:
        """B: how many blocks they are."""
        return -(-self.searched(ends) // self.block_k)

    def rounds(self, ends: Tensor) -> Tensor:
        """ceil(log2(B / M)); 0 where every block is chosen."""
        return (self.candidates(ends).double() / self.slots).log2().ceil().clamp(min=0).long()

    def sees_all(self, ends: Tensor) -> Tensor:
        """Whether query blocks that see the keys before `ends` see all of them: attention is then dense."""
        searched = self.searched(ends) * self.group
        return (searched <= self.mask_k) & (searched >= ends - (self.window or 0))


@provides("57-hip")
@dataclass(frozen=True, eq=False)
class Selection:
    """What the search chose for every query block.

    Args:
        index: (B, H, blocks, M) first token of every chosen block, ascending; only the first `count` are meant.
        count: (blocks,) how many were chosen: M, or fewer where there are fewer blocks to choose from.
        ends: (blocks,) a query block sees the keys before its end.
        budget: what the search was asked for.
    """

    index: Int[Tensor, "B H n M"]
    count: Int[Tensor, " n"]
    ends: Int[Tensor, " n"]
    budget: HiPBudget


@provides("57-hip")
@torch.no_grad()
def search_blocks(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    budget: HiPBudget,
    offset: int | None = None,
    rounds: int | None = None,
) -> Selection:
    """The key blocks of every query block.

    Args:
        q: (B, H, Q, D) queries as attention gets them (rotated); their scale does not matter. A last block of fewer than
            block_q queries is searched with those there are; a block of one query with that one.
        k: (B, G, K, D) keys as attention gets them; G divides H (grouped-query heads).
        budget: sizes of the search.
        offset: position of the first query among the keys; default K - Q, the queries being the last tokens.
        rounds: stop the search after so many, to look at it: the selection is then the first block of every run.

    Raises:
        ValueError: more queries than keys, heads that do not divide, or keys that do not divide into groups.
    """
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, k.shape
    offset = keys - queries if offset is None else offset
    if offset < 0:
        raise ValueError(f"{queries} queries are more than the {keys} keys; the queries must be the last tokens")
    if heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")
    if keys % budget.group:
        raise ValueError(
            f"{keys} keys do not divide into groups of {budget.group}; pass the first {keys - keys % budget.group} keys "
            f"and offset={offset}"
        )
    table = _table(k, budget.group)
    first = torch.arange(batch * heads, device=q.device) // (heads // key_heads) * table.shape[1]
    found = []
    for begin, stop, size in block_runs(queries, budget.block_q):
        rows = q[:, :, begin:stop].unflatten(2, (-1, size))
        rows = rows[:, :, :, 1::2] if size > 1 else rows
        ends = block_ends(stop - begin, size, offset + begin, q.device)
        chosen = _search(rows.flatten(0, 2), table.flatten(0, 1), first, ends, budget, rounds)
        found.append(chosen.view(batch, heads, len(ends), -1))
    ends = block_ends(queries, budget.block_q, offset, q.device)
    count = budget.candidates(ends).clamp(max=budget.slots)
    return Selection(torch.cat(found, 2), count, ends, budget)


def block_runs(queries: int, block: int) -> list[tuple[int, int, int]]:
    """(first query, last query + 1, queries per block) of the whole blocks, and of a last block of fewer queries."""
    whole = queries // block * block
    runs = ((0, whole, block), (whole, queries, queries - whole))
    return [run for run in runs if run[0] < run[1]]


def block_ends(queries: int, block: int, offset: int, device: torch.device) -> Int[Tensor, " n"]:
    """The keys that every block of queries sees lie before its end: where its last query stands."""
    blocks = torch.arange(1, -(-queries // block) + 1, device=device)
    return (blocks * block).clamp(max=queries) + offset


def blocks_at_once(width: int, per_core: int, device: torch.device) -> int:
    """How many query blocks with so many keys are worked off together, for so many keys per core of a CPU."""
    return max(1, (per_core * torch.get_num_threads() if device.type == "cpu" else _AT_ONCE) // width)


def _table(k: Tensor, group: int) -> Tensor:
    """(B * G, keys or groups, D or 2 D): the keys, or the minimum and maximum of every group of them side by side."""
    k = k.flatten(0, 1)
    if group == 1:
        return k
    groups = k.unflatten(1, (-1, group))
    return torch.cat([groups.amin(2), groups.amax(2)], -1)


def _search(rows: Tensor, table: Tensor, first: Tensor, ends: Tensor, budget: HiPBudget, most: int | None) -> Tensor:
    """(B * H * n, M) first tokens of the chosen blocks, for query blocks with the representatives (B * H * n, R, D).

    The keys of head h stand in `table` from first[h] on.
    """
    slots, blocks = budget.slots, len(ends)
    cuts = torch.arange(slots + 1, device=rows.device)
    candidates, rounds = budget.candidates(ends), budget.rounds(ends)
    rounds = rounds if most is None else rounds.clamp(max=most)
    bounds = (candidates.double()[:, None] / slots * cuts).long()  # in this precision and order, as the draft has it
    last = ends // budget.group - 1
    beyond = bool((candidates * budget.block_k > last + 1).any())
    size = blocks_at_once(slots * budget.block_k, _PER_CORE, rows.device)
    buffer = table.new_empty(size * slots * budget.block_k, table.shape[1])
    found = []
    for t in torch.arange(len(rows), device=rows.device).split(size):
        block = t % blocks
        visible = last[block].clamp(min=0) if beyond else None
        score = _score(rows[t[0] : t[-1] + 1], table, first[t // blocks], visible, budget.block_k, buffer)
        found.append(_descend(bounds[block], score, int(rounds[block].max())))
    index = torch.cat(found).view(-1, blocks, slots)
    everything = (candidates <= slots)[:, None]
    return torch.where(everything, cuts[:-1], index).flatten(0, 1) * budget.chosen


def _descend(bounds: Tensor, score: Callable[[Tensor], Tensor], rounds: int) -> Tensor:
    """(c, M) ascending blocks, from the boundaries (c, M + 1) of the first slots. Rounds too many change nothing."""
    slots = bounds.shape[1] - 1
    bounds = bounds.int()  # half as much to copy
    start, length = bounds[:, :-1], bounds.diff()
    best = score(start)
    for _ in range(rounds):
        half = length >> 1
        right = start + half
        left_score = best.masked_fill(half == 0, -torch.inf)  # a run of one block is its own right half
        best, kept = torch.cat([left_score, score(right)], 1).topk(slots, sorted=False)
        start = torch.cat([start, right], 1).gather(1, kept)
        length = torch.cat([half, length - half], 1).gather(1, kept)
    return start.sort(-1).values.long()


def _score(
    rows: Tensor, table: Tensor, first: Tensor, last: Tensor | None, size: int, buffer: Tensor
) -> Callable[[Tensor], Tensor]:
    """f of the equation: blocks (c, M) to scores (c, M), for query blocks with the representatives (c, R, D).

    Keys are counted from first[c] in the table, are visible up to last[c] (None: all that are asked for are), and are
    gathered into the same memory every time, as fresh memory costs more than the copy.
    """
    columns = rows.mT
    if last is None and len(table) % size == 0 and not bool((first % size).any()):
        # Whole blocks are rows of a table of blocks: fewer and longer copies.
        blocks_table, begins = table.view(-1, size * table.shape[1]), (first // size).int()
        room = buffer.view(-1, size * table.shape[1])

        def gather(blocks: Tensor) -> Tensor:
            index = (blocks + begins[:, None]).flatten()
            return torch.index_select(blocks_table, 0, index, out=room[: len(index)])

    else:
        steps = torch.arange(size, device=rows.device)

        def gather(blocks: Tensor) -> Tensor:
            tokens = blocks[..., None] * size + steps
            if last is not None:  # a block that reaches beyond what is visible has its last visible key twice
                tokens = tokens.minimum(last[:, None, None])
            tokens = (tokens.flatten(1) + first[:, None]).flatten()
            return torch.index_select(table, 0, tokens, out=buffer[: len(tokens)])

    def score(blocks: Tensor) -> Tensor:
        keys = gather(blocks).view(len(blocks), -1, rows.shape[2])
        products = torch.bmm(keys, columns)  # (c, M * block_k [* 2], R)
        return products.view(*blocks.shape, -1).amax(-1)

    return score

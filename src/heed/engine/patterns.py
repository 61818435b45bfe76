"""The named patterns. Each one is its index arithmetic and nothing else; see `heed.engine.pattern` for what they inherit.

Tokens of a grid are flattened row-major. Positions are counted from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heed.engine.axis import Axis
from heed.engine.checks import per_axis, positive_ints
from heed.engine.pattern import Pattern, Rule

__all__ = [
    "Blocks",
    "Causal",
    "Dilated",
    "Full",
    "Grouped",
    "Halo",
    "Neighborhood",
    "Pattern",
    "Selected",
    "Strided",
    "Subsampled",
    "Window",
]


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key.

    Args:
        grid: optional sizes of the token grid, which gives relative biases their axes.
    """

    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None:
            object.__setattr__(self, "grid", positive_ints("grid", self.grid))

    def check(self, n: int, m: int) -> None:
        if self.grid is not None:
            _check_tokens("Full", self.grid, n, "queries")
            _check_tokens("Full", self.grid, m, "keys")

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        sizes = self.grid or (n,)
        keys = self.grid or (m,)
        return tuple(Axis(torch.zeros(x).long(), torch.full((x,), y - 1), y) for x, y in zip(sizes, keys, strict=True))


@dataclass(frozen=True)
class Causal(Pattern):
    """Query i sees keys j <= i + offset.

    Args:
        offset: how far the last visible key lies ahead; with a cache of m - n earlier keys pass offset=m - n.
    """

    offset: int = 0

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        i = torch.arange(n)
        return (Axis(torch.zeros_like(i), (i + self.offset).clamp(max=m - 1), m),)


@dataclass(frozen=True)
class Window(Pattern):
    """Query i sees keys i - left <= j <= i + right, fewer at the ends of the sequence.

    Args:
        left: reach to earlier keys, >= 0.
        right: reach to later keys, >= 0; defaults to `left`, so Window(w) means |i - j| <= w.
    """

    left: int
    right: int

    def __init__(self, left: int, right: int | None = None) -> None:
        for name, reach in (("left", left), ("right", left if right is None else right)):
            if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:
                raise ValueError(f"Window: {name}={reach!r} must be an integer >= 0")
            object.__setattr__(self, name, reach)

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        i = torch.arange(n)
        return (Axis((i - self.left).clamp(min=0), (i + self.right).clamp(max=m - 1), m),)


@dataclass(frozen=True)
class Neighborhood(Pattern):
    """Neighborhood attention (card 13, NATTEN's rule): each query sees the `kernel` keys nearest to it along every axis.

    Windows slide inward at the borders, so each holds exactly `kernel` keys; even windows lean to earlier keys.
    With dilation t the axis falls into t interleaved groups, each a neighborhood of its own. With stride s, runs of s
    queries share the window of their leader. A causal axis looks back only, with fewer keys near the start.

    Args:
        grid: sizes of the token grid, 1 to 3 axes.
        kernel: window size per axis, 2 <= kernel and kernel * dilation <= grid.
        dilation: step between the keys of a window, per axis.
        stride: queries that share a window, 1 <= stride <= kernel, per axis.
        causal: whether the axis may look ahead, per axis.
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    causal: tuple[bool, ...] = (False,)

    def __init__(
        self,
        grid: int | tuple[int, ...],
        kernel: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
    ) -> None:
        sizes = positive_ints("grid", (grid,) if isinstance(grid, int) else grid)
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"Neighborhood: grid={grid!r} has {len(sizes)} axes; 1 to 3 are supported")
        set_ = object.__setattr__
        set_(self, "grid", sizes)
        set_(self, "kernel", per_axis("kernel", kernel, len(sizes)))
        set_(self, "dilation", per_axis("dilation", dilation, len(sizes)))
        set_(self, "stride", per_axis("stride", stride, len(sizes)))
        set_(self, "causal", per_axis("causal", causal, len(sizes), kind=bool))
        for a, (x, w, t, s) in enumerate(zip(sizes, self.kernel, self.dilation, self.stride, strict=True)):
            if w < 2:
                raise ValueError(f"Neighborhood: kernel {w} on axis {a} must be at least 2")
            if w * t > x:
                raise ValueError(
                    f"Neighborhood: kernel {w} x dilation {t} = {w * t} exceeds the {x} tokens of axis {a}; "
                    "use a smaller kernel or dilation, or pad the grid"
                )
            if s > w:
                raise ValueError(f"Neighborhood: stride {s} on axis {a} exceeds its kernel {w}")

    def check(self, n: int, m: int) -> None:
        _check_tokens("Neighborhood", self.grid, n, "queries")
        _check_tokens("Neighborhood", self.grid, m, "keys")

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        settings = zip(self.grid, self.kernel, self.dilation, self.stride, self.causal, strict=True)
        return tuple(_neighborhood_axis(*setting) for setting in settings)


def _neighborhood_axis(size: int, kernel: int, dilation: int, stride: int, causal: bool) -> Axis:
    order = (
        torch.arange(size).view(-1)
        if dilation == 1
        else torch.cat([torch.arange(g, size, dilation) for g in range(dilation)])
    )
    group = order % dilation
    x = order // dilation  # index inside the dilation group
    n = size // dilation + (group < size % dilation).long()  # length of that group
    start = torch.cumsum(torch.bincount(group, minlength=dilation), 0)[group] - n  # place of the group's first token
    if causal:
        leader = torch.minimum(x // stride * stride + stride - 1, n - 1)
        first, last = (leader - kernel + 1).clamp(min=0), x
    else:
        left = kernel // 2
        right = left - 1 + kernel % 2
        leader = torch.minimum(x // stride * stride + stride // 2, n - 1)
        centre = torch.minimum(leader.clamp(min=left), n - 1 - right)
        first, last = centre - left, centre + right
    permuted = None if dilation == 1 else order
    pieces = tuple(torch.bincount(group).tolist()) if dilation > 1 else ()
    return Axis(start + first, start + last, size, permuted, permuted, pieces=pieces)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Tokens see the tokens of their own block: Blocks(64) on a sequence, Blocks((7, 7), grid=(56, 56)) on a grid.

    Args:
        size: block size per axis; the last block of an axis may be shorter.
        shift: displacement of the block borders per axis, as in shifted windows; what is cut off at the start
            forms a block of its own.
        grid: sizes of the token grid; None for a plain sequence.
    """

    size: tuple[int, ...]
    shift: tuple[int, ...] = (0,)
    grid: tuple[int, ...] | None = None

    def __init__(
        self,
        size: int | tuple[int, ...],
        shift: int | tuple[int, ...] = 0,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        sizes = None if grid is None else positive_ints("grid", grid)
        rank = 1 if sizes is None else len(sizes)
        object.__setattr__(self, "grid", sizes)
        object.__setattr__(self, "size", per_axis("size", size, rank))
        object.__setattr__(self, "shift", per_axis("shift", shift, rank, least=0))
        for a, (b, s) in enumerate(zip(self.size, self.shift, strict=True)):
            if s >= b:
                raise ValueError(f"Blocks: shift {s} on axis {a} must be smaller than the block size {b}")

    def check(self, n: int, m: int) -> None:
        if self.grid is not None:
            _check_tokens("Blocks", self.grid, n, "queries")
            _check_tokens("Blocks", self.grid, m, "keys")

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        queries, keys = self.grid or (n,), self.grid or (m,)
        return tuple(_block_axis(*setting) for setting in zip(queries, keys, self.size, self.shift, strict=True))


def _block_axis(queries: int, keys: int, size: int, shift: int) -> Axis:
    block = (torch.arange(queries) - shift).div(size, rounding_mode="floor")
    first = (block * size + shift).clamp(min=0)
    last = (block * size + shift + size - 1).clamp(max=keys - 1)
    pieces = tuple(torch.bincount(block - block[0]).tolist())
    return Axis(first, last, keys, pieces=pieces)


@dataclass(frozen=True)
class Halo(Pattern):
    """Halo attention (card 04): the queries of a block share the block enlarged by `halo` tokens on every side.

    Args:
        grid: sizes of the key grid before padding.
        block: block size per axis; must divide the grid.
        halo: reach beyond the block per axis, >= 0.
        stride: the queries are every stride-th token of the grid per axis; must divide the block.
        padded: True when the keys are laid out on the grid padded by `halo` on all sides, so that every window is whole
            and padding takes part; False when windows are cut at the border.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    halo: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    padded: bool = False

    def __init__(
        self,
        grid: tuple[int, ...],
        block: int | tuple[int, ...],
        halo: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padded: bool = False,
    ) -> None:
        sizes = positive_ints("grid", grid)
        set_ = object.__setattr__
        set_(self, "grid", sizes)
        set_(self, "block", per_axis("block", block, len(sizes)))
        set_(self, "halo", per_axis("halo", halo, len(sizes), least=0))
        set_(self, "stride", per_axis("stride", stride, len(sizes)))
        set_(self, "padded", bool(padded))
        for a, (x, b, s) in enumerate(zip(sizes, self.block, self.stride, strict=True)):
            if x % b:
                raise ValueError(f"Halo: axis {a} of {x} tokens is not a multiple of block {b}; pad it by {-x % b}")
            if b % s:
                raise ValueError(f"Halo: stride {s} on axis {a} does not divide block {b}")

    def check(self, n: int, m: int) -> None:
        queries = tuple(x // s for x, s in zip(self.grid, self.stride, strict=True))
        keys = tuple(x + 2 * h * self.padded for x, h in zip(self.grid, self.halo, strict=True))
        _check_tokens("Halo", queries, n, "queries")
        _check_tokens("Halo", keys, m, "keys")

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        return tuple(
            _halo_axis(*setting, self.padded)
            for setting in zip(self.grid, self.block, self.halo, self.stride, strict=True)
        )


def _halo_axis(size: int, block: int, halo: int, stride: int, padded: bool) -> Axis:
    per_block = block // stride
    places = torch.arange(size // stride)
    start = places // per_block * block  # first token of the query's block
    shift = halo if padded else 0  # padding moves every key place by halo
    keys = size + 2 * shift
    first = (start - halo + shift).clamp(min=0)
    last = (start + block + halo - 1 + shift).clamp(max=keys - 1)
    anchor = start + places % per_block + shift
    return Axis(first, last, keys, anchor=anchor, pieces=(per_block,) * (size // block))


@dataclass(frozen=True)
class Dilated(Pattern):
    """Query i sees keys i + c * dilation for |c| <= reach that exist: a dilated window cut at the ends.

    Args:
        reach: keys on each side, >= 0.
        dilation: step between keys, >= 1.
    """

    reach: int
    dilation: int

    def __post_init__(self) -> None:
        positive_ints("reach", (self.reach,), least=0)
        positive_ints("dilation", (self.dilation,))

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        queries, keys = _by_residue(n, self.dilation), _by_residue(m, self.dilation)
        first_key = queries.start_in(keys) + (queries.index - self.reach).clamp(min=0)
        last_in_group = torch.minimum(queries.index + self.reach, queries.length_in(keys) - 1)
        last_key = queries.start_in(keys) + last_in_group
        return (
            Axis(
                first_key,
                last_key,
                m,
                queries.order,
                keys.order,
                queries.start_in(keys) + queries.index,
                queries.pieces,
            ),
        )


@dataclass(frozen=True)
class Strided(Pattern):
    """Query i sees keys j with (i - j) divisible by `step`: the long-range half of strided sparse attention."""

    step: int

    def __post_init__(self) -> None:
        positive_ints("step", (self.step,))

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        queries, keys = _by_residue(n, self.step), _by_residue(m, self.step)
        first = queries.start_in(keys)
        last = first + queries.length_in(keys) - 1
        return (Axis(first, last, m, queries.order, keys.order, first + queries.index, queries.pieces),)


@dataclass(frozen=True, eq=False)
class _Residues:
    """Positions 0..size-1 sorted by their residue modulo `step`."""

    order: Tensor
    index: Tensor  # position // step, by place
    residue: Tensor  # by place
    lengths: Tensor  # tokens per residue

    @property
    def pieces(self) -> tuple[int, ...]:
        return tuple(x for x in self.lengths.tolist() if x)

    def start_in(self, other: _Residues) -> Tensor:
        return (torch.cumsum(other.lengths, 0) - other.lengths)[self.residue]

    def length_in(self, other: _Residues) -> Tensor:
        return other.lengths[self.residue]


def _by_residue(size: int, step: int) -> _Residues:
    positions = torch.arange(size)
    order = torch.argsort(positions % step, stable=True)
    residue = order % step
    return _Residues(order, order // step, residue, torch.bincount(residue, minlength=step))


@dataclass(frozen=True, eq=False)
class Grouped(Pattern):
    """Tokens see the tokens that carry the same label (clusters, buckets, documents packed into one row).

    Args:
        labels: (N,) integers shared by all, or (B or 1, H or 1, N) when chosen per batch element and head.
        key_labels: the same for keys; defaults to `labels`.
    """

    labels: Tensor
    key_labels: Tensor | None = None

    def __post_init__(self) -> None:
        for name, labels in (("labels", self.labels), ("key_labels", self.key_labels)):
            if labels is None and name == "key_labels":
                continue
            if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim not in (1, 3):
                raise ValueError(
                    f"Grouped: {name} must be an integer tensor of shape (N,) or (B, H, N), not {_kind(labels)}"
                )
        if self.key_labels is not None and self.key_labels.ndim != self.labels.ndim:
            raise ValueError("Grouped: labels and key_labels must both be shared (N,) or both per head (B, H, N)")

    @property
    def static(self) -> bool:
        return self.labels.ndim == 1

    @property
    def keys(self) -> Tensor:
        return self.labels if self.key_labels is None else self.key_labels

    def check(self, n: int, m: int) -> None:
        if self.labels.shape[-1] != n or self.keys.shape[-1] != m:
            raise ValueError(
                f"Grouped: labels for {self.labels.shape[-1]} queries and {self.keys.shape[-1]} keys do not fit "
                f"{n} queries and {m} keys"
            )

    def axes(self, n: int, m: int) -> tuple[Axis, ...] | None:
        if not self.static:
            return None
        labels, keys = self.labels.cpu(), self.keys.cpu()
        query_order, key_order = torch.argsort(labels, stable=True), torch.argsort(keys, stable=True)
        ranked, places = labels[query_order], keys[key_order].contiguous()
        first = torch.searchsorted(places, ranked.contiguous())
        last = torch.searchsorted(places, ranked.contiguous(), right=True) - 1
        pieces = tuple(torch.unique_consecutive(ranked, return_counts=True)[1].tolist())
        return (Axis(first, last, m, query_order, key_order, pieces=pieces),)

    def rule(self, n: int, m: int, device: torch.device) -> Rule:
        labels, keys = self.labels.to(device), self.keys.to(device)
        if self.static:
            return lambda b, h, q, k: labels[q] == keys[k]
        (qb, qh), (kb, kh) = labels.shape[:2], keys.shape[:2]
        return lambda b, h, q, k: labels[b % qb, h % qh, q] == keys[b % kb, h % kh, k]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grouped) and _equal(self.labels, other.labels) and _equal(self.keys, other.keys)

    def __hash__(self) -> int:
        return hash((Grouped, _digest(self.labels), _digest(self.keys)))

    def __repr__(self) -> str:
        return f"Grouped({_kind(self.labels)})"


@dataclass(frozen=True, eq=False)
class Selected(Pattern):
    """Key blocks chosen for every query block, per batch element and head.

    Args:
        index: (B or 1, H or 1, query blocks, slots) integers: the key blocks each query block visits; -1 leaves a slot
            empty, a block named twice counts once.
        block: (query block, key block) sizes in tokens; (1, 1) chooses single tokens for single queries.
    """

    index: Tensor
    block: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if not isinstance(self.index, Tensor) or self.index.is_floating_point() or self.index.ndim != 4:
            raise ValueError(
                f"Selected: index must be an integer tensor (B, H, query blocks, slots), not {_kind(self.index)}"
            )
        object.__setattr__(self, "block", per_axis("block", self.block, 2))

    @property
    def static(self) -> bool:
        return False

    @property
    def grain(self) -> tuple[int, int]:
        return self.block

    def check(self, n: int, m: int) -> None:
        blocks, keys = -(-n // self.block[0]), -(-m // self.block[1])
        if self.index.shape[2] != blocks:
            raise ValueError(
                f"Selected: index names {self.index.shape[2]} query blocks, but {n} queries in blocks of "
                f"{self.block[0]} make {blocks}"
            )
        if self.index.numel() and (int(self.index.max()) >= keys or int(self.index.min()) < -1):
            raise ValueError(
                f"Selected: index ranges from {int(self.index.min())} to {int(self.index.max())}, but {m} keys in blocks "
                f"of {self.block[1]} are numbered 0 to {keys - 1} (-1 for an empty slot)"
            )

    def block_map(self, m: int) -> Tensor:
        """(B or 1, H or 1, query blocks, key blocks) bool: which blocks are visited."""
        chosen = self.index.new_zeros((*self.index.shape[:3], -(-m // self.block[1]) + 1), dtype=torch.bool)
        return chosen.scatter_(3, self.index % chosen.shape[3], True)[..., :-1]  # -1 lands in the extra column

    def rule(self, n: int, m: int, device: torch.device) -> Rule:
        visited = self.block_map(m).to(device)
        batch, heads = visited.shape[:2]
        size, key_size = self.block
        return lambda b, h, q, k: visited[b % batch, h % heads, q // size, k // key_size]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selected) and self.block == other.block and _equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash((Selected, self.block, _digest(self.index)))

    def __repr__(self) -> str:
        return f"Selected({_kind(self.index)}, block={self.block})"


@dataclass(frozen=True)
class Subsampled(Pattern):
    """One random subset of the keys, the same for all queries and heads (stochastically subsampled attention, card 41).

    Args:
        keep: how many keys stay: a count (int >= 1) or a share (0 < float <= 1, rounded, at least one key).
        seed: fixes the subset; `Subsampled.draw(keep, generator)` takes it from a torch.Generator.
    """

    keep_keys: int | float
    seed: int = 0

    def __init__(self, keep: int | float, generator: torch.Generator | None = None, *, seed: int = 0) -> None:
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        share = isinstance(keep, float)
        if isinstance(keep, bool) or not isinstance(keep, int | float) or (not 0 < keep <= 1 if share else keep < 1):
            raise ValueError(f"Subsampled: keep={keep!r} must be a count >= 1 or a share in (0, 1]")
        object.__setattr__(self, "keep_keys", keep)
        object.__setattr__(self, "seed", seed)

    @property
    def grain(self) -> tuple[int, int]:
        return 64, 1

    def _count(self, m: int) -> int:
        return self.keep_keys if isinstance(self.keep_keys, int) else max(1, round(self.keep_keys * m))

    def check(self, n: int, m: int) -> None:
        if self._count(m) > m:
            raise ValueError(f"Subsampled: keep={self.keep_keys} exceeds the {m} keys there are")

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        count = self._count(m)
        drawn = torch.randperm(m, generator=torch.Generator().manual_seed(self.seed))
        order = torch.cat([drawn[:count].sort().values, drawn[count:].sort().values])
        return (Axis(torch.zeros(n).long(), torch.full((n,), count - 1), m, key_order=order),)

    def __repr__(self) -> str:
        return f"Subsampled(keep={self.keep_keys}, seed={self.seed})"


def _check_tokens(name: str, grid: tuple[int, ...], tokens: int, what: str) -> None:
    if math.prod(grid) != tokens:
        raise ValueError(f"{name}: grid {grid} holds {math.prod(grid)} tokens, but there are {tokens} {what}")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and torch.equal(a, b))


def _digest(tensor: Tensor) -> int:
    return hash(tensor.detach().cpu().numpy().tobytes())

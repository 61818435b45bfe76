"""Patterns on grids of tokens, flattened row-major, each its index arithmetic and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heed.engine.axis import Axis
from heed.engine.checks import check_tokens, per_axis, positive_ints
from heed.engine.pattern import Pattern


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
        check_tokens("Neighborhood", self.grid, n, "queries")
        check_tokens("Neighborhood", self.grid, m, "keys")

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
            check_tokens("Blocks", self.grid, n, "queries")
            check_tokens("Blocks", self.grid, m, "keys")

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
        check_tokens("Halo", queries, n, "queries")
        check_tokens("Halo", keys, m, "keys")

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

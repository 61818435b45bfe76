"""Patterns on sequences, each its index arithmetic and nothing else. Positions are counted from 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heed.engine.axis import Axis
from heed.engine.checks import check_tokens, positive_ints
from heed.engine.pattern import Pattern


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
            check_tokens("Full", self.grid, n, "queries")
            check_tokens("Full", self.grid, m, "keys")

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

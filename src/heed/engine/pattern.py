"""What a pattern is, and how patterns combine.

A pattern says which keys each query may look at. It is a value: immutable, hashable, printable, comparable, and closed
under `&` (both), `|` (either) and `~` (not):

    >>> Causal() & (Window(256) | Strided(64))
    Causal() & (Window(left=256, right=256) | Strided(step=64))

A new pattern needs one method. Either `axes(n, m)`, when the keys of each query form an interval (or a box on a grid), or
`rule(n, m, device)`, plain index arithmetic. Everything else (dense mask, density, picture, plan) follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heed.engine.axis import Axis
from heed.engine.constants import kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes as MatplotlibAxes

# (b, h, q, k) -> kept, on index tensors that broadcast
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Pattern:
    """Which keys each query may look at. Subclasses are frozen dataclasses."""

    @property
    def static(self) -> bool:
        """True when the pattern is the same for every batch element and head, so that its plan can be kept."""
        return True

    @property
    def grain(self) -> tuple[int, int]:
        """Query and key block sizes at which the pattern is most economically described."""
        return 64, 64

    def fetches(self, m: int) -> tuple[int, float] | None:
        """(queries that share a choice of keys, share of the m keys that each choice names), or None when the pattern
        does not name keys one choice at a time."""
        return None

    def check(self, n: int, m: int) -> None:
        """Raise ValueError when n queries and m keys do not fit the pattern."""

    def axes(self, n: int, m: int) -> tuple[Axis, ...] | None:
        """The box form for n queries and m keys, or None when there is none."""
        return None

    def rule(self, n: int, m: int, device: torch.device) -> Rule:
        """The index arithmetic: a function of batch element, head, query and key (integer tensors that broadcast)
        that says whether the query may see the key."""
        boxes = _box_tables(self, n, m, device)
        if boxes is None:
            raise NotImplementedError(f"{type(self).__name__} must define axes() or rule()")

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside: Tensor | None = None
            for box in boxes:
                key = box.key_place[k]
                along = (box.first[q] <= key) & (key <= box.last[q])
                inside = along if inside is None else inside & along
            assert inside is not None  # a grid has at least one axis
            return inside

        return keep

    def mask(self, n: int, m: int | None = None, *, batch: int = 1, heads: int = 1, device: object = None) -> Tensor:
        """The dense mask: bool (n, m) for a static pattern, else (batch, heads, n, m)."""
        m = n if m is None else m
        self.check(n, m)
        dev = torch.device(device) if device is not None else torch.device("cpu")  # type: ignore[arg-type]
        q = torch.arange(n, device=dev)[:, None]
        k = torch.arange(m, device=dev)[None, :]
        keep = self.rule(n, m, dev)
        if self.static:
            zero = torch.zeros((), dtype=torch.long, device=dev)
            return keep(zero, zero, q, k).expand(n, m)
        b = torch.arange(batch, device=dev)[:, None, None, None]
        h = torch.arange(heads, device=dev)[None, :, None, None]
        return keep(b, h, q, k).expand(batch, heads, n, m)

    def density(self, n: int, m: int | None = None, *, batch: int = 1, heads: int = 1) -> float:
        """Share of (query, key) pairs that are kept, between 0 and 1."""
        m = n if m is None else m
        self.check(n, m)
        axes = self.axes(n, m)
        if axes is not None:
            share = 1.0
            for axis in axes:
                count = (axis.last.clamp(max=axis.keys - 1) - axis.first.clamp(min=0) + 1).clamp(min=0)
                share *= count.sum().item() / (axis.queries * axis.keys)
            return share
        return self.mask(n, m, batch=batch, heads=heads).float().mean().item()

    def plot(self, n: int, m: int | None = None, *, ax: MatplotlibAxes | None = None) -> MatplotlibAxes:
        """Draw the dense mask (rows are queries, columns are keys) and return matplotlib's axes."""
        import matplotlib.pyplot as plt

        mask = self.mask(n, m)
        if mask.ndim == 4:
            mask = mask[0, 0]
        if ax is None:
            _, ax = plt.subplots(figsize=(4, 4))
        assert ax is not None
        ax.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest", aspect="auto")
        ax.set(title=str(self), xlabel="keys", ylabel="queries")
        return ax

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, _pattern(other))

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, _pattern(other))

    def __invert__(self) -> Pattern:
        return self.pattern if isinstance(self, Not) else Not(self)


@dataclass(frozen=True)
class _Pair(Pattern):
    left: Pattern
    right: Pattern

    @property
    def static(self) -> bool:
        return self.left.static and self.right.static

    @property
    def grain(self) -> tuple[int, int]:
        (lq, lk), (rq, rk) = self.left.grain, self.right.grain
        return min(lq, rq), min(lk, rk)

    def check(self, n: int, m: int) -> None:
        self.left.check(n, m)
        self.right.check(n, m)


@dataclass(frozen=True)
class And(_Pair):
    """Pairs that both patterns keep."""

    def axes(self, n: int, m: int) -> tuple[Axis, ...] | None:
        left, right = self.left.axes(n, m), self.right.axes(n, m)
        if left is None or right is None:
            return None
        if len(left) == len(right) and all(a.same_places(b) for a, b in zip(left, right, strict=True)):
            return tuple(a.intersect(b) for a, b in zip(left, right, strict=True))
        for full, other in ((left, right), (right, left)):
            if all(_unrestricted(axis) for axis in full):
                return other
        return None

    def fetches(self, m: int) -> tuple[int, float] | None:
        # The other side leaves some of the fetched keys out; of two choices the left one counts.
        return self.left.fetches(m) or self.right.fetches(m)

    def mask(self, n: int, m: int | None = None, *, batch: int = 1, heads: int = 1, device: object = None) -> Tensor:
        # Without index arithmetic where either side has a quicker way.
        left, right = (side.mask(n, m, batch=batch, heads=heads, device=device) for side in (self.left, self.right))
        return left & right

    def rule(self, n: int, m: int, device: torch.device) -> Rule:
        left, right = self.left.rule(n, m, device), self.right.rule(n, m, device)
        return lambda b, h, q, k: left(b, h, q, k) & right(b, h, q, k)

    def __str__(self) -> str:
        return f"{_wrapped(self.left)} & {_wrapped(self.right)}"

    __repr__ = __str__


@dataclass(frozen=True)
class Or(_Pair):
    """Pairs that either pattern keeps."""

    def rule(self, n: int, m: int, device: torch.device) -> Rule:
        left, right = self.left.rule(n, m, device), self.right.rule(n, m, device)
        return lambda b, h, q, k: left(b, h, q, k) | right(b, h, q, k)

    def __str__(self) -> str:
        return f"{_wrapped(self.left)} | {_wrapped(self.right)}"

    __repr__ = __str__


@dataclass(frozen=True)
class Not(Pattern):
    """Pairs that the pattern does not keep."""

    pattern: Pattern

    @property
    def static(self) -> bool:
        return self.pattern.static

    @property
    def grain(self) -> tuple[int, int]:
        return self.pattern.grain

    def check(self, n: int, m: int) -> None:
        self.pattern.check(n, m)

    def rule(self, n: int, m: int, device: torch.device) -> Rule:
        keep = self.pattern.rule(n, m, device)
        return lambda b, h, q, k: ~keep(b, h, q, k)

    def __str__(self) -> str:
        return f"~{_wrapped(self.pattern)}"

    __repr__ = __str__


def _wrapped(pattern: Pattern) -> str:
    return f"({pattern})" if isinstance(pattern, _Pair) else str(pattern)


def _pattern(value: object) -> Pattern:
    if not isinstance(value, Pattern):
        raise TypeError(f"a pattern combines with a pattern, not with {value!r}; see heed.patterns")
    return value


def _unrestricted(axis: Axis) -> bool:
    return bool((axis.first <= 0).all() and (axis.last >= axis.keys - 1).all())


@dataclass(frozen=True, eq=False)
class _BoxTable:
    """An axis as look-up tables over tokens, on one device."""

    first: Tensor  # (n,)
    last: Tensor  # (n,)
    key_place: Tensor  # (m,)


@kept
def _box_tables(pattern: Pattern, n: int, m: int, device: torch.device) -> tuple[_BoxTable, ...] | None:
    axes = pattern.axes(n, m)
    if axes is None:
        return None
    tables = []
    q, k = torch.arange(n), torch.arange(m)
    for axis in reversed(axes):
        place = axis.query_places()[q % axis.queries]
        key_place = axis.key_places()[k % axis.keys]
        tables.append(_BoxTable(axis.first[place].to(device), axis.last[place].to(device), key_place.to(device)))
        q, k = q // axis.queries, k // axis.keys
    return tuple(reversed(tables))

"""Patterns chosen by content: tokens that share a label, and blocks that somebody picked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heed.engine.axis import Axis
from heed.engine.checks import per_axis
from heed.engine.pattern import Pattern, Rule


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

    def fetches(self, m: int) -> tuple[int, float] | None:
        return self.block[0], self.index.shape[3] * self.block[1] / m

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

    def mask(self, n: int, m: int | None = None, *, batch: int = 1, heads: int = 1, device: object = None) -> Tensor:
        m = n if m is None else m
        self.check(n, m)
        kept = self.block_map(m).to(device or "cpu")  # type: ignore[call-overload]
        for axis, size in zip((2, 3), self.block, strict=True):
            kept = kept.repeat_interleave(size, axis) if size > 1 else kept
        return kept[:, :, :n, :m].expand(batch, heads, n, m)

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


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and torch.equal(a, b))


def _digest(tensor: Tensor) -> int:
    return hash(tensor.detach().cpu().numpy().tobytes())

"""One call of `attend`, checked and normalised, as the backends receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heed.engine.bias import Bias
from heed.engine.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Call:
    """q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv); the other fields as in `heed.attend`."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    bias: Bias | None
    scale: float
    key_mask: Tensor | None
    dropout: float
    generator: torch.Generator | None
    weights: bool
    lse: bool

    @property
    def n(self) -> int:
        return self.q.shape[2]

    @property
    def m(self) -> int:
        return self.k.shape[2]

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.q, self.k, self.v, *self.bias_tensors))

    @property
    def bias_tensors(self) -> tuple[Tensor, ...]:
        if self.bias is None:
            return ()
        if isinstance(self.bias, Tensor):
            return (self.bias,)
        return (self.bias.table,) if hasattr(self.bias, "table") else self.bias.logits  # type: ignore[union-attr]

    def full_heads(self) -> tuple[Tensor, Tensor]:
        """k and v with every key head repeated for its group of query heads."""
        if self.groups == 1:
            return self.k, self.v
        return self.k.repeat_interleave(self.groups, 1), self.v.repeat_interleave(self.groups, 1)

    def allowed(self) -> Tensor:
        """Bool, broadcastable to (B, H, N, M): what the pattern and the key mask keep."""
        kept = self.pattern.mask(self.n, self.m, batch=self.q.shape[0], heads=self.q.shape[1], device=self.q.device)
        kept = kept if kept.ndim == 4 else kept[None, None]
        return kept if self.key_mask is None else kept & self.key_mask[:, None, None, :]


@dataclass(frozen=True, eq=False)
class Result:
    """out (B, H, N, Dv), and what else was asked for: weights (B, H, N, M), lse (B, H, N)."""

    out: Tensor
    weights: Tensor | None = None
    lse: Tensor | None = None

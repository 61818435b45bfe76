"""STKIM in the attention of any host (card 09): in training, some of a query's strongest keys are hidden at random.

    a (B, H, Q, K):  a at int(k' * drop) of the k' = min(top, keys) strongest = 0,  then a / sum a

which is the softmax of masked logits, see `heed.predict.mil.masking`. The paper masks attention over a bag's instances;
masking the keys of a class token or of a cross-attention is heed's own use of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.methods import Handle, Method
from heed.predict.mil.masking import check_masking, choose_top_instances


@provides("09-acmil")
@dataclass(frozen=True)
class MaskTopKeys(Method):
    """Hide some of the strongest keys while the host is in training mode: `heed.apply(vit, MaskTopKeys())`.

    Args:
        top: how many of the strongest keys of a row are candidates.
        drop: share of them that is hidden.
        queries: how many queries, from the first, have keys hidden: 1 for a class token; None for all.
        generator: what is drawn from; None for torch's own.
    """

    top: int = 10
    drop: float = 0.6
    queries: int | None = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_masking(self.top, self.drop)
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"queries={self.queries}: at least one query, or None for all")

    def attach(self, host: Any, handle: Handle) -> None:
        attach_rule(host, _HideKeys(self), handle)


class _HideKeys(AttentionRule):
    def __init__(self, method: MaskTopKeys) -> None:
        self.method = method

    def weights(self, call: AttentionCall, weights: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        m = self.method
        if not call.module.training or m.top == 0:
            return weights
        rows = weights[:, :, : m.queries]
        allowed = call.allowed()
        if allowed is None:
            allowed = torch.ones_like(rows, dtype=torch.bool)
        allowed = allowed[..., : m.queries, :].expand_as(rows)
        chosen = choose_top_instances(rows.detach(), m.top, m.drop, valid=allowed, generator=m.generator)
        left = rows.masked_fill(chosen | ~allowed, 0)
        # Where every key of a row was chosen, equal logits remain, whose softmax is even.
        none_left = ~left.any(-1, keepdim=True)
        left = torch.where(none_left, allowed.to(rows.dtype), left)
        left = left / left.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        return torch.cat([left, weights[:, :, rows.shape[2] :]], 2)

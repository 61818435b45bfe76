"""A rule: what a method changes about one call of a host's attention, in four places.

    call    = before(call)                      queries, keys, values (B, H, N, D), mask, scale
    weights = softmax(scale q k^T + mask)       (B, H, Q, K); formed only where a rule has `weights`
    weights = weights(call, weights)
    out     = weights v                         or core(call), where a rule computes attention itself
    out     = after(call, out)                  (B, Q, H, D), before the host's output projection

Several rules on one host act in the order in which they were attached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.engine.attend import attend
from heed.engine.patterns import Causal, Full

RULES = "_heed_rules"  # attribute of a layer that has some: its `Rules`


@dataclass(frozen=True)
class AttentionCall:
    """One call of a host's attention.

    Args:
        module: the host's attention layer.
        layer: its number among the attention layers of the host, from 0.
        query: (B, H, Q, D), rotated where the host rotates.
        key, value: (B, G, K, D); G divides H (grouped-query heads).
        mask: True where attention is allowed, or what is added to the scores; broadcasts to (B, H, Q, K). None: all.
        causal: query i of Q sees the first K - Q + i + 1 keys; only where mask is None.
        scale: factor on q k^T.
        dropout: on the weights.
        softcap: s in s * tanh(scores / s), None for none.
        options: what else the host passes to its attention.
    """

    module: nn.Module
    layer: int
    query: Float[Tensor, "B H Q D"]
    key: Float[Tensor, "B G K D"]
    value: Float[Tensor, "B G K E"]
    mask: Tensor | None
    causal: bool
    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> AttentionCall:
        """This call with other fields."""
        return dataclasses.replace(self, **changes)

    def allowed(self) -> Bool[Tensor, "#B #H Q K"] | None:
        """Which keys each query may look at, as a mask; None for all."""
        if self.mask is not None:
            return self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        if not self.causal:
            return None
        queries, keys = self.query.shape[2], self.key.shape[2]
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
        return allowed.tril(keys - queries)[None, None]


class AttentionRule:
    """What a method changes about a host's attention; a subclass overrides what it needs.

    `core` and `weights` are None unless a subclass defines them:

        core(call) -> (B, Q, H, E)             computes attention itself; at most one rule of a host may. None leaves
                                               this call to the host
        weights(call, weights) -> weights      sees and changes the weights (B, H, Q, K); they are formed for it
    """

    core: Callable[[AttentionCall], Tensor | None] | None = None
    weights: Callable[[AttentionCall, Tensor], Tensor] | None = None

    def before(self, call: AttentionCall) -> AttentionCall:
        """Change queries, keys, values, mask or scale."""
        return call

    def after(self, call: AttentionCall, out: Float[Tensor, "B Q H E"]) -> Float[Tensor, "B Q H E"]:
        """Change the output of the heads, before they are projected."""
        return out


class Rules(list[AttentionRule]):
    """The rules of one attention layer, in the order in which they act, and the layer's number."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer


def check_together(rules: Sequence[AttentionRule]) -> None:
    """ValueError when rules cannot act on one host together."""
    cores = [type(rule).__name__ for rule in rules if rule.core]
    seeing = [type(rule).__name__ for rule in rules if rule.weights]
    if len(cores) > 1:
        raise ValueError(f"{' and '.join(cores)} each compute the host's attention; apply one of them")
    if cores and seeing:
        raise ValueError(f"{cores[0]} never forms the attention weights that {seeing[0]} needs; apply one of them")


def run_rules(
    call: AttentionCall, rules: Sequence[AttentionRule], plain: Callable[[AttentionCall], Tensor] | None = None
) -> tuple[Float[Tensor, "B Q H E"], Float[Tensor, "B H Q K"] | None]:
    """Attention with its rules.

    Args:
        call: what the host asks for.
        rules: in the order in which they were attached.
        plain: the host's own fused attention, used where no rule has `core` or `weights`; None for the engine's.

    Returns:
        The heads' outputs, and the weights where a rule saw them.
    """
    for rule in rules:
        call = rule.before(call)
    weights = None
    core = next((rule.core for rule in rules if rule.core), None)
    out = None if core is None else core(call)
    if out is None and (call.softcap is not None or any(rule.weights for rule in rules)):
        weights = attention_weights(call)
        for rule in rules:
            if rule.weights:
                weights = rule.weights(call, weights)
        dropped = nn.functional.dropout(weights, call.dropout) if call.dropout else weights
        out = (dropped @ repeat_heads(call.value, call.query.shape[1])).transpose(1, 2)
    elif out is None:
        out = (plain or plain_attention)(call)
    for rule in rules:
        out = rule.after(call, out)
    return out, weights


def plain_attention(call: AttentionCall) -> Float[Tensor, "B Q H E"]:
    """The call as it is, by heed's engine."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    mask = call.allowed() if call.causal and queries != keys else call.mask
    pattern = Causal() if call.causal and mask is None else Full()
    out = attend(call.query, call.key, call.value, pattern, bias=_as_bias(mask), scale=call.scale, dropout=call.dropout)
    return out.transpose(1, 2)


def attention_weights(call: AttentionCall) -> Float[Tensor, "B H Q K"]:
    """softmax(scale q k^T + mask), in float32 and then in the dtype of the queries; rows with no key are 0."""
    if call.options.get("s_aux") is not None:
        raise ValueError("the host has learned attention sinks (s_aux), for which heed forms no weights")
    scores = call.query @ repeat_heads(call.key, call.query.shape[1]).transpose(-2, -1) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.float()
    allowed = call.allowed()
    if call.mask is not None and call.mask.dtype != torch.bool:
        scores = scores + call.mask
    if allowed is not None:
        # The lowest finite value instead of -inf, so that a row with no key has no NaN in its gradient.
        scores = scores.masked_fill(~allowed, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1)
    if allowed is not None:
        weights = weights * allowed.any(-1, keepdim=True)
    return weights.to(call.query.dtype)


def repeat_heads(x: Float[Tensor, "B G K D"], heads: int) -> Float[Tensor, "B H K D"]:
    """Keys or values of grouped-query heads, one for every query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _as_bias(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)

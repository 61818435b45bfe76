"""BLOOM's attention with rules: transformers computes it in place, with ALiBi, and not through its attention interface.

scores = q k^T / sqrt(D) + l_h position(k) + mask         l_h the head's slope; what is the same for all keys is left out
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from heed.hosts.rules import AttentionCall, Rules, run_rules


def is_bloom(layer: nn.Module) -> bool:
    """Whether an attention layer is BLOOM's."""
    return type(layer).__name__ == "BloomAttention"


def bloom_forward(layer: Any, rules: Rules) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The forward of transformers' `BloomAttention` with rules; its biases and mask are one additive mask (B, H, Q, K)."""

    def forward(
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = layer._reshape(layer.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, layer.layer_idx)
        bias = alibi.view(len(query), layer.num_heads, 1, -1)
        call = AttentionCall(
            layer,
            rules.layer,
            query,
            key,
            value,
            (bias if attention_mask is None else bias + attention_mask).expand(-1, -1, query.shape[2], -1),
            causal=False,
            scale=layer.inv_norm_factor,
            dropout=layer.attention_dropout.p if layer.training else 0.0,
        )
        out, weights = run_rules(call, rules)
        y = nn.functional.dropout(layer.dense(out.flatten(2)), layer.hidden_dropout, layer.training)
        return residual + y, weights

    return forward

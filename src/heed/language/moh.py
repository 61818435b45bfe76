"""Turns a pre-trained LLaMA-like model into Mixture-of-Head attention without new parameters (card 27).

    s_i = |q_i|                             norm of the token's query in head i = shared ... heads - 1, (B, N, E)
    p = softmax(s / std(s)),  m = top-k(p)  k = int(heads * (active - shared fraction))
    g = [1, m]                              gates 0 or 1; the gradient takes them for p in training (straight-through)
    y = [g_1 o_1, ..., g_h o_h] W_O         o_i (B, N, d) output of head i, before the model's own projection

Rotary embedding turns queries without changing their norms, so the router reads those that reach the attention. Keys,
values, caches and weights stay as they are. Jin et al., "MoH", ICML 2025, arXiv 2410.11842; the training code of their
language models was not released: straight-through gradients and the load-balance loss follow the paper's text.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.attach import attach_rule, attention_layers
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.layers.moh import Router, Routing, gated_heads, top_mask
from heed.methods import Handle, Method, apply

# The variance of the norms where all are equal: the softmax is then even, and its gradient finite.
_LEAST_VARIANCE = 1e-12


@provides("27-moh")
class QueryNormRouter(Router):
    """Gates from the norms of the queries; it has no parameters. See `Router` for the arguments."""

    def norms(self, query: Float[Tensor, "B h N d"]) -> Float[Tensor, "B N E"]:
        """What the heads that are not shared compete with, in float32."""
        return query[:, self.shared :].float().norm(dim=-1).transpose(1, 2)

    def forward(self, query: Float[Tensor, "B h N d"], straight_through: bool = False) -> Routing:
        """Gates 0 or 1 for queries with or without rotary embedding.

        Args:
            query: (B, heads, N, head_dim).
            straight_through: let the gradient of the gates flow to the softmax of the norms.
        """
        norms = self.norms(query)
        variance = norms.var(-1, correction=min(1, norms.shape[-1] - 1), keepdim=True)
        probs = (norms / variance.clamp(min=_LEAST_VARIANCE).sqrt()).softmax(-1)
        mask = top_mask(norms, self.routed)
        chosen = mask.to(probs.dtype)
        if straight_through:
            chosen = chosen + (probs - probs.detach())
        gates = torch.cat([chosen.new_ones(*chosen.shape[:2], self.shared), chosen], -1)
        return Routing(gates, probs, mask)


@provides("27-moh")
@dataclass(frozen=True)
class QueryNormMoH(Method):
    """Mixture-of-Head attention with query-norm routing on a transformers model; `convert_to_moh` applies it.

    The handle's `state` is a `ModuleList` of the layers' routers: what `collect_balance` and `active_heads` take.

    Args:
        shared: fraction of the heads, the first ones, that every token uses.
        active: fraction of the heads that a token uses; both are rounded down to whole heads.
    """

    shared: float = 0.5
    active: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.shared <= self.active <= 1 or self.active == 0:
            raise ValueError(f"shared={self.shared} and active={self.active} must satisfy 0 <= shared <= active <= 1")

    def heads(self, total: int) -> tuple[int, int]:
        """(shared, routed) whole heads of `total`."""
        tiny = 1e-6  # so that 10 * (0.7 - 0.5) is 2
        return int(total * self.shared + tiny), int(total * (self.active - self.shared) + tiny)

    def attach(self, host: nn.Module, handle: Handle) -> nn.ModuleList:
        found = attention_layers(host)
        for layer in found:
            if not (hasattr(layer, "q_proj") and hasattr(layer, "o_proj")):
                raise ValueError(
                    f"{type(layer).__name__} has no q_proj and o_proj: only LLaMA-like attention is converted. Of a "
                    "model with several parts, pass the language model"
                )
        routers = nn.ModuleList(QueryNormRouter(h, *self.heads(h)) for h in map(_query_heads, found))
        if any(hasattr(layer, "q_norm") for layer in found):
            warnings.warn(
                f"{type(found[0]).__name__} normalises its queries: their norms hardly depend on the token, so nearly "
                "all tokens are given the same heads",
                stacklevel=4,
            )
        if any(router.routed == 0 for router in routers):  # type: ignore[union-attr]
            warnings.warn(
                f"active={self.active} leaves no routed heads beside shared={self.shared}: tokens use the first heads "
                "alone; raise active",
                stacklevel=4,
            )
        attach_rule(host, _GateHeads(list(routers)), handle)  # type: ignore[arg-type]
        return routers


class _GateHeads(AttentionRule):
    """Gates every layer's heads with the layer's router."""

    def __init__(self, routers: Sequence[QueryNormRouter]) -> None:
        self.routers = routers

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        routing = self.routers[call.layer](call.query, straight_through=call.module.training)
        return gated_heads(out, routing.gates)


def _query_heads(layer: nn.Module) -> int:
    return layer.q_proj.out_features // layer.head_dim  # type: ignore[union-attr,operator]


@provides("27-moh")
def convert_to_moh(model: nn.Module, shared: float = 0.5, active: float = 0.75) -> Handle:
    """Let every token of a pre-trained LLaMA-like model use only some of its heads.

        handle = convert_to_moh(model)
        with collect_balance(handle.state) as balance:
            loss = model(ids, labels=ids).loss + 0.01 * balance.loss()
        handle.remove()

    Generation, caches, saving and loading work as before: no weight is added or changed. All heads are still computed; the
    quality of a smaller number of heads is what can be tuned and measured here.

    Args:
        model: of transformers, with q_proj and o_proj in its attention (Llama, Mistral, Qwen2 and others).
        shared, active: fractions of the heads, see `QueryNormMoH`.

    Returns:
        A handle; `handle.remove()` undoes the conversion.

    Raises:
        ValueError: fractions out of order, or attention without q_proj and o_proj.
        TypeError: a model whose attention cannot be reached.
    """
    return apply(model, QueryNormMoH(shared, active))

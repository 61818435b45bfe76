"""Watching and gating heads of a live model: nothing of it is kept, and nothing of its weights is touched.

    A[l] = softmax(scale q k^T + mask)      (B, H, N, N), handed on as it is formed
    out  = gamma[l, h] * (A V)[h]           before the output projection, whose bias stays

A gate acts on a head's output, not on its weights, so it can be opened again. The method follows Li et al., "How Does
Attention Work in Vision Transformers? A Visual Analytics Attempt" (TVCG 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.explain.vit import count_heads
from heed.hosts.attach import attach_rule, attention_layers
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.methods import Handle, Method

# (number of the layer, weights (B, H, Q, K)): what is called for every layer of every batch.
See = Callable[[int, Tensor], None]


@provides("51-vit-analytics")
class WatchAttention(Method):
    """Hands the attention weights of every layer to a function, which should take from them what it needs at once.

        with heed.apply(model, WatchAttention(lambda layer, weights: ...)):
            model(images)

    Args:
        see: called as see(layer, weights) with layer from 0 and weights (B, H, Q, K), detached.
    """

    def __init__(self, see: See) -> None:
        self.see = see

    def attach(self, host: nn.Module, handle: Handle) -> None:
        attach_rule(host, _Watching(self.see), handle)


@provides("51-vit-analytics")
class HeadGate(Method):
    """Switches heads off, or scales their outputs, until removed.

        with heed.apply(model, HeadGate([(3, 0), (3, 5)])) as handle:     # heads 0 and 5 of layer 3 are off
            model(images)
            handle.state[3, 0] = 1                                        # and one of them is on again

    `handle.state` is the tensor of gates, which may be changed while it is applied.

    Args:
        off: pairs (layer, head) to switch off, both from 0.
        gates: (L, H) factors, or (L, B, H) for one factor per image of the batch; default ones. May require gradients.

    Raises:
        IndexError: a layer or head the model does not have; says which it has.
        ValueError: gates of another shape.
    """

    def __init__(self, off: Iterable[tuple[int, int]] = (), *, gates: Tensor | None = None) -> None:
        self.off = tuple(off)
        self.gates = gates

    def attach(self, host: nn.Module, handle: Handle) -> Tensor:
        counts = [count_heads(layer) for layer in attention_layers(host)]
        gates = self.gates
        if gates is None:
            device = next((p.device for p in host.parameters()), None)
            gates = torch.ones(len(counts), max(counts), device=device)
        elif gates.ndim not in (2, 3) or (gates.shape[0], gates.shape[-1]) != (len(counts), max(counts)):
            raise ValueError(
                f"gates of shape {tuple(gates.shape)} do not fit {len(counts)} layers of {max(counts)} heads; give "
                "(L, H), or (L, B, H) for a factor per image"
            )
        for layer, head in self.off:
            check_head(layer, head, counts)
            gates[layer, ..., head] = 0
        attach_rule(host, _Gating(gates), handle)
        return gates


def check_head(layer: int, head: int, heads: list[int]) -> None:
    """IndexError with the valid range for a layer or head that is not there; heads[l] is the number in layer l."""
    if not 0 <= layer < len(heads):
        raise IndexError(f"layer {layer}: layers are numbered 0 to {len(heads) - 1}")
    if not 0 <= head < heads[layer]:
        raise IndexError(f"head {head}: heads of layer {layer} are numbered 0 to {heads[layer] - 1}")


class _Watching(AttentionRule):
    def __init__(self, see: See) -> None:
        self.see = see

    def weights(self, call: AttentionCall, weights: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        self.see(call.layer, weights.detach())
        return weights


class _Gating(AttentionRule):
    def __init__(self, gates: Tensor) -> None:
        self.gates = gates

    def after(self, call: AttentionCall, out: Float[Tensor, "B Q H E"]) -> Float[Tensor, "B Q H E"]:
        gate = self.gates[call.layer][..., : out.shape[2]].to(out.dtype)  # (H,) or (B, H)
        return out * (gate[:, None, :, None] if gate.ndim == 2 else gate[:, None])

"""Mixture-of-Head attention in diffusers' DiT transformers (card 27): an attention processor with a router of its own.

    y = sum_i g_i(x) H_i(x) W_O^i       H_i, W_O: those of the block; g: the processor's `MoHRouter`, (B, N, heads)

Jin, Zhu, Yuan, Yan, "MoH", ICML 2025, arXiv 2410.11842. diffusers' blocks have heads of equal number and a width of
heads * head_dim; the authors' models, whose layers differ, are `heed.vision.dit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.moh import MoHRouter, attend_gated


@provides("27-moh")
class MoHAttnProcessor(nn.Module):
    """Attention processor for self-attention, e.g. `transformer_blocks[i].attn1.set_processor(MoHAttnProcessor(...))`.

    As a module it becomes part of the transformer: its `router` is trained and saved with it, and
    `heed.layers.moh.collect_balance` and `active_heads` find it.

    Args:
        dim: channels of the tokens.
        heads, shared, routed: as in `heed.layers.moh.Router`.
        gather: as in `heed.layers.moh.attend_gated`.

    Raises:
        ValueError: heads that do not fit; when called, another number of heads, a mask, or cross-attention.
    """

    def __init__(self, dim: int, heads: int, shared: int, routed: int, gather: bool | None = None) -> None:
        super().__init__()
        self.router = MoHRouter(dim, heads, shared, routed)
        self.gather = gather

    def forward(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "B N C"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B N C"]:
        """As diffusers calls it."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("only self-attention without a mask has Mixture-of-Head attention here")
        if attn.heads != self.router.heads:
            raise ValueError(f"the attention has {attn.heads} heads, its processor heads={self.router.heads}")
        routing = self.router(hidden_states)
        q, k, v = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        y = attend_gated(q, k, v, routing, self.router.active, scale=attn.scale, gather=self.gather)
        return attn.to_out[1](attn.to_out[0](y.flatten(2)))


@provides("27-moh")
def moh_dit(transformer: Any, shared: int | Sequence[int], routed: int | Sequence[int]) -> None:
    """Give the self-attention of every block of a `DiTTransformer2DModel` Mixture-of-Head attention.

    Weights stay; routers are new and train. `attn1.set_processor(AttnProcessor2_0())` brings a block back.

    Args:
        transformer: of diffusers, with `transformer_blocks`.
        shared, routed: heads that all tokens use and that a token chooses; one number, or one per block.

    Raises:
        ValueError: no blocks, heads that do not fit, or lists of another length than the blocks.
    """
    blocks = getattr(transformer, "transformer_blocks", None)
    if blocks is None:
        raise ValueError(f"{type(transformer).__name__} has no transformer_blocks; pass a DiTTransformer2DModel")
    lists = [[heads] * len(blocks) if isinstance(heads, int) else list(heads) for heads in (shared, routed)]
    if any(len(heads) != len(blocks) for heads in lists):
        raise ValueError(
            f"shared has {len(lists[0])} entries, routed {len(lists[1])}; the transformer has {len(blocks)} blocks"
        )
    for block, *heads in zip(blocks, *lists, strict=True):
        attn = block.attn1
        processor = MoHAttnProcessor(attn.to_q.in_features, attn.heads, *heads)
        attn.set_processor(processor.to(attn.to_q.weight))

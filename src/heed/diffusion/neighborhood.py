"""Neighborhood attention in diffusers' Flux transformers (card 13): image tokens look at their neighbourhood and the text.

    image:  out_i = softmax over {window(i)} and {text}       text:  out_t = softmax over {text} and {image}

The windows of the image tokens and the text tokens are two attentions joined by their logsumexp
(`heed.layers.natten.na2d` with additional keys), so the cost is linear in the image tokens. Stride makes runs of tokens
share a window. Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.engine.patterns import Neighborhood
from heed.layers.natten import attention, na2d


@provides("13-fna")
class NeighborhoodFluxProcessor:
    """Attention processor for `FluxTransformer2DModel.set_attn_processor`.

    Args:
        grid: rows and columns of image tokens: latent height and width over the transformer's patches (pixels / 16).
        kernel_size: window per axis; one as large as the grid gives Flux's own attention.
        stride: tokens that share a window, per axis.
        dilation: step between the keys of a window, per axis.

    Raises:
        ValueError: settings that do not fit the grid; when called, tokens that are fewer than the grid's, an attention
            mask, or fused projections.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
    ) -> None:
        windows = Neighborhood(grid, kernel_size, dilation, stride)
        self.grid, self.kernel_size = windows.grid, windows.kernel
        self.stride, self.dilation = windows.stride, windows.dilation

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "B N C"],
        encoder_hidden_states: Float[Tensor, "B T C"] | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers calls it: text and image apart in the first blocks, text before image in the later ones."""
        if attention_mask is not None:
            raise ValueError("attention_mask is not supported: the windows say what each token sees")
        if attn.fused_projections:
            raise ValueError("fused projections are not supported; call transformer.unfuse_qkv_projections() first")
        q, k, v = self._projected(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            q, k = (cast(Tensor, apply_rotary_emb(x, image_rotary_emb, sequence_dim=1)) for x in (q, k))
        y = self._attend(q, k, v).flatten(2)
        if encoder_hidden_states is None:
            return y
        text, image = y.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, tokens, heads, width), text first, with the block's own projections and norms."""
        split = (-1, attn.head_dim)
        q, k, v = (layer(image).unflatten(-1, split) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if text is None:
            return q, k, v
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        tq, tk, tv = (layer(text).unflatten(-1, split) for layer in added)
        tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
        return torch.cat([tq, q], 1), torch.cat([tk, k], 1), torch.cat([tv, v], 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = self.grid[0] * self.grid[1]
        texts = q.shape[1] - tokens
        if texts < 0:
            raise ValueError(f"{q.shape[1]} tokens given, fewer than the {tokens} image tokens of grid={self.grid}")
        iq, ik, iv = (x[:, texts:].unflatten(1, self.grid) for x in (q, k, v))
        extra = (k[:, :texts], v[:, :texts]) if texts else (None, None)
        image = na2d(iq, ik, iv, self.kernel_size, self.stride, self.dilation, False, None, *extra)
        image = cast(Tensor, image).flatten(1, 2)
        return torch.cat([cast(Tensor, attention(q[:, :texts], k, v)), image], 1) if texts else image

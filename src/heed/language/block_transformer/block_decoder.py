"""The block decoder: attention over whole blocks, one position (or n) per L tokens (card 15).

    h = GPT-NeoX(e)        e, h (B, N n, D_b);  position i sees the groups of n up to its own, without padding blocks

Positions count from 0 whatever is padding: rotary positions only matter by their differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.language.block_transformer.config import BlockTransformerConfig
from heed.language.block_transformer.neox import Stepper, causal_mask, neox_stack

if TYPE_CHECKING:
    from transformers import GPTNeoXModel


@provides("15-block-transformer")
class BlockDecoder(nn.Module):
    """Block embeddings (B, N, n, D_b) to (B, N n, D_b), of which block i's predict block i + 1."""

    gpt_neox: GPTNeoXModel

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__()
        self.gpt_neox = neox_stack(
            config.vocab_size,
            config.block_width,
            config.block_layers,
            config.heads("block"),
            config.block_rotary_pct,
            config.dropout,
        )

    def forward(self, embeddings: Float[Tensor, "B N n D"], block_mask: Tensor | None = None) -> Float[Tensor, "B M D"]:
        """States after the final norm.

        Args:
            embeddings: (B, N, n, D_b).
            block_mask: (B, N), 0 for blocks of padding only.
        """
        n = embeddings.shape[2]
        mask = None
        padded = block_mask is not None and not bool((block_mask != 0).all())
        if padded or n > 1:
            keep = torch.ones(embeddings.shape[:2], device=embeddings.device) if block_mask is None else block_mask
            keep = (keep != 0).repeat_interleave(n, 1)
            mask = causal_mask(keep, keep.shape[1], n, embeddings)
        return self.gpt_neox(
            inputs_embeds=embeddings.flatten(1, 2), attention_mask=mask, use_cache=False
        ).last_hidden_state

    def stepper(self, blocks: int) -> Stepper:
        """What decodes block after block while generating, with room for `blocks`."""
        return Stepper(self.gpt_neox, blocks)

"""What keys and values of a sequence cost, in a Block Transformer and in a vanilla decoder (card 15).

    block    2 layers_b D_b n ceil(T / L) + 2 layers_t D_t (r n + L - 1)      numbers for T tokens
    vanilla  2 layers D T

The paper writes r + L for the token decoder's part: the last token of a block never needs keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heed.catalogue import provides
from heed.language.block_transformer.config import BlockTransformerConfig


@provides("15-block-transformer")
@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence: `blocks` of the block decoder, `tokens` of the token decoder, which do not grow."""

    blocks: int
    tokens: int

    @property
    def total(self) -> int:
        return self.blocks + self.tokens


@provides("15-block-transformer")
def cache_bytes(config: BlockTransformerConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> CacheBytes:
    """Keys and values of a sequence of `tokens` tokens in a Block Transformer.

    Args:
        config: of the model.
        tokens: T, prompt and generated.
        dtype: of keys and values.
    """
    c = config
    positions = -(-tokens // c.block_length) * c.n_embedding_tokens
    local = c.block_length + c.conditions - (1 if c.strategy == "prefix" else 0)
    if c.strategy == "summation":
        local = c.block_length
    size = 2 * dtype.itemsize
    return CacheBytes(size * c.block_layers * c.block_width * positions, size * c.token_layers * c.token_width * local)


@provides("15-block-transformer")
def vanilla_cache_bytes(layers: int, width: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Keys and values of a sequence in a decoder with as many key-value heads as heads."""
    return 2 * layers * width * tokens * dtype.itemsize

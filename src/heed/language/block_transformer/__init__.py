"""Block Transformer (card 15): language models that attend to blocks of tokens globally, and to tokens inside a block only.

    embedder  (B, N, L) -> (B, N, n, D_b)      block decoder  -> (B, N n, D_b)      token decoder  -> (B, N - 1, L, V)

`model.py` has the model and its losses, `config.py` the paper's configurations, `generate.py` generation, `packing.py`
documents in blocks, `uptrain.py` a block model out of a vanilla one, `memory.py` what the caches cost. Ho et al., "Block
Transformer: Global-to-Local Language Modeling for Fast Inference", NeurIPS 2024, arXiv 2406.02657.
"""

from heed.language.block_transformer.block_decoder import BlockDecoder
from heed.language.block_transformer.config import CONFIGS, BlockTransformerConfig
from heed.language.block_transformer.memory import CacheBytes, cache_bytes, vanilla_cache_bytes
from heed.language.block_transformer.model import BlockTransformer, BlockTransformerOutput
from heed.language.block_transformer.neox import vanilla
from heed.language.block_transformer.packing import Blocks, pack_documents, to_blocks
from heed.language.block_transformer.uptrain import from_vanilla

__all__ = [
    "CONFIGS",
    "BlockDecoder",
    "BlockTransformer",
    "BlockTransformerConfig",
    "BlockTransformerOutput",
    "Blocks",
    "CacheBytes",
    "cache_bytes",
    "from_vanilla",
    "pack_documents",
    "to_blocks",
    "vanilla",
    "vanilla_cache_bytes",
]

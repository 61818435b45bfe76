"""SinkLoRA (card 70): long-context fine-tuning with LoRA under attention in groups, and full attention afterwards.

    o_i = softmax over { j <= i : group(j) = group(i), or j < sinks } of scale q_i k_j^T, times v_j

The first heads have groups [jG, (j + 1)G), the others groups that lie half a group further. `patterns.py` has the groups as
patterns, `attention.py` attention under them, `method.py` the methods for language models, `recipe.py` the LoRA recipe,
`chat.py` the data format of its chat models. What the paper uses while generating is in `heed.language.h2o`.

Zhang, "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", 2024, arXiv 2406.05678,
on top of Chen et al., "LongLoRA", ICLR 2024, arXiv 2309.12307.
"""

from heed.language.sinklora.attention import grouped_attention, visible_pairs
from heed.language.sinklora.chat import IGNORED, chat_batch, chat_example
from heed.language.sinklora.method import S2Attention, SFAttention
from heed.language.sinklora.patterns import HeadGroups, Segments, Sinks
from heed.language.sinklora.recipe import LoRARecipe, extended_config, load_adapter, rope_factor, save_adapter

__all__ = [
    "IGNORED",
    "HeadGroups",
    "LoRARecipe",
    "S2Attention",
    "SFAttention",
    "Segments",
    "Sinks",
    "chat_batch",
    "chat_example",
    "extended_config",
    "grouped_attention",
    "load_adapter",
    "rope_factor",
    "save_adapter",
    "visible_pairs",
]

"""Retrieval heads for the tests of this room, whatever the model."""

from __future__ import annotations

from typing import Any

import torch

from heed.language.razor import RetrievalHeads


def some_heads(model: Any) -> RetrievalHeads:
    """Every second key-value head, counted through all layers and one further in every other layer."""
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    at = torch.arange(config.num_hidden_layers)[:, None] + torch.arange(kv_heads)
    return RetrievalHeads.of(at % 2 == 1)

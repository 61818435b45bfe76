"""Tiny random decoders of transformers, and prompts with padding on the left, for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {"vocab_size": 37, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

# Full attention in every layer, except for Gemma, where the first has a sliding window.
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**SIZES),
    "mistral": lambda: t.MistralConfig(**SIZES, sliding_window=None),
    "qwen3": lambda: t.Qwen3Config(**SIZES),
    "gemma3": lambda: t.Gemma3TextConfig(
        **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: t.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2, pad_token_id=0),
}


def decoder(name: str) -> Any:
    """A decoder, always with the same weights."""
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(DECODERS[name](), attn_implementation="sdpa").eval()


def prompt(batch: int = 2, tokens: int = 23) -> Tensor:
    """(batch, tokens) without padding."""
    return torch.randint(3, 37, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def padded(ids: Tensor, padding: list[int]) -> dict[str, Tensor]:
    """Inputs of a model, with the first `padding[i]` tokens of row i masked out, and positions that count the others."""
    keep = torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]
    return {
        "input_ids": ids * keep,
        "attention_mask": keep.long(),
        "position_ids": (keep.cumsum(1) - 1).clamp(min=0),
    }


GREEDY: dict[str, Any] = {"max_new_tokens": 11, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def steps(model: Any, cache: Any, inputs: dict[str, Tensor], new: Tensor) -> Tensor:
    """Logits of the prompt's last token and of each token of `new` (B, S), given one by one: (B, 1 + S, V)."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    logits = [model(**inputs, past_key_values=cache).logits[:, -1:]]
    for i in range(new.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        at = mask.sum(1, keepdim=True) - 1
        logits.append(model(new[:, i : i + 1], attention_mask=mask, position_ids=at, past_key_values=cache).logits)
    return torch.cat(logits, 1)

"""Key-driven grouped-query attention (card 46) in transformers' models: fewer key-value heads, shared unevenly.

    W_k, W_v (H d, C) -> (G d, C), the mean over contiguous groups of H / G heads
    y_h = softmax(q_h k_g^T / sqrt(d)) v_g,   the first a_0 query heads have g = 0, the next a_1 have g = 1, ...

A causal model gets its allocation a once, from the key norms on calibration batches, and keeps it: the paper's rule looks
at the keys of all tokens, so that with a cache the allocation would change between steps, and generation would differ
from one pass over the whole text. That a language model is converted at all is heed's own extension; the paper has
vision transformers alone. Those are allocated anew at every forward pass here, as in the paper.

Khan et al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", 2024 (arXiv 2408.08454).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.constants import kept
from heed.errors import MissingExtra
from heed.hosts.rules import AttentionCall, plain_attention
from heed.layers.allocation import key_driven_allocation, key_norms, uniform_allocation
from heed.layers.grouped import pool_heads

NAME = "heed_kdgqa"  # in transformers' AttentionInterface
_SETTING = "kdgqa_allocation"  # of the model's config: a list of G counts per layer, or None for every pass anew


@provides("46-kdgqa")
def register_attention() -> str:
    """Make "heed_kdgqa" known to transformers, with boolean masks; returns that name.

    Call it before loading a converted model, whose config.json asks for this attention: without it transformers refuses.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


@provides("46-kdgqa")
def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention layer; its config has the allocations, see `group_kv_heads`.
        query: (B, H, N, d).
        key, value: (B, G, M, d), the cache's included.
        attention_mask: bool, True where attention is allowed, or added to the scores; broadcasts to (B, H, N, M).
        scaling: factor on q k^T, default d ** -0.5.
        dropout: on the weights.
        is_causal: in the place of the layer's own; only without a mask.
        options: what else transformers passes; not needed here.

    Returns:
        (B, N, H, d), and None for the weights.
    """
    heads, n = query.shape[1], query.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    allocations = getattr(module.config, _SETTING)
    if allocations is None:
        owner = torch.repeat_interleave(key_driven_allocation(key_norms(key), heads), output_size=heads)
    else:
        owner = _owner(tuple(allocations[module.layer_idx]), key.device)
    call = AttentionCall(
        module,
        0,
        query,
        key.index_select(1, owner),
        value.index_select(1, owner),
        attention_mask,
        causal=causal and attention_mask is None and n > 1,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )
    return plain_attention(call).contiguous(), None


@kept
def _owner(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Key-value head of every query head, (H,)."""
    return torch.repeat_interleave(torch.tensor(counts, device=device))


@provides("46-kdgqa")
def group_kv_heads(
    model: Any,
    num_kv_heads: int,
    batches: Iterable[Tensor | Mapping[str, Tensor]] | None = None,
    *,
    pool: str = "mean",
) -> list[list[int]] | None:
    """Give a transformers model fewer key-value heads, in place, and share them by the norms of its keys.

    Models with separate q_proj, k_proj and v_proj are taken: Llama and its like, ViT. Save and load the model
    as ever, after `register_attention` in a new process. It has to be trained further to be good again.

    Args:
        model: a transformers model.
        num_kv_heads: G for every layer; must divide the key-value heads there are.
        batches: to calibrate a causal model: token ids (B, N), or dicts with input_ids and, where there is padding,
            attention_mask. Each passes with the allocation that its own keys ask for; the norms of all of them together
            give the one that stays. None shares evenly. Models that are not causal take none.
        pool: see `heed.layers.grouped.pool_heads`.

    Returns:
        Query heads per key-value head in every layer; None for a model that is allocated at every forward pass.

    Raises:
        ValueError: no such layers, norms of keys, cross-attention, heads that do not fit, or no batch where some are due.
    """
    register_attention()
    layers: list[Any] = [module for module in model.modules() if _is_attention(module)]
    if not layers or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has no self-attention with q_proj, k_proj and v_proj alone; Llama, Mistral, Qwen2 "
            "and ViT have"
        )
    normed = [type(layer).__name__ for layer in layers if hasattr(layer, "k_norm")]
    if normed:
        raise ValueError(f"{normed[0]} norms its keys after the projection; pooled projections would not be its own")
    causal = bool(layers[0].is_causal)
    if batches is not None and not causal:
        raise ValueError(
            f"{type(model).__name__} is not causal and is allocated at every forward pass; give no batches"
        )
    query_heads = [layer.q_proj.out_features // layer.head_dim for layer in layers]
    new = [
        [_pooled(part, layer.head_dim, num_kv_heads, pool) for part in (layer.k_proj, layer.v_proj)] for layer in layers
    ]
    for layer, heads, (k_proj, v_proj) in zip(layers, query_heads, new, strict=True):
        layer.k_proj, layer.v_proj = k_proj, v_proj
        layer.num_key_value_groups = heads // num_kv_heads
        if hasattr(layer.config, "num_key_value_heads"):
            layer.config.num_key_value_heads = num_kv_heads
    config = layers[0].config
    even = [uniform_allocation(heads, num_kv_heads).tolist() for heads in query_heads]
    setattr(config, _SETTING, even if causal else None)
    # Saved with the model, so that it cannot be loaded with attention that would share the heads evenly.
    config.attn_implementation = NAME
    model.set_attn_implementation(NAME)
    if batches is not None:
        setattr(config, _SETTING, _calibrated(model, layers, query_heads, batches))
    return getattr(config, _SETTING)


def _is_attention(module: nn.Module) -> bool:
    parts = (getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    return all(isinstance(part, nn.Linear) for part in parts) and hasattr(module, "is_causal")


def _pooled(linear: nn.Linear, head_dim: int, num_kv_heads: int, pool: str) -> nn.Linear:
    heads = linear.out_features // head_dim
    state = {name: pool_heads(value, heads, num_kv_heads, pool) for name, value in linear.state_dict().items()}
    new = nn.Linear(linear.in_features, num_kv_heads * head_dim, linear.bias is not None)
    new.load_state_dict(state)
    return new.to(linear.weight.device, linear.weight.dtype)


@torch.no_grad()
def _calibrated(
    model: Any, layers: list[Any], query_heads: list[int], batches: Iterable[Tensor | Mapping[str, Tensor]]
) -> list[list[int]]:
    """Allocations from the norms of all batches together."""
    totals: list[Tensor] | None = None
    for batch in batches:
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        with _measured(layers, query_heads, inputs.get("attention_mask")) as norms:
            model.base_model(**inputs, use_cache=False)
        totals = norms if totals is None else [a + b for a, b in zip(totals, norms, strict=True)]
    if totals is None:
        raise ValueError("batches is empty; give at least one to calibrate on, or None to share evenly")
    return [key_driven_allocation(n, heads).tolist() for n, heads in zip(totals, query_heads, strict=True)]


@contextmanager
def _measured(layers: list[Any], query_heads: list[int], mask: Tensor | None) -> Iterator[list[Tensor]]:
    """Inside the `with`, each layer is allocated by the keys of the batch that passes; collects the norms per layer.

    The norms are taken before RoPE, which leaves them as they are. Padding does not count.
    """
    norms: list[Tensor] = []

    def watch(number: int) -> Any:
        def hook(_: nn.Module, __: object, keys: Tensor) -> None:
            layer = layers[number]
            if mask is not None:
                keys = keys * mask[..., None]
            norms.append(key_norms(keys.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)))
            counts = key_driven_allocation(norms[-1], query_heads[number])
            getattr(layer.config, _SETTING)[layer.layer_idx] = counts.tolist()

        return hook

    hooks = [layer.k_proj.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()

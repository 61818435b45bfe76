"""ZipCache in a small Llama against the authors' patched model, prompt and generation."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import heed
from heed.checkpoint import load_weights
from heed.language.caches.layer import CompressedCache
from heed.language.quantise import Grouping
from heed.language.zipcache import ZipCache

_KEYS: dict[str, Grouping] = {"mixed_channelwiseQ": "channel"}
_VALUES: dict[str, Grouping] = {"channel_separate_mixed_tokenwiseQ": "channel-separable"}


def run(case: Case) -> dict[str, Tensor]:
    if case.kind != "llama_generate":
        raise ValueError(f"unknown kind {case.kind!r}")
    c = case.config
    config = LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
        rms_norm_eps=c["rms_norm_eps"],
    )
    model = LlamaForCausalLM(config).eval()
    load_weights(model, case.state, case.name)
    method = ZipCache(
        salient_bits=c["quantize_bit_important"],
        regular_bits=c["quantize_bit_unimportant"],
        regular=c["k_unimportant_ratio"],
        gap=c["streaming_gap"],
        keys=_KEYS[c["compress_mode"]],
        values=_VALUES[c["v_compress_mode"]],
        value_salient_bits=c["v_quantize_bit_important"],
        value_regular_bits=c["v_quantize_bit_unimportant"],
        value_regular=c["v_unimportant_ratio"],
        shared_parameters=True,
        random_rows=case.group("rand")["probe_random_ids"],
    )
    ids, prompt = case.inputs["ids"].long(), c["prompt"]
    results: dict[str, Tensor] = {}
    with torch.no_grad(), heed.apply(model, method) as handle:
        cache = handle.state.cache()
        results["output.prefill_logits"] = model(ids[:, :prompt], past_key_values=cache).logits
        results |= _prompt(cache)
        steps = range(prompt, prompt + c["decode_steps"])
        logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in steps]
        results["output.decode_logits"] = torch.cat(logits, 1)
        layers: list[Any] = cache.layers
        for i, layer in enumerate(layers):
            results[f"output.unimportant_ids_final.{i}"] = layer.held.keys.ids.sort(-1).values
    return results


def _prompt(cache: CompressedCache) -> dict[str, Tensor]:
    """What the cache holds after the prompt."""
    layers: list[Any] = cache.layers
    results = {f"output.unimportant_ids.{i}": layer.held.keys.ids.sort(-1).values for i, layer in enumerate(layers)}
    held = layers[0].held
    for name, store in (("k", held.keys), ("v", held.values)):
        results[f"output.{name}_unimportant_order.0"] = store.ids
        results[f"output.{name}_q_important.0"] = store.salient.packed
        results[f"output.{name}_q_unimportant.0"] = store.regular.packed
        results[f"output.{name}_dequant.0"] = store.dequantise()
    return results

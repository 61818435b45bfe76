"""Key-driven groups in transformers' models, driven through transformers' own API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from heed.language.grouped import NAME, group_kv_heads
from heed.layers.allocation import key_driven_allocation, key_norms

EXACT: Any = {"rtol": 1e-4, "atol": 1e-5}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}


def llama(kv_heads: int = 8, **options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=kv_heads, **options)).eval()


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, 64, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def generate(model: Any, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy continuation (B, N + 6) and the scores of its new tokens (B, 6, vocabulary)."""
    found = model.generate(
        tokens,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **options,
    )
    return found.sequences, torch.stack(found.logits, 1)


def test_generating_with_a_cache_equals_the_full_pass() -> None:
    model = llama()
    counts = group_kv_heads(model, 4, [ids(2, 12), ids(3, 9)])
    assert counts is not None
    assert [sum(row) for row in counts] == [8, 8]
    assert any(len(set(row)) > 1 for row in counts)
    sequences, scores = generate(model, ids(2, 11))
    torch.testing.assert_close(model(sequences).logits[:, 10:-1], scores, **EXACT)
    torch.testing.assert_close(generate(model, ids(2, 11), use_cache=False)[1], scores, **EXACT)


def test_left_padding_changes_nothing() -> None:
    model = llama()
    group_kv_heads(model, 4, [ids(2, 12)])
    tokens = ids(1, 7)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    scores = generate(model, padded, attention_mask=(padded > 0).long())[1]
    torch.testing.assert_close(scores, generate(model, tokens)[1], **EXACT)


def test_the_cache_is_smaller_by_g_over_h() -> None:
    model, sizes = llama(), []
    for heads in (8, 2):
        if heads < 8:
            group_kv_heads(model, heads)
        cache = model(ids(2, 12), use_cache=True).past_key_values
        sizes.append(sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers))
    assert sizes[1] * 8 == sizes[0] * 2


@pytest.mark.parametrize("before", [8, 4])
def test_even_sharing_is_transformers_own(before: int) -> None:
    """Without batches the groups are even, and transformers' own grouped attention gives the same."""
    model, tokens = llama(before), ids(2, 9)
    assert group_kv_heads(model, 2) == [[4, 4]] * 2
    y = model(tokens).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(tokens).logits, y, **EXACT)


def test_as_many_heads_as_before_change_nothing() -> None:
    model, tokens = llama(attention_bias=True), ids(2, 9)
    y = model(tokens).logits
    group_kv_heads(model, 8)
    torch.testing.assert_close(model(tokens).logits, y, **EXACT)


def test_one_batch_gives_the_papers_allocation() -> None:
    """The first layer's keys on the calibration batch, padding left out."""
    model, tokens = llama(), ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    counts = group_kv_heads(model, 4, [{"input_ids": tokens, "attention_mask": mask}])
    assert counts is not None
    first = model.model.layers[0]
    keys = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(tokens))) * mask[..., None]
    norms = key_norms(keys.unflatten(-1, (4, 4)).transpose(1, 2))
    assert counts[0] == key_driven_allocation(norms, 8).tolist()


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, tokens = llama(), ids(2, 9)
    counts = group_kv_heads(model, 4, [tokens])
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == NAME
    assert again.config.kdgqa_allocation == counts
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, **EXACT)
    # Where nobody has registered it, transformers refuses the file rather than share the heads evenly.
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == NAME


def test_it_trains() -> None:
    model, tokens = llama().train(), ids(4, 12)
    counts = group_kv_heads(model, 4, [tokens])
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.config.kdgqa_allocation == counts


def test_vision_models_are_allocated_at_every_pass() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=8, intermediate_size=48, image_size=16, patch_size=4
    )
    model, x = ViTModel(config).eval(), torch.randn(4, 3, 16, 16)
    assert group_kv_heads(model, 4) is None
    together = model(x).last_hidden_state
    torch.testing.assert_close(model(x.flip(0)).last_hidden_state.flip(0), together, **EXACT)
    alone = torch.cat([model(one[None]).last_hidden_state for one in x])
    assert not torch.allclose(alone, together, atol=1e-4)  # the batch decides
    with pytest.raises(ValueError, match="ViTModel is not causal"):
        group_kv_heads(model, 4, [x])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_heads=8 is not a multiple of num_kv_heads=3"):
        group_kv_heads(llama(), 3)
    with pytest.raises(ValueError, match="num_kv_heads=9"):
        group_kv_heads(llama(), 9)
    with pytest.raises(ValueError, match="batches is empty"):
        group_kv_heads(llama(), 4, [])
    with pytest.raises(ValueError, match="Qwen3Attention norms its keys"):
        group_kv_heads(Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=8, head_dim=4)), 4)
    t5: PreTrainedConfig = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="has no self-attention with q_proj, k_proj and v_proj"):
        group_kv_heads(T5ForConditionalGeneration(t5), 2)

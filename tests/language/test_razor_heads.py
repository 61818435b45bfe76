"""Razor's retrieval heads: how they are found in a model, saved, loaded, and given to another model by mistake."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from decoders import GREEDY, SIZES, decoder, padded, prompt
from some_heads import some_heads
from torch import nn

import heed
from heed.language.razor import (
    HeadScores,
    Razor,
    RetrievalHeads,
    alibi_scope,
    alibi_slopes,
    alibi_windows,
    profile_heads,
    repeated_prompt,
    repeated_scores,
    top_heads,
)

ONE = RetrievalHeads(((1,), (0,)), 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_profiles_are_those_of_the_attention_maps(name: str) -> None:
    model = decoder(name)
    window = pytest.warns(UserWarning, match="1 of 2 layers see a sliding window only and are not profiled: 0")
    with window if name == "gemma3" else nullcontext():
        scores = profile_heads(model, segment=9, repeats=4, seed=5)
    model.set_attn_implementation("eager")
    maps = model(repeated_prompt(37, 1, segment=9, seed=5), output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        if name == "gemma3" and layer == 0:  # a window
            assert scores.echo[layer].isnan().all()
            continue
        for head in range(4):
            a = weights[0, head, 1:, 1:]
            echo = [sum(a[i, j] for j in range(i - 9, -1, -9)) for i in range(9, 36)]
            induction = [sum(a[i, j + 1] for j in range(i - 9, -1, -9)) for i in range(9, 36)]
            torch.testing.assert_close(scores.echo[layer, head], torch.stack(echo).mean())
            torch.testing.assert_close(scores.induction[layer, head], torch.stack(induction).mean())
    assert scores.select(0.5, 0.5).count >= (1 if name == "gemma3" else 2)


def test_an_induction_head_is_found() -> None:
    """A map that looks at what followed the last time, one that looks at the token itself, and two others."""
    tokens = 4 * 16
    i = torch.arange(tokens)
    maps = torch.zeros(1, 4, tokens, tokens)
    maps[0, 0, i, (i - 15).clamp(min=0)] = 1
    maps[0, 1, i, (i - 32).clamp(min=0)] = 1
    maps[0, 2, i, i] = 1
    maps[0, 3] = torch.ones(tokens, tokens).tril() / (i[:, None] + 1)
    induction, echo = (x.mean(-1) for x in repeated_scores(maps[:, :, 16:], i[16:], 16))
    assert induction[0, 0] == 1
    assert echo[0].argmax() == 1
    scores = HeadScores(induction, echo, 4)
    assert scores.select(0.25, 0.25).layers == ((0, 1),)
    assert scores.select(0.0, 0.0).count == 0


def test_alibi_scope_bounds_the_weights() -> None:
    """Keys after a LayerNorm whose queries and keys agree as badly as they can: nothing beyond the scope weighs eps."""
    heads, width, tokens = 4, 16, 400
    query, key = torch.randn(2, heads, 6, width).mul(0.05)
    scope = alibi_scope(query, key, torch.ones(width), eps=1e-2)
    x = nn.functional.layer_norm(torch.randn(tokens, width), (width,))
    far = (tokens - 1 - torch.arange(tokens)).float()
    for head, slope in enumerate(alibi_slopes(heads)):
        product = query[head].T @ key[head]
        norm = torch.linalg.matrix_norm(product, ord=2)
        assert scope[head] == pytest.approx(((2 * norm * width - math.log(1e-2)) / slope).item(), rel=1e-4)
        scores = x[-1] @ product @ x.T - slope * far
        weights = scores.softmax(0)
        assert (weights[far >= scope[head]] < 1e-2).all()
    assert scope[0] < tokens  # so that something is beyond


def test_slopes_of_any_number_of_heads() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    bloom = t.models.bloom.modeling_bloom._get_alibi_slopes
    for heads in (1, 6, 12, 40):
        torch.testing.assert_close(alibi_slopes(heads), bloom(heads, torch.device("cpu")))


@torch.no_grad()
def test_bloom_with_windows_of_its_heads() -> None:
    config = t.BloomConfig(vocab_size=37, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model: Any = t.BloomForCausalLM(config).eval()
    inputs = padded(prompt(2, 40), [0, 9])
    inputs.pop("position_ids")
    ids, mask, more = inputs["input_ids"], inputs["attention_mask"], prompt(2, 3)
    for block in model.transformer.h:
        block.self_attention.query_key_value.weight *= 5
        block.input_layernorm.weight *= 0.1
    windows = alibi_windows(model, eps=0.1)
    assert windows.windows is not None
    assert windows.windows[0][0] < 40 < windows.windows[0][3]
    plain, generated = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    with heed.apply(model, Razor(windows)):
        assert torch.equal(model.generate(**inputs, **GREEDY), generated)
    with heed.apply(model, Razor(windows, window=1, sinks=0)) as handle:
        together, alone = handle.state.cache(), handle.state.cache()
        found = model(**inputs, past_key_values=together).logits
        torch.testing.assert_close(found[mask.bool()], plain[mask.bool()], rtol=1e-4, atol=1e-5)
        assert len(together.layers[0].held.stores) == 4
        kept = [int(store.dropped[0]) for store in together.layers[0].held.stores]
        assert kept == [max(0, 40 - window) for window in windows.windows[0]]
        model(ids[1:, 9:], past_key_values=alone)
        for i in range(3):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            both = model(more[:, i : i + 1], attention_mask=mask, past_key_values=together).logits
            one = model(more[1:, i : i + 1], past_key_values=alone).logits
            torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)
        longer = model(torch.cat([ids[1:, 9:], more[1:]], 1)).logits[:, -1]
        torch.testing.assert_close(one[:, 0], longer, rtol=0, atol=0.05)  # what was dropped has little weight
    assert torch.equal(model(**inputs).logits, plain)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention with ALiBi"):
        alibi_windows(decoder("llama"))
    with pytest.raises(ValueError, match="eps=1.0 must lie between 0 and 1"):
        alibi_windows(model, eps=1.0)
    with pytest.raises(ValueError, match="heads=0 must be 1 or more"):
        alibi_slopes(0)


def test_ties_are_all_chosen_and_halves_round_to_even() -> None:
    scores = torch.tensor([[0.5, 0.9], [0.5, 0.1], [float("nan")] * 2])
    assert top_heads(scores, 0.5).tolist() == [[True, True], [True, False], [False, False]]
    assert top_heads(scores, 0.375).sum() == 3  # round(1.5) = 2
    assert top_heads(scores, 0.125).sum() == 0  # round(0.5) = 0


def test_the_list_is_saved_and_loaded(tmp_path: Path) -> None:
    heads = RetrievalHeads(((3, 1, 1), (), (0,)), 4)
    heads.save(tmp_path / "heads.json")
    assert RetrievalHeads.load(tmp_path / "heads.json") == heads == RetrievalHeads.of(heads.mask())
    known = RetrievalHeads(((), ()), 2, ((3, 9), (4, 70)))
    known.save(tmp_path / "heads.json")
    assert RetrievalHeads.load(tmp_path / "heads.json") == known
    assert (heads.layers, heads.count, heads.ratio) == (((1, 3), (), (0,)), 3, 0.25)
    assert heads.others(0) == (0, 2)
    tool = {"prefix_matching": {0: [1, 3], 2: [0]}, "copying": {0: [3]}}
    torch.save(tool, tmp_path / "tool.pt")
    assert RetrievalHeads.load_tool(tmp_path / "tool.pt", 3, 4) == heads
    torch.save({"copying": {"5": torch.tensor([1])}}, tmp_path / "tool.pt")
    with pytest.raises(ValueError, match="lists layer 5; the model has 3 layers"):
        RetrievalHeads.load_tool(tmp_path / "tool.pt", 3, 4)
    torch.save([1], tmp_path / "tool.pt")
    with pytest.raises(ValueError, match="no head list of the tool"):
        RetrievalHeads.load_tool(tmp_path / "tool.pt", 3, 4)
    (tmp_path / "heads.json").write_text(json.dumps([[1]]))
    with pytest.raises(ValueError, match="no list of retrieval heads"):
        RetrievalHeads.load(tmp_path / "heads.json")


def test_the_text_repeats() -> None:
    ids = repeated_prompt(40, 7, segment=10, repeats=3)
    assert ids.shape == (1, 31)
    assert ids[0, 0] == 7
    assert torch.equal(ids[0, 1:11], ids[0, 21:31])
    assert ids[0, 1:].min() >= 30
    tool = repeated_prompt(32_000, 1)
    assert tool.shape == (1, 10_001)
    assert 10_000 <= tool[0, 1:].min() <= tool.max() < 12_500


def test_bad_heads() -> None:
    with pytest.raises(TypeError, match="heads must be RetrievalHeads, not list"):
        Razor([[1], [0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer 1 has no heads \[0, 2\]"):
        RetrievalHeads(((1,), (0, 2)), 2)
    with pytest.raises(ValueError, match="must be 2 positive numbers for each of 1 layers"):
        RetrievalHeads(((),), 2, ((4, 0),))
    with pytest.raises(ValueError, match="0 layers of 2 key-value heads"):
        RetrievalHeads((), 2)
    with pytest.raises(ValueError, match="a model with 3 layers of 2 key-value heads, this one has 2 of 2"):
        heed.apply(decoder("llama"), Razor(RetrievalHeads(((), (), ()), 2)))
    with pytest.raises(ValueError, match="this one has 2 of 4; profile this model"):
        heed.apply(decoder("gpt2"), Razor(ONE))
    with pytest.raises(ValueError, match="found when the method is applied"):
        Razor(some_heads).share(100)
    for ratio in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"ratio={ratio} must be a share"):
            top_heads(torch.zeros(2, 2), ratio)


def test_bad_profiles() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no rotary embedding"):
        profile_heads(decoder("gpt2"))
    with pytest.raises(ValueError, match="a segment of 2500 tokens needs as many.*segment=37"):
        profile_heads(decoder("llama"))
    with pytest.raises(ValueError, match="repeats=1: a text repeats at least once"):
        repeated_prompt(40, 1, segment=5, repeats=1)
    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        profile_heads(nn.Linear(2, 2))
    model = decoder("llama")
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="has no bos_token_id; give bos="):
        profile_heads(model, segment=9)
    mistral = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=4))
    with pytest.raises(ValueError, match="no layer of this model has plain causal attention"):
        profile_heads(mistral, segment=9)

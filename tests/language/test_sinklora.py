"""SinkLoRA's own claims: who sees whom, what it costs, that it trains decoders and leaves them alone otherwise, and LoRA."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from decoders import DECODERS, GREEDY, SIZES, decoder, padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.engine.attend import attend
from heed.engine.patterns import Causal
from heed.errors import MissingExtra
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.h2o import H2O
from heed.language.sinklora import (
    IGNORED,
    HeadGroups,
    LoRARecipe,
    S2Attention,
    Segments,
    SFAttention,
    Sinks,
    chat_batch,
    chat_example,
    extended_config,
    grouped_attention,
    load_adapter,
    rope_factor,
    save_adapter,
    visible_pairs,
)
from heed.methods import Handle, Method

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
SF = HeadGroups(returned=0.5, sinks=4)
METHODS = {
    "s2": S2Attention(),
    "s2_wrap": S2Attention(wrap=True),
    "sf": SFAttention(),
    "sf_batch": SFAttention(lengths="batch"),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
# Without sliding windows.
whole = pytest.mark.parametrize("name", [name for name in DECODERS if name != "gemma3"])


def qkv(tokens: int, heads: int = 4, key_heads: int = 2, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, h, tokens, 8) for h in (heads, key_heads, key_heads))  # type: ignore[return-value]


def by_masks(q: Tensor, k: Tensor, v: Tensor, groups: HeadGroups, causal: bool = True) -> Tensor:
    """The specification: every head under the dense mask of its pattern."""
    heads, tokens = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    masks = torch.stack([pattern.mask(tokens) for pattern in groups.patterns(heads, tokens, causal)])
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~masks, -torch.inf)
    return scores.softmax(-1) @ v


GROUPS = st.builds(
    HeadGroups,
    ratio=st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]),
    group=st.sampled_from([None, 1, 3, 8]),
    returned=st.sampled_from([0.0, 0.5, 1.0]),
    sinks=st.sampled_from([0, 0, 1, 4, 50]),
)


@settings(max_examples=40)
@given(GROUPS, st.integers(1, 33), st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 2)]), st.booleans())
def test_attention_is_that_under_the_masks(
    groups: HeadGroups, tokens: int, heads: tuple[int, int], causal: bool
) -> None:
    x = [part.requires_grad_() for part in qkv(tokens, *heads)]
    ours, wanted = grouped_attention(*x, groups, causal=causal), by_masks(*x, groups, causal)
    torch.testing.assert_close(ours, wanted, **CLOSE)
    for got, want in zip(*(torch.autograd.grad(out.square().sum(), x) for out in (ours, wanted)), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@settings(max_examples=15)
@given(st.sampled_from([0.25, 0.4, 1.0]), st.integers(2, 33))
def test_the_rolled_variant_too(ratio: float, tokens: int) -> None:
    groups, x = HeadGroups(ratio, wrap=True), qkv(tokens)
    torch.testing.assert_close(grouped_attention(*x, groups), by_masks(*x, groups), **CLOSE)


@settings(max_examples=30)
@given(GROUPS, st.integers(1, 40), st.integers(1, 5))
def test_pairs_are_counted_and_patterns_agree(groups: HeadGroups, tokens: int, heads: int) -> None:
    masks = [pattern.mask(tokens) for pattern in groups.patterns(heads, tokens)]
    assert visible_pairs(groups, heads, tokens) == [int(mask.sum()) for mask in masks]
    for mask in masks:
        assert not mask.triu(1).any()
        assert mask.diagonal().all()
        assert mask[:, : groups.sinks].tril().equal(torch.ones_like(mask[:, : groups.sinks]).tril())


def test_the_formulas_of_the_card() -> None:
    tokens, size, sinks = 4096, 1024, 4
    plain = tokens // size * size * (size + 1) // 2
    shifted = (tokens // size - 1) * size * (size + 1) // 2 + 2 * (size // 2) * (size // 2 + 1) // 2
    assert visible_pairs(HeadGroups(), 4, tokens) == [plain] * 2 + [shifted] * 2
    more = [plain + (tokens - size) * sinks] * 3 + [shifted + (tokens - size // 2) * sinks]
    assert visible_pairs(SF, 4, tokens) == more
    assert sum(more) < 0.3 * 4 * tokens * (tokens + 1) / 2


def test_which_heads_are_shifted() -> None:
    def shifts(groups: HeadGroups, heads: int) -> str:
        return "".join("s" if segments.shift else "." for segments in groups.segments(heads, 8))

    assert [shifts(HeadGroups(), heads) for heads in (8, 5, 1)] == ["....ssss", "..sss", "s"]
    assert [shifts(SF, heads) for heads in (8, 5, 1)] == ["......ss", "...ss", "s"]
    assert shifts(HeadGroups(returned=1.0), 4) == "...."
    assert Segments(8, 4).cuts(20) == [(0, 4), (4, 8), (12, 8)]
    assert Segments(8, 4, wrap=True).cuts(20) == [(0, 8), (8, 8), (16, 4)]


@settings(max_examples=20)
@given(st.integers(4, 40), st.integers(1, 39))
def test_nothing_later_is_seen_unless_it_wraps(tokens: int, changed: int) -> None:
    changed = min(changed, tokens - 1)
    x = qkv(tokens)
    other = [part.clone() for part in x]
    for part in other:
        part[:, :, changed:] += 1
    for groups in (HeadGroups(), SF):
        same = (grouped_attention(*x, groups) - grouped_attention(*other, groups))[:, :, :changed]
        assert same.abs().max() < 1e-5
    groups = HeadGroups(wrap=True)
    half = groups.group_size(tokens) // 2
    leak = (grouped_attention(*x, groups) - grouped_attention(*other, groups)).abs().amax((0, 1, 3))
    if half and tokens % groups.group_size(tokens) == 0:
        assert leak[: min(half, changed)].min() > 0


def test_when_it_is_dense() -> None:
    x = qkv(24)
    dense = attend(*x, Causal())
    for groups in (HeadGroups(1.0, returned=1.0), HeadGroups(sinks=24), HeadGroups(sinks=99)):
        torch.testing.assert_close(grouped_attention(*x, groups), dense, **CLOSE)
    fixed = HeadGroups(returned=1.0).patterns(4, 24)
    assert fixed == [fixed[0]] * 4


def test_group_sizes() -> None:
    assert [HeadGroups().group_size(n) for n in (32, 30, 23, 3)] == [8, 8, 6, 1]
    assert HeadGroups(0.3).group_size(10) == 3
    assert [HeadGroups(group=8).group_size(n) for n in (64, 8, 20)] == [8, 8, 5]
    strict = HeadGroups(uneven="error")
    assert strict.group_size(32) == 8
    for tokens in (30, 3):
        with pytest.raises(ValueError, match=rf"{tokens} tokens do not make groups.*pad them"):
            strict.group_size(tokens)


def test_patterns_as_values() -> None:
    assert str(SF.patterns(4, 32)[3]).startswith("Segments(group=8, shift=4")
    assert Segments(8).mask(16)[12].nonzero().flatten().tolist() == [8, 9, 10, 11, 12]
    assert Segments(8, 4, wrap=True).mask(16)[0].nonzero().flatten().tolist() == [0, 12, 13, 14, 15]
    assert Sinks(2).mask(4).tolist() == [[True] * 4] * 2 + [[True, True, False, False]] * 2
    x = qkv(200)
    for pattern in (Segments(50, 25), Segments(50, 25, wrap=True)):
        wanted = attend(*x, pattern, backend="reference")
        torch.testing.assert_close(attend(*x, pattern, backend="tiled"), wanted, **CLOSE)


# In decoders.


def logits(model: Any, ids: Tensor, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


@methods
@whole
def test_it_acts_in_training_and_not_in_evaluation(name: str, method: S2Attention) -> None:
    model, ids = decoder(name), prompt(2, 32)
    for module in model.modules():  # GPT-2 has dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, generated = logits(model, ids), model.generate(ids, **GREEDY)
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    with heed.apply(model, method):
        assert torch.equal(logits(model, ids), plain)
        assert torch.equal(model.generate(ids, **GREEDY), generated)
        trained = logits(model.train(), ids)
        assert not torch.allclose(trained[:, -1], plain[:, -1], atol=1e-6)
        if not method.wrap:
            torch.testing.assert_close(trained[:, :4], plain[:, :4], **CLOSE)  # they see all there is
    assert torch.equal(logits(model.eval(), ids), plain)
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes


@methods
def test_at_inference_it_takes_prompts_alone(method: S2Attention) -> None:
    model, ids = decoder("llama"), prompt(2, 32)
    settings_ = {name: getattr(method, name) for name in ("returned", "sinks", "wrap", "lengths")}
    trained = None
    with heed.apply(model.train(), method):
        trained = logits(model, ids)
    with heed.apply(model.eval(), S2Attention(**settings_, inference=True)):
        cache = t.DynamicCache(config=model.config)
        with torch.no_grad():
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, trained, **CLOSE)
            step = model(ids[:, :1], past_key_values=cache).logits
        assert model.generate(ids, **GREEDY).shape == (2, 43)
    with torch.no_grad():  # full attention over the same cache
        cache.crop(-1)
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, step, **CLOSE)


@pytest.mark.parametrize("method", [S2Attention(), S2Attention(wrap=True), SFAttention()], ids=["s2", "s2_wrap", "sf"])
@whole
@pytest.mark.parametrize("right", [False, True])
def test_a_padded_batch_is_the_loop_over_its_rows(name: str, method: S2Attention, right: bool) -> None:
    model, ids, padding = decoder(name), prompt(3, 40), [0, 3, 17]
    inputs = padded(ids, padding)
    if right:
        keep = torch.arange(40) < 40 - torch.tensor(padding)[:, None]
        inputs = {"input_ids": ids * keep, "attention_mask": keep.long()}
    with heed.apply(model, type(method)(wrap=method.wrap, inference=True)):
        together = logits(model, inputs.pop("input_ids"), **inputs)
        for row, some in enumerate(padding):
            real = slice(0, 40 - some) if right else slice(some, 40)
            torch.testing.assert_close(together[row : row + 1, real], logits(model, ids[row : row + 1, real]), **CLOSE)


def test_groups_of_the_padded_batch() -> None:
    """As in LongLoRA: rows begin at their own first token, groups have the size that the batch makes."""
    model, ids = decoder("llama"), prompt(2, 40)
    inputs = padded(ids, [0, 20])
    with heed.apply(model, S2Attention(inference=True, lengths="batch")):
        together = logits(model, inputs.pop("input_ids"), **inputs)
    with heed.apply(model, S2Attention(ratio=0.5, inference=True)):
        torch.testing.assert_close(together[1:, 20:], logits(model, ids[1:, 20:]), **CLOSE)


@methods
def test_several_texts_one_after_another_and_half_precision(method: S2Attention) -> None:
    model = decoder("llama").train()
    with heed.apply(model, method):
        first = logits(model, prompt(2, 32))
        logits(model, prompt(2, 24))
        assert torch.equal(logits(model, prompt(2, 32)), first)
        for dtype in (torch.bfloat16, torch.float16):
            assert logits(model.to(dtype), prompt(2, 32)).isfinite().all()


@methods
def test_training_with_gradient_checkpoints(method: S2Attention) -> None:
    model, ids = decoder("llama").train(), prompt(2, 32)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    with heed.apply(model, method):
        loss = model(ids, labels=ids, use_cache=False).loss
        wanted = torch.autograd.grad(loss, model.model.layers[0].self_attn.k_proj.weight)[0]
        model.gradient_checkpointing_enable()
        for _ in range(5):
            loss = model(ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            if not losses:
                torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, wanted, **CLOSE)
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_gpt_neox_and_h2o_beside_it() -> None:
    config = t.GPTNeoXConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model, ids = t.GPTNeoXForCausalLM(config).eval(), prompt(2, 32)
    plain = logits(model, ids)
    with heed.apply(model, SFAttention()), heed.apply(model, H2O(heavy=4, recent=4)) as handle:
        assert not torch.allclose(logits(model.train(), ids), plain, atol=1e-5)
        cache = handle.state.cache()
        model.eval().generate(ids, past_key_values=cache, **GREEDY)
        assert cache.layers[0].held.keys.shape[2] == 8
    assert LoRARecipe().target_modules(model) == ["query_key_value", "dense"]


class _Watch(AttentionRule):
    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return weights


class _Probe(Method):
    def attach(self, host: Any, handle: Handle) -> None:
        attach_rule(host, _Watch(), handle)


@methods
def test_layers_and_hosts_that_do_not_fit(method: S2Attention) -> None:
    gemma, mistral = decoder("gemma3"), t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=4))
    for model in (gemma, mistral):
        with pytest.raises(NotImplementedError, match="a sliding window of their own.*dense_layers"):
            heed.apply(model, method)
        assert model.config._attn_implementation != "heed"
    with heed.apply(gemma, type(method)(dense_layers=(0,))):
        ruled = [bool(getattr(layer.self_attn, "_heed_rules", None)) for layer in gemma.model.layers]
        assert ruled == [False, True]
        assert logits(gemma.train(), prompt(2, 32)).isfinite().all()
    with pytest.raises(TypeError, match="no model of transformers"):
        heed.apply(nn.Linear(2, 2), method)
    llama, ids = decoder("llama").train(), prompt(2, 23)
    with heed.apply(llama, method):
        with pytest.raises(ValueError, match="never forms the attention weights"):
            heed.apply(llama, _Probe())
        packed = torch.ones(23, 23, dtype=torch.bool).tril()
        packed[10:, :10] = False
        with pytest.raises(NotImplementedError, match="more than causality and padding"):
            logits(llama, ids, attention_mask=packed.expand(2, 1, -1, -1))
    with (
        heed.apply(llama, S2Attention(uneven="error")),
        pytest.raises(ValueError, match="23 tokens do not make groups"),
    ):
        logits(llama, ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.0}, r"ratio=0.0 must lie in \(0, 1\]"),
        ({"ratio": 1.5}, r"ratio=1.5 must lie in \(0, 1\]"),
        ({"returned": -0.1}, r"returned=-0.1 must lie in \[0, 1\]"),
        ({"returned": 2.0}, r"returned=2.0 must lie in \[0, 1\]"),
        ({"sinks": -1}, "sinks=-1 must be >= 0"),
        ({"group": 0}, "group=0 must be at least 1"),
        ({"wrap": True, "sinks": 4}, "wrap=True lets tokens see the future"),
        ({"uneven": "pads"}, "did you mean 'pad'"),
        ({"lengths": "rows"}, "did you mean 'row'"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2Attention(**arguments)


def test_bad_calls() -> None:
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match="8 queries and 7 keys must be the same tokens"):
        grouped_attention(q, k[:, :, :7], v[:, :, :7], SF)
    with pytest.raises(ValueError, match="group=4 and shift=4"):
        Segments(4, 4)
    with pytest.raises(ValueError, match="3 queries and 4 keys must be the same tokens"):
        Segments(4).mask(3, 4)
    with pytest.raises(ValueError, match="count=-1"):
        Sinks(-1)


# LoRA, through peft.


def test_lora_trains_what_the_papers_train_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = decoder("llama"), prompt(2, 32)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = LoRARecipe(rank=2, learning_rate=1e-2)
    adapted = recipe.prepare(model)
    assert isinstance(adapted, peft.PeftModel)
    assert adapted.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained if "lora_" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    rest = {name.removeprefix("base_model.model.") for name in trained if "lora_" not in name}
    assert rest == {name for name in base if "embed" in name or "norm" in name}
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], recipe.learning_rate)
    with heed.apply(adapted, SFAttention()):
        losses = []
        for _ in range(4):
            loss = adapted.train()(input_ids=ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        wanted = logits(adapted.eval(), ids)
    assert torch.equal(logits(adapted, ids), wanted)  # full attention in evaluation, applied or not
    save_adapter(adapted, tmp_path)
    assert (tmp_path / "adapter_config.json").exists()

    fresh = decoder("llama")
    merged = load_adapter(fresh, tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), wanted, **CLOSE)
    assert type(merged) is t.LlamaForCausalLM
    again = load_adapter(decoder("llama"), tmp_path, trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained

    # LongLoRA's file, with and without peft's prefix.
    kept = {
        f"base_model.model.{name}": value for name, value in adapted.base_model.model.named_parameters() if name in rest
    }
    (tmp_path / "trainable_params.safetensors").unlink()
    torch.save(kept, tmp_path / "trainable_params.bin")
    torch.testing.assert_close(logits(load_adapter(decoder("llama"), tmp_path), ids), wanted, **CLOSE)
    other = t.LlamaForCausalLM(t.LlamaConfig(**{**SIZES, "vocab_size": 40}))
    with pytest.raises(ValueError, match=r"embed_tokens.weight \(37, 32\), which is \(40, 32\)"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no modules q_proj.*targets="):
        recipe.prepare(decoder("gpt2"))
    plain = LoRARecipe(targets=("q_proj",), trainable=()).prepare(decoder("llama"))
    assert all("q_proj.lora_" in name for name, p in plain.named_parameters() if p.requires_grad)


def test_without_peft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (LoRARecipe().prepare, lambda model: load_adapter(model, tmp_path)):
        with pytest.raises(MissingExtra, match="'peft', which is not installed"):
            call(decoder("llama"))


def test_the_recipe_is_the_papers(tmp_path: Path) -> None:
    recipe = LoRARecipe()
    assert (recipe.rank, recipe.alpha, recipe.dropout) == (8, 16, 0.0)
    arguments = t.TrainingArguments(str(tmp_path), **{**recipe.training_arguments(), "bf16": False})
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.max_steps) == (2e-5, 20, 1000)
    assert arguments.lr_scheduler_type == "constant_with_warmup"
    for name, value in (("rank", 0), ("steps", 0), ("dropout", 1.0)):
        with pytest.raises(ValueError, match=f"{name}={value} must"):
            LoRARecipe(**{name: value})


def test_positions_are_interpolated() -> None:
    assert [rope_factor(n, 4096) for n in (4096, 100, 8192, 16384, 10000)] == [1.0, 1.0, 2.0, 4.0, 3.0]
    assert rope_factor(16384, 4096, existing=2.0) == 2.0  # LongLoRA's
    config = t.LlamaConfig(**SIZES)
    longer = extended_config(config, 700)
    assert (longer.rope_parameters["rope_type"], longer.rope_parameters["factor"]) == ("linear", 3.0)
    assert config.rope_parameters["rope_type"] == "default"
    assert extended_config(longer, 768).rope_parameters == longer.rope_parameters
    assert extended_config(longer, 1024).rope_parameters["factor"] == 4.0
    rotary = [t.LlamaForCausalLM(c).model.rotary_emb.inv_freq for c in (config, longer)]
    torch.testing.assert_close(rotary[1], rotary[0] / 3)
    neox = extended_config(t.GPTNeoXConfig(), 8192)
    assert neox.rope_parameters["partial_rotary_factor"] == 0.25
    with pytest.raises(ValueError, match="has no rotary positions that all layers share"):
        extended_config(t.GPT2Config(), 4096)
    with pytest.raises(ValueError, match="'yarn' scales the positions"):
        extended_config(
            t.LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), 4096
        )
    with pytest.raises(ValueError, match="target=0"):
        rope_factor(0, 1)


# Chat data.


def encode(text: str) -> list[int]:
    return [3 + ord(letter) % 34 for letter in text]


def test_chat_examples(tmp_path: Path) -> None:
    records = [
        {"instruction": "Sum up: a long text", "output": "short"},
        {"instruction": "Who?", "input": "b", "output": "me"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    examples = [
        chat_example(record, encode, 2, start=[1]) for record in json.loads((tmp_path / "data.json").read_text())
    ]
    first = examples[0]
    assert first["input_ids"] == [1, *encode("[INST]Sum up: a long text[/INST]short"), 2]
    assert first["labels"][-6:] == [*encode("short"), 2]
    assert set(first["labels"][:-6]) == {IGNORED}
    assert len(examples[1]["input_ids"]) == 1 + len("[INST]Who?\nb[/INST]me") + 1
    batch = chat_batch(examples, pad=0)
    length = batch["input_ids"].shape[1]
    assert length % 4 == 0
    assert batch["attention_mask"].sum(1).tolist() == [len(example["input_ids"]) for example in examples]
    model = decoder("llama").train()
    with heed.apply(model, SFAttention(lengths="batch", uneven="error")):
        loss = model(**batch, use_cache=False).loss
    assert loss.isfinite()
    assert len(chat_example(records[0], encode, 2, longest=35)["input_ids"]) == 35


def test_bad_chat_data() -> None:
    with pytest.raises(ValueError, match="needs 'instruction' and 'output'; this one has"):
        chat_example({"instruction": "a"}, encode, 2)
    with pytest.raises(ValueError, match="longest=5 cuts off the whole answer"):
        chat_example({"instruction": "a", "output": "b"}, encode, 2, longest=5)
    with pytest.raises(ValueError, match="0 examples"):
        chat_batch([], 0)

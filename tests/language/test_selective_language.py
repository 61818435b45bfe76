"""Temperatures in decoders of transformers: caches, padding, training, saving, removal, and hosts that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from decoders import DECODERS, GREEDY, SIZES, decoder, padded, prompt
from torch import Tensor, nn

import heed
from heed.checkpoint import write_weights
from heed.hosts.attach import attach_rule, attention_layers
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.lit_gpt import fused_qkv, load_lit_gpt
from heed.language.selective import (
    SelectiveTemperatures,
    convert_to_selective,
    load_temperatures,
    save_temperatures,
    temperature_groups,
    train_temperatures_only,
)
from heed.language.selective_report import selective_report
from heed.layers.temperature import Selective
from heed.methods import Handle, Method

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
NAMES = [*DECODERS, "gpt_neox"]
decoders = pytest.mark.parametrize("name", NAMES)


def build(name: str) -> Any:
    if name != "gpt_neox":
        return decoder(name)
    torch.manual_seed(0)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = t.GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=256, eos_token_id=2)
    return t.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def stir(handle: Handle) -> Handle:
    """Temperatures that matter."""
    with torch.no_grad():
        for parameter in handle.state.parameters():
            nn.init.normal_(parameter, std=0.7)
    return handle


@torch.no_grad()
@decoders
def test_it_starts_as_almost_the_same_and_afterwards_is_the_same(name: str) -> None:
    model, ids = build(name), prompt()
    plain, text = model(ids).logits, model.generate(ids, **GREEDY)
    state, attributes = model.state_dict(), {id(m): set(vars(m)) for m in model.modules()}
    implementation = model.config._attn_implementation
    with convert_to_selective(model) as handle:
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0.02)
        assert not torch.equal(model(ids).logits, plain)
        stir(handle)
        assert not torch.allclose(model(ids).logits, plain, atol=1e-2)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(ids, **GREEDY), text)
    assert model.state_dict().keys() == state.keys()
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    assert model.config._attn_implementation == implementation


@torch.no_grad()
@decoders
def test_without_gain_it_is_exactly_the_host(name: str) -> None:
    model, ids = build(name), prompt()
    plain = model(ids).logits
    with convert_to_selective(model, Selective(position="linear", gain=0.0)):
        torch.testing.assert_close(model(ids).logits, plain, **CLOSE)


@torch.no_grad()
@decoders
def test_tokens_one_by_one_are_the_whole_text(name: str) -> None:
    model, ids = build(name), prompt()
    with convert_to_selective(model) as handle:
        stir(handle)
        whole = model(ids).logits
        cache = t.DynamicCache(config=model.config)
        parts = [
            model(part, past_key_values=cache).logits for part in (ids[:, :9], ids[:, 9:14], *ids[:, 14:].split(1, 1))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
        assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, use_cache=False))
        beams = {**GREEDY, "num_beams": 3}
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))


@torch.no_grad()
@decoders
@pytest.mark.parametrize("positions", [True, False])
def test_a_padded_batch_is_the_loop_over_its_rows(name: str, positions: bool) -> None:
    model, ids, padding = build(name), prompt(3, 20), [0, 3, 11]
    if name == "gpt2" and not positions:
        return  # GPT-2 itself then counts the padding
    inputs = padded(ids, padding)
    if not positions:
        inputs.pop("position_ids")
    with convert_to_selective(model) as handle:
        stir(handle)
        together = model(**inputs).logits
        for row, some in enumerate(padding):
            alone = model(ids[row : row + 1, some:]).logits
            torch.testing.assert_close(together[row : row + 1, some:], alone, **CLOSE)
        texts = model.generate(ids * inputs["attention_mask"], attention_mask=inputs["attention_mask"], **GREEDY)
        for row, some in enumerate(padding):
            alone = model.generate(ids[row : row + 1, some:], **GREEDY)
            assert torch.equal(texts[row, 20:], alone[0, 20 - some :])


@torch.no_grad()
def test_a_static_cache_and_prompts_one_after_another() -> None:
    model, ids = build("llama"), prompt()
    with convert_to_selective(model) as handle:
        stir(handle)
        first = model.generate(ids, **GREEDY)
        model.generate(prompt(2, 30), **GREEDY)
        assert torch.equal(model.generate(ids, **GREEDY), first)
        assert torch.equal(model.generate(ids, **GREEDY, cache_implementation="static"), first)
        assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=9), first)


@torch.no_grad()
@decoders
def test_the_tau_that_is_reported_is_the_one_that_acts(name: str) -> None:
    """Queries and values times tau, put on by hand in attention itself, where the host has no cache."""
    model, ids = build(name), prompt()

    class ByHand(AttentionRule):
        def __init__(self, reports: list[Any]) -> None:
            self.reports = reports

        def before(self, call: AttentionCall) -> AttentionCall:
            tau = self.reports[call.layer]
            return call.replace(query=call.query * tau.query[..., None], value=call.value * tau.value[..., None])

    class Probe(Method):
        def __init__(self, rule: AttentionRule) -> None:
            self.rule = rule

        def attach(self, host: nn.Module, handle: Handle) -> None:
            attach_rule(host, self.rule, handle)

    with convert_to_selective(model) as handle:
        stir(handle)
        wanted, reports = model(ids).logits, selective_report(model, input_ids=ids)
    with heed.apply(model, Probe(ByHand(reports))):
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, **CLOSE)


@decoders
def test_temperatures_are_trained_saved_and_loaded_alone(name: str, tmp_path: Path) -> None:
    model, ids = build(name), prompt(4, 23)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = convert_to_selective(model)
    trained = train_temperatures_only(handle)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimiser, losses = torch.optim.AdamW(temperature_groups(handle, token_lr=3e-2)), []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    save_temperatures(handle, tmp_path / "tau.safetensors")
    with torch.no_grad():
        tuned = model(ids).logits
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad(), load_temperatures(build(name), tmp_path / "tau.safetensors") as loaded:
        torch.testing.assert_close(loaded.state.host(ids).logits, tuned, **CLOSE)


def test_groups_of_the_optimiser() -> None:
    handle = convert_to_selective(build("llama"))
    host, tokens, scalars = temperature_groups(handle, 1e-5)
    assert (host["lr"], tokens["lr"], scalars["lr"]) == (1e-5, 1e-5, 1e-2)
    assert (host["weight_decay"], tokens["weight_decay"], scalars["weight_decay"]) == (0.01, 0, 0)
    assert len(scalars["params"]) == len(tokens["params"]) == 4
    everything = [id(p) for group in (host, tokens, scalars) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in handle.state.host.parameters())


CONFIGS: dict[str, tuple[Callable[[], Any], int]] = {
    "gpt2": (lambda: t.GPT2Config(), 18_456),
    "pythia-160m": (
        lambda: t.GPTNeoXConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
        18_456,
    ),
    "pythia-410m": (
        lambda: t.GPTNeoXConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        49_200,
    ),
    "tiny-llama": (
        lambda: t.LlamaConfig(
            hidden_size=2048,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            intermediate_size=5632,
        ),
        50_732,
    ),
    "llama-2-7b": (lambda: t.LlamaConfig(), 262_208),
    "llama-3-8b": (
        lambda: t.LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256),
        163_904,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_new_parameters_are_few(name: str) -> None:
    config, wanted = CONFIGS[name]
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(config())
        own = model.num_parameters()
        handle = convert_to_selective(model)
    assert handle.state.count() == wanted
    assert wanted < 0.005 * own


@torch.no_grad()
def test_reports() -> None:
    model, ids = build("llama"), prompt()
    plain = selective_report(model, input_ids=ids)
    assert [report.query for report in plain] == [None, None]
    with convert_to_selective(model, Selective(("position",), (), gain=0.5)) as handle:
        sharp = selective_report(model, input_ids=ids)
        assert not handle.state.layers[0].last
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(sharp[0].query, (1 + 0.5 * torch.arange(1, 24).log()).expand(2, 4, -1), **CLOSE)
    torch.testing.assert_close(sharp[0].product_norm, plain[0].product_norm, **CLOSE)
    assert (sharp[0].spikiness <= plain[0].spikiness + 1e-6).all()
    assert torch.equal(plain[0].visible[0, 0], torch.arange(1, 24))


def test_a_new_model_trains_with_all_its_parameters() -> None:
    model, ids = build("llama").train(), prompt(4)
    handle = convert_to_selective(model, Selective(key=("token",), scratch=True, sharing=False, hidden=6))
    optimiser, losses = torch.optim.AdamW(temperature_groups(handle, 1e-2)), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(6):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad is not None and p.grad.any() for p in handle.state.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@decoders
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    with convert_to_selective(model) as handle:
        logits = stir(handle).state.host(prompt()).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_the_authors_names_for_gpt_neox() -> None:
    """Llama and GPT-2 have cases of their own; here every weight of GPT-NeoX goes there and back."""
    model = build("gpt_neox")
    theirs: dict[str, Tensor] = {}
    names = {
        "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "attention.query_key_value": "attn.attn",
        "attention.dense": "attn.proj", "mlp.dense_h_to_4h": "mlp.fc", "mlp.dense_4h_to_h": "mlp.proj",
        "embed_in": "transformer.wte", "final_layer_norm": "transformer.ln_f", "lm_head": "lm_head",
    }  # fmt: skip
    for key, value in model.state_dict().items():
        part, leaf = key.removeprefix("gpt_neox.").rsplit(".", 1)
        start = ""
        if part.startswith("layers."):
            _, number, part = part.split(".", 2)
            start = f"transformer.h.{number}."
        theirs[f"{start}{names[part]}.{leaf}"] = value + 1
    theirs |= {f"transformer.h.{n}.attn.beta": torch.tensor(0.3 * n) for n in range(2)}
    handle = load_lit_gpt(other := build("gpt_neox"), theirs)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value + 1)
    assert [layer.query.alpha.item() for layer in handle.state.layers.values()] == pytest.approx([0.0, 0.3])
    handle.remove()
    with pytest.raises(ValueError, match="is no weight that a gpt_neox has"):
        load_lit_gpt(other, theirs | {"transformer.h.0.mlp.gate.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="beta in layers"):
        load_lit_gpt(other, {key: value for key, value in theirs.items() if "1.attn.beta" not in key})
    with pytest.raises(ValueError, match="not for gemma3_text"):
        load_lit_gpt(build("gemma3"), {})
    q, k, v = torch.randn(8, 3), torch.randn(4, 3), torch.randn(4, 3)
    assert fused_qkv(q, k, v, 4, 2).shape == (16, 3)


def test_refusals(tmp_path: Path) -> None:
    model = build("llama")
    with convert_to_selective(model):
        with pytest.raises(ValueError, match="has temperatures already"):
            convert_to_selective(model)
        cache = t.DynamicCache(config=model.config)
        layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 3, 32)
        rotation = model.model.rotary_emb(hidden, torch.arange(3)[None])
        layer(hidden, position_embeddings=rotation, attention_mask=None, past_key_values=cache)
        with pytest.raises(ValueError, match="no position_ids"):
            layer(hidden, position_embeddings=rotation, attention_mask=None, past_key_values=cache)
    with pytest.raises(TypeError, match="no model of transformers"):
        convert_to_selective(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="norms its keys by k_norm"):
        convert_to_selective(build("qwen3"), Selective(key=("token",)))
    persimmon = t.PersimmonConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=9
    )
    with pytest.raises(ValueError, match="PersimmonAttention norms its queries by q_layernorm"):
        convert_to_selective(t.PersimmonForCausalLM(persimmon))
    with pytest.raises(ValueError, match="BloomAttention"):
        convert_to_selective(t.BloomForCausalLM(t.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)))
    write_weights(nn.Linear(2, 2), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no temperatures"):
        load_temperatures(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no .safetensors file"):
        load_temperatures(model, tmp_path / "other.bin")
    with convert_to_selective(build("gpt2")) as handle:
        save_temperatures(handle, tmp_path / "gpt2.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_temperatures(model, tmp_path / "gpt2.safetensors")
    assert not any(hasattr(layer, "temperatures") for layer in attention_layers(model))


def test_latent_attention_has_query_temperatures_alone() -> None:
    config = t.DeepseekV3Config(
        vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    model, ids = t.DeepseekV3ForCausalLM(config).eval(), prompt()
    with pytest.raises(ValueError, match="one latent vector"):
        convert_to_selective(model)
    plain = model(ids).logits
    with convert_to_selective(model, Selective(value=())) as handle:
        assert not torch.allclose(stir(handle).state.host(ids).logits, plain, atol=1e-4)
    assert torch.equal(model(ids).logits, plain)


def test_layers_without_softmax_are_left_out_and_named() -> None:
    config = t.JambaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=9, expert_layer_offset=8,
        num_experts=1, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    model = t.JambaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="1 of JambaForCausalLM's 2 layers are linear_attention"):
        handle = convert_to_selective(model)
    assert len(handle.state.layers) == 1
    assert model(prompt()).logits.isfinite().all()
    assert SelectiveTemperatures() == handle.method

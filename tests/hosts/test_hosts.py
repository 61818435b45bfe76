"""Rules on hosts of three libraries: they act, stack, and leave the host as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import heed
from heed.hosts.attach import attach_rule, attention_layers
from heed.hosts.rules import RULES, AttentionCall, AttentionRule, attention_weights, run_rules
from heed.methods import Handle, Method

TEXT = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 3, 8, 7, 12, 30], [0, 0, 4, 4, 6, 20, 11]])
PADDING = (IDS != 0).long()


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def causal_lm(config: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model, lambda m: m(IDS, attention_mask=PADDING).logits[PADDING.bool()]


def bloom_lm(config: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """With ALiBi, and attention that transformers computes in the layer itself."""
    model = transformers.BloomForCausalLM(config)
    return model, lambda m: m(IDS, attention_mask=PADDING).logits[PADDING.bool()]


def hosts() -> dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]]:
    t = transformers
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return {
        "llama": lambda: causal_lm(t.LlamaConfig(**TEXT)),
        "mistral": lambda: causal_lm(t.MistralConfig(**TEXT, sliding_window=4)),
        "qwen3": lambda: causal_lm(t.Qwen3Config(**TEXT)),
        "gemma3": lambda: causal_lm(t.Gemma3TextConfig(**TEXT, sliding_window=4, layer_types=None)),
        "gpt2": lambda: causal_lm(t.GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        "bloom": lambda: bloom_lm(t.BloomConfig(vocab_size=37, hidden_size=32, n_layer=2, n_head=4)),
        "hf_vit": lambda: (
            t.ViTModel(t.ViTConfig(**vit, image_size=16, patch_size=4)),
            lambda m: m(image()).last_hidden_state,
        ),
        "timm_vit": lambda: (
            timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4),
            lambda m: m(image()),
        ),
        "heed_vit": lambda: (
            heed.create_model("vit_micro", img_size=16, in_chans=3, attention="neighborhood"),
            lambda m: m(image()),
        ),
    }


@pytest.fixture(params=list(hosts()))
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    model, run = hosts()[request.param]()
    return model.eval(), run


class Probe(Method):
    """Attaches one rule to the whole host."""

    def __init__(self, rule: AttentionRule) -> None:
        self.rule = rule

    def attach(self, host: nn.Module, handle: Handle) -> AttentionRule:
        attach_rule(host, self.rule, handle)
        return self.rule


class Nothing(AttentionRule):
    """Changes nothing."""


class Watch(AttentionRule):
    """Keeps the weights."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        self.seen[call.layer] = weights
        return weights


class Gate(AttentionRule):
    """Scales the outputs of the heads."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        return out * self.factor


class Own(AttentionRule):
    """Computes attention itself."""

    def core(self, call: AttentionCall) -> Tensor:
        heads, groups = call.query.shape[1], call.key.shape[1]
        return (attention_weights(call) @ call.value.repeat_interleave(heads // groups, 1)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("rule", [Nothing, Watch, Own])
def test_a_rule_that_changes_nothing_gives_the_same_numbers(host, rule: type[AttentionRule]) -> None:
    model, run = host
    plain = run(model)
    with heed.apply(model, Probe(rule())):
        torch.testing.assert_close(run(model), plain, atol=2e-5, rtol=1e-4)


class Sometimes(Own):
    """Computes attention itself in training only."""

    def core(self, call: AttentionCall) -> Tensor | None:  # type: ignore[override]
        return super().core(call) * 2 if call.module.training else None


@torch.no_grad()
def test_a_rule_can_leave_a_call_to_the_host() -> None:
    model, run = hosts()["llama"]()
    plain = run(model.eval())
    with heed.apply(model, Probe(Sometimes())):
        assert torch.equal(run(model), plain)
        assert not torch.allclose(run(model.train()), plain, atol=1e-4)


@torch.no_grad()
def test_weights_are_seen_in_every_layer_and_sum_to_one(host) -> None:
    model, run = host
    with heed.apply(model, Probe(Watch())) as handle:
        run(model)
    layers = len(handle.state.seen)
    assert layers == (4 if type(model).__name__ == "ViT" else 2)
    for weights in handle.state.seen.values():
        sums = weights.sum(-1)
        assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()


@torch.no_grad()
def test_afterwards_the_host_is_bit_for_bit_what_it_was(host) -> None:
    model, run = host
    plain, state = run(model), copy.deepcopy(model.state_dict())
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    first, second = heed.apply(model, Probe(Gate(0.5))), heed.apply(model, Probe(Gate(2.0)))
    torch.testing.assert_close(run(model), plain, atol=2e-5, rtol=1e-4)  # the two cancel out
    first.remove()  # in any order
    assert not torch.allclose(run(model), plain, atol=1e-3)
    second.remove()
    second.remove()
    assert torch.equal(run(model), plain)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes


@torch.no_grad()
def test_rules_that_exclude_each_other(host) -> None:
    model, run = host
    plain = run(model)
    with heed.apply(model, Probe(Own())):
        with pytest.raises(ValueError, match="never forms the attention weights that Watch needs"):
            heed.apply(model, Probe(Watch()))
        with pytest.raises(ValueError, match="Own and Own each compute"):
            heed.apply(model, Probe(Own()))
        torch.testing.assert_close(run(model), plain, atol=2e-5, rtol=1e-4)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_generation_with_a_cache_through_rules(name: str) -> None:
    torch.manual_seed(0)
    model = hosts()[name]()[0].eval()
    options = {"attention_mask": PADDING, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, **options)
    with heed.apply(model, Probe(Watch())):
        assert torch.equal(model.generate(IDS, **options), plain)


@torch.no_grad()
@pytest.mark.parametrize("rule", [Nothing, Watch, Own])
def test_a_static_cache_at_its_start(rule: type[AttentionRule]) -> None:
    """transformers gives no mask there, and means that only the first places of the cache are filled."""
    torch.manual_seed(0)
    model, ids = hosts()["llama"]()[0].eval(), IDS[:1]
    plain = model(ids).logits
    with heed.apply(model, Probe(rule())):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, plain, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_rule_for_some_layers_alone(host) -> None:
    model, _ = host
    handle = Handle(Probe(Nothing()))
    attach_rule(model, Nothing(), handle, layers=(1, 7))
    assert [RULES in vars(layer) for layer in attention_layers(model)][:2] == [False, True]
    handle.remove()
    assert not any(RULES in vars(layer) for layer in attention_layers(model))


def test_gradients_flow_through_rules(host) -> None:
    model, run = host
    with heed.apply(model, Probe(Watch())):
        run(model).square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "attn" in n or "attention" in n]
    assert grads
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_a_row_without_keys_gives_zero_and_no_nan() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, False], [False, False], [True, True]])[None, None]
    kv = torch.randn(1, 1, 2, 4)
    call = AttentionCall(nn.Identity(), 0, q, kv, kv, mask, causal=False, scale=0.5)
    out, weights = run_rules(call, [Watch()])
    assert weights is not None
    assert (out[:, 1] == 0).all()
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_a_host_without_attention_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="Sequential has no attention layers"):
        heed.apply(model, Probe(Nothing()))
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    before = resnet.config._attn_implementation
    with pytest.raises(TypeError, match="ResNetModel has no attention layers"):
        heed.apply(resnet, Probe(Nothing()))
    mpt = transformers.MptModel(transformers.MptConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=2))
    with pytest.raises(TypeError, match="does not compute attention through transformers"):
        heed.apply(mpt, Probe(Nothing()))
    assert resnet.config._attn_implementation == before
    assert not any("heed" in name for part in (resnet, mpt) for m in part.modules() for name in vars(m))


def test_what_is_not_a_method_or_not_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match="is not a method"):
        heed.apply(nn.Linear(2, 2), Nothing())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="applied to a torch module, not to str"):
        heed.apply("gpt2", Probe(Nothing()))  # type: ignore[arg-type]


def test_replaced_attributes_come_back_in_order() -> None:
    class Fixed(Method):
        def __init__(self, bias: float) -> None:
            self.bias = bias

        def attach(self, host: nn.Module, handle: Handle) -> None:
            handle.replace(host, "forward", lambda x: x + self.bias)

    layer = nn.Linear(2, 2)
    x = torch.randn(1, 2)
    plain = layer(x)
    first, second = heed.apply(layer, Fixed(1.0)), heed.apply(layer, Fixed(2.0))
    with pytest.raises(ValueError, match="remove the methods that were applied later first"):
        first.remove()
    assert torch.equal(layer(x), x + 2)
    second.remove()
    assert torch.equal(layer(x), x + 1)
    first.remove()
    assert torch.equal(layer(x), plain)


def test_a_host_with_an_attention_function_of_its_own_is_refused() -> None:
    transformers.AttentionInterface.register("mine", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    model = hosts()["llama"]()[0]
    model.set_attn_implementation("mine")
    with pytest.raises(ValueError, match="computes attention by 'mine'"):
        heed.apply(model, Probe(Nothing()))
    assert model.config._attn_implementation == "mine"

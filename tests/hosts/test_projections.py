"""Projections of decoders: what is found there is what attention gets, but for the rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from test_hosts import TEXT as _TEXT
from torch import Tensor, nn

import heed
from heed.hosts.attach import attach_rule, attention_layers
from heed.hosts.projections import PARTS, Unrotated, find_projections, rotate, unrotate
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.methods import Handle, Method

TEXT: dict[str, Any] = _TEXT
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
DECODERS: dict[str, Any] = {
    "llama": lambda: t.LlamaConfig(**TEXT),
    "llama_yarn": lambda: t.LlamaConfig(**TEXT, rope_parameters=_YARN),
    "mistral": lambda: t.MistralConfig(**TEXT),
    "qwen2": lambda: t.Qwen2Config(**TEXT),
    "qwen3": lambda: t.Qwen3Config(**TEXT),
    "olmo2": lambda: t.Olmo2Config(**TEXT),
    "gemma3": lambda: t.Gemma3TextConfig(**TEXT, sliding_window=4, layer_types=None),
    "phi3": lambda: t.Phi3Config(**TEXT),
    "gpt_neox": lambda: t.GPTNeoXConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt2": lambda: t.GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


class _Look(AttentionRule):
    def __init__(self) -> None:
        self.unrotated: list[Unrotated] = []
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def before(self, call: AttentionCall) -> AttentionCall:
        made = self.unrotated[call.layer]
        tables = self.tables.get(call.layer)
        for ours, given in ((made.queries(), call.query), (made.keys(), call.key)):
            self.pairs.append((ours if tables is None else rotate(ours, *tables), given))
            if tables is not None:
                self.pairs.append((unrotate(given, *tables), ours))
        return call


class _Looking(Method):
    def attach(self, host: Any, handle: Handle) -> _Look:
        rule = _Look()
        for number, layer in enumerate(attention_layers(host)):
            rule.unrotated.append(Unrotated(layer, handle))

            def tables(_: nn.Module, __: object, given: dict[str, Any], number: int = number) -> None:
                if given.get("position_embeddings") is not None:
                    rule.tables[number] = given["position_embeddings"]

            handle.hook(layer.register_forward_pre_hook(tables, with_kwargs=True))
        attach_rule(host, rule, handle)
        return rule


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_rotated_they_are_what_attention_gets(name: str) -> None:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(DECODERS[name]()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 37, (2, 11))
    plain = model(ids).logits
    with heed.apply(model, _Looking()) as handle:
        model(ids)
    assert handle.state.pairs
    for ours, given in handle.state.pairs:
        torch.testing.assert_close(ours, given, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids).logits, plain)
    for layer in attention_layers(model):
        found = find_projections(layer)
        assert not any(found.module(part)._forward_hooks for part in PARTS)


def test_values_of_packed_projections() -> None:
    model = t.AutoModelForCausalLM.from_config(DECODERS["gpt_neox"]()).eval()
    found = find_projections(attention_layers(model)[0])
    made = torch.randn(1, 3, 96)
    assert torch.equal(found.split("value", made)[0, 1, 2], made[0, 2, 24 + 16 : 24 + 24])


def test_forgetting() -> None:
    model = t.AutoModelForCausalLM.from_config(DECODERS["llama"]())
    with heed.apply(model, _Looking()) as handle:
        model(torch.ones(1, 4, dtype=torch.long))
        handle.state.unrotated[0].forget()
        with pytest.raises(KeyError):
            handle.state.unrotated[0].queries()


def test_layers_without_projections() -> None:
    with pytest.raises(TypeError, match="does not say how many heads"):
        find_projections(nn.Linear(2, 2))
    layer: Any = nn.Module()
    layer.config, layer.head_dim = t.LlamaConfig(**TEXT), 8
    with pytest.raises(TypeError, match="no projections that heed knows"):
        find_projections(layer)
    layer.q_proj, layer.k_proj, layer.v_proj = nn.Linear(8, 64), nn.Linear(8, 16), nn.Linear(8, 16)
    with pytest.raises(TypeError, match="make 64 and 16 channels, which are not 4 and 2 heads of 8"):
        find_projections(layer)

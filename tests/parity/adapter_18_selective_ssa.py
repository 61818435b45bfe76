"""Selective attention: whole models by the authors' code, and the layer with token and value temperatures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from heed.hosts.attach import attention_layers
from heed.language.lit_gpt import fused_qkv, load_lit_gpt
from heed.layers.selective import SelectiveAttention
from heed.layers.temperature import Selective, spikiness


def run(case: Case) -> dict[str, Tensor]:
    return KINDS[case.kind](case)


def lit_gpt(case: Case) -> dict[str, Tensor]:
    c = case.config
    padding = c["padding_multiple"]
    common: dict[str, Any] = {
        "vocab_size": -(-c["vocab_size"] // padding) * padding,
        "hidden_size": c["n_embd"],
        "intermediate_size": c["intermediate_size"],
        "num_hidden_layers": c["n_layer"],
        "num_attention_heads": c["n_head"],
        "max_position_embeddings": c["block_size"],
        "tie_word_embeddings": False,
    }
    if c["_mlp_class"] == "LLaMAMLP":
        bias = {"attention_bias": c["bias"], "mlp_bias": c["bias"]}
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(**common, num_key_value_heads=c["n_query_groups"], rms_norm_eps=c["norm_eps"], **bias)
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": c["rotary_percentage"]}
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                **common,
                rope_parameters=rope,
                use_parallel_residual=c["parallel_residual"],
                layer_norm_eps=c["norm_eps"],
                attention_bias=c["bias"],
            )
        )
    return _model(case, model)


def gpt2(case: Case) -> dict[str, Tensor]:
    c = case.config
    sizes = {
        "n_positions": c["block_size"],
        **{name: c[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
    }
    return _model(case, GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu")))


def _model(case: Case, model: Any) -> dict[str, Tensor]:
    model.eval()
    load_lit_gpt(model, case.state)
    ids = case.inputs["idx"].long()
    layers: list[Any] = attention_layers(model)
    seen: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output[0].detach()))
    logits = model(ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    n = torch.arange(1, ids.shape[1] + 1)
    temperatures = [layer.temperatures.query for layer in layers]
    results = {
        "output.logits": logits.detach(),
        "output.loss": loss.detach()[None],
        "output.pos_factor": torch.stack([1 + t.gain * n.log() for t in temperatures]),
    }
    results |= {f"output.attn.{number}": output for number, output in enumerate(seen)}
    grads = {f"transformer.h.{number}.attn.beta": t.alpha.grad for number, t in enumerate(temperatures)}
    for number, layer in enumerate(layers):
        if hasattr(layer, "q_proj"):
            q, k, v = (projection.weight.grad for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
            heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
            grads[f"transformer.h.{number}.attn.attn.weight"] = fused_qkv(q, k, v, heads, groups)
        elif hasattr(layer, "c_attn"):
            grads[f"transformer.h.{number}.attn.c_attn.weight"] = layer.c_attn.weight.grad.T
        else:
            grads[f"transformer.h.{number}.attn.attn.weight"] = layer.query_key_value.weight.grad
    grads["transformer.wte.weight"] = model.get_input_embeddings().weight.grad
    return results | {f"grad.{name}": grad for name, grad in grads.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"query": ("position", "token"), "value": ("position", "token")},
    "q_token_position": {"query": ("position", "token"), "value": ()},
    "q_position": {"query": ("position",), "value": ()},
    "q_and_v_token": {"query": ("token",), "value": ("token",)},
}


@torch.no_grad()
def layer(case: Case) -> dict[str, Tensor]:
    c, x = case.config, case.inputs["x"]
    if c["rope"] or c["scale"] != "head_dim**-0.5":
        raise NotImplementedError("the layer by itself has no rotation, and no scale but head_dim**-0.5")
    results: dict[str, Tensor] = {}
    for name, parts in VARIANTS.items():
        module = SelectiveAttention(
            c["dim"], c["heads"], kv_heads=c["kv_heads"], causal=c["causal"], settings=Selective(**parts)
        )
        own = module.state_dict()
        named = {
            f"tau_{which}.{new}": f"{old}_{which[0]}"
            for which in parts
            for new, old in (("alpha", "alpha"), ("score", "token"))
        }
        for key in own:
            value = case.state[named.get(key, key)]
            own[key] = value.reshape(own[key].shape)
        module.to(x.dtype).load_state_dict(own)
        results[f"output.{name}"] = module(x)
        if name == "full":
            taus = module.temperatures(x, module.positions(x.shape[1]))
            results |= {"output.tau_q": taus["query"], "output.tau_v": taus["value"]}
            results["output.spikiness"] = _spikiness(module, x, taus["query"])
            for tau in (module.tau_query, module.tau_value):  # g = 0 and a = 0: every part is there and does nothing
                tau.alpha.fill_(-torch.inf)  # type: ignore[union-attr, operator]
                tau.score.zero_()  # type: ignore[union-attr, operator]
            results["output.none"] = module(x)
    return results


def _spikiness(module: SelectiveAttention, x: Tensor, tau: Tensor) -> Tensor:
    heads = (module.q_proj(x), module.k_proj(x))
    q, k = (y.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for y in heads)
    scores = tau[..., None] * q @ k.repeat_interleave(module.num_heads // module.kv_heads, 1).mT * module.head_dim**-0.5
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return spikiness(scores.masked_fill(hidden, -torch.inf).softmax(-1), torch.arange(1, x.shape[1] + 1))


KINDS = {"lit_gpt_pos": lit_gpt, "gpt2_pos": gpt2, "token_position_layer": layer}

"""S2-Attn in a layer of transformers, SF-Attn, and the cache of H2O, against the authors' code and the paper's text."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import heed
from heed.hosts.rules import AttentionCall, run_rules
from heed.language.h2o import H2O
from heed.language.sinklora import HeadGroups, S2Attention, grouped_attention


def run(case: Case) -> dict[str, Tensor]:
    if case.kind not in KINDS:
        raise ValueError(f"no adapter for kind {case.kind!r}")
    return KINDS[case.kind](case)


def layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = LlamaConfig(
        vocab_size=2,
        hidden_size=c["hidden"],
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
    )
    model = LlamaModel(config).train()
    attention: Any = model.layers[0].self_attn
    attention.load_state_dict(case.state)
    found = {}
    for name in ("wrap", "nowrap"):
        x = case.inputs["x"].clone().requires_grad_()
        positions = torch.arange(c["seq"])[None]
        with heed.apply(model, S2Attention(ratio=c["group_size_ratio"], wrap=name == "wrap")):
            out, _ = attention(x, position_embeddings=model.rotary_emb(x, positions), attention_mask=None)
        (out * case.inputs["grad_weight"]).sum().backward()
        found |= {f"output.{name}": out.detach(), f"grad.x_{name}": x.grad}
    return found


def heads(case: Case) -> dict[str, Tensor]:
    c = case.config
    groups = HeadGroups(c["group_size_ratio"], returned=c["return_ratio"], sinks=c["num_sink"])
    masks = [pattern.mask(c["seq"]) for pattern in groups.patterns(c["heads"], c["seq"])]
    q, k, v = (case.inputs[name] for name in "qkv")
    out = grouped_attention(q, k, v, groups)
    return {"output.mask": torch.stack(masks), "output.out": out}


def policy(case: Case) -> dict[str, Tensor]:
    c = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    method = H2O(heavy=c["hh_size"], recent=c["recent_size"])
    rule = method.rule()
    cache: Any = method.layer(0, rule)
    outs, positions, scores = [], [], []
    first = 0
    for last in range(c["prompt"], c["prompt"] + c["decode"] + 1):
        new = slice(first, last)
        keys, values = cache.update(k[:, :, new], v[:, :, new])
        call = AttentionCall(
            nn.Identity(), 0, q[:, :, new], keys, values, None, last - first > 1, c["head_dim"] ** -0.5
        )
        outs.append(run_rules(call, [rule])[0].transpose(1, 2))
        positions.append(cache.held.positions[0])
        scores.append(cache.held.scores[0])
        first = last
    return {
        "output.out": torch.cat(outs, 2),
        "output.kept_positions": torch.stack(positions).int(),
        "output.scores": torch.stack(scores),
    }


KINDS = {"s2attn_layer": layer, "sf_attention": heads, "h2o_policy": policy}

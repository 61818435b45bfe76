"""Mixture-of-Head attention against the authors' ViT, DiT and LLaMA code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from case import Case
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from heed.checkpoint import load_weights
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.moh import convert_to_moh
from heed.layers.moh import (
    MoHAttention,
    Routing,
    attend_gated,
    authors_router_key,
    collect_balance,
    load_balance,
)
from heed.vision.dit import DiT, DiTConfig
from heed.vision.transnext import TransNeXt, TransNeXtConfig


def run(case: Case) -> dict[str, Tensor]:
    return KINDS[case.kind](case)


def attention(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = MoHAttention(
        c["dim"],
        c["num_heads"],
        shared=c["shared_head"],
        routed=c["routed_head"],
        head_dim=c.get("head_dim"),
        qkv_bias=c["qkv_bias"],
        qk_norm=c.get("qk_norm", False),
    ).eval()
    layer.load_state_dict({authors_router_key(key): value for key, value in case.state.items()})
    x = case.inputs["x"].requires_grad_()
    with collect_balance(layer) as balance:
        y = layer(x)
    (y * case.inputs["cotangent"]).sum().backward(retain_graph=True)
    with torch.no_grad():
        routing = layer.router(x)
        heads = attend_gated(*layer.project(x), Routing(torch.ones_like(routing.gates)), layer.num_heads)
    results = {"output.y": y.detach(), "output.heads": heads, "output.gates": routing.gates}
    named = {"router_probs": routing.probs, "mask": routing.mask, "balance": routing.balance}
    results |= {f"output.{name}": value for name, value in named.items() if value is not None}
    assert x.grad is not None
    results["grad.x"] = x.grad
    if layer.router.routed:
        loss = balance.loss()
        results["output.l_aux"] = loss.detach()
        (results["grad.wg_from_l_aux"],) = torch.autograd.grad(loss, [layer.router.wg.weight])
    return results


def transnext(case: Case) -> dict[str, Tensor]:
    c = case.config
    model = TransNeXt(
        TransNeXtConfig(
            img_size=c["img_size"],
            patch_size=c["patch_size"],
            in_chans=c["in_chans"],
            num_classes=c["num_classes"],
            dims=tuple(c["embed_dims"]),
            num_heads=tuple(c["num_heads"]),
            mlp_ratios=tuple(c["mlp_ratios"]),
            depths=tuple(c["depths"]),
            pool_ratios=tuple(c["sr_ratios"]),
            window_sizes=tuple(c["window_size"]),
            shared_heads=tuple(c["shared_head"]),
            routed_heads=tuple(c["routed_head"]),
            qkv_bias=c["qkv_bias"],
        )
    )
    model.load_authors(case.state, case.name).eval()
    x = case.inputs["x"]
    results: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda layer, inputs, y: results.__setitem__(name, y.flatten(1, 2))

    for i, stage in enumerate(model.stages, 1):
        layer = stage.blocks[0].attn  # type: ignore[union-attr, index]
        table, index = layer.position_table()
        results |= {f"output.relative_coords_table{i}": table, f"output.relative_pos_index{i}": index}
        layer.register_forward_hook(keep(f"output.attn{i}"))
    with torch.no_grad(), collect_balance(model) as balance:
        results["output.logits"] = model(x)
        results["output.features"] = model.forward_head(model.forward_features(x), pre_logits=True)
        losses = [load_balance(routing) for _, routing in balance.routings]
    results["output.l_aux"] = torch.stack(losses[: len(losses) // 2])  # the model ran twice
    wanted = case.wanted()
    return {name: value for name, value in results.items() if name in wanted}


class _Weights(AttentionRule):
    """Keeps the weights that the layer attends with."""

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        self.seen = weights.detach()
        return weights


def llama_attention(case: Case) -> dict[str, Tensor]:
    c, x = case.config, case.inputs["x"].requires_grad_()
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=c["hidden_size"],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
    )
    model = LlamaModel(config).eval()
    layer: Any = model.layers[0].self_attn
    load_weights(layer, case.state, case.name)
    rotary = model.rotary_emb(x, torch.arange(x.shape[1])[None])
    weights = _Weights()
    with convert_to_moh(model, c["shared_fraction"], c["active_fraction"]) as handle:
        attach_rule(model, weights, handle)
        router = handle.state[0]
        queries: list[Tensor] = []
        router.register_forward_pre_hook(lambda _, args: queries.append(args[0]))
        with collect_balance(handle.state) as balance:
            y, _ = layer(x, position_embeddings=rotary, attention_mask=None)
    (y * case.inputs["cotangent"]).sum().backward()
    routing = balance.routings[0][1]
    assert x.grad is not None
    results = {"y": y, "attn": weights.seen, "mask": routing.gates, "router_probs": routing.probs}
    results["router_logits"] = router.norms(queries[0])
    return {f"output.{name}": value.detach() for name, value in results.items()} | {"grad.x": x.grad}


def dit_tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = DiTConfig(
        img_size=c["input_size"],
        patch_size=c["patch_size"],
        in_chans=c["in_channels"],
        num_classes=c["num_classes"],
        dim=c["hidden_size"],
        num_heads=tuple(c["num_heads"]),
        head_dim=c["head_dim"],
        mlp_ratio=c["mlp_ratio"],
        shared=tuple(c["shared_head"]) if c["moh"] else None,
        routed=tuple(c["routed_head"]) if c["moh"] else None,
    )
    model = DiT(config).load_authors(case.state).eval()
    x, t, y = (case.inputs[name] for name in ("x", "t", "y"))
    results: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: object, tokens: Tensor) -> None:
        results["output.block0"] = tokens

    hook = model.blocks[0].register_forward_hook(keep)
    with torch.no_grad():
        results["output.sample"] = model(x, t, y)
        hook.remove()
        results["output.condition"] = model.condition(t, y)
        twice, null = torch.cat([x[:1], x[:1]]), c["num_classes"]
        results["output.cfg_sample"] = model.forward_with_cfg(
            twice, torch.full((2,), 100.0), torch.tensor([2, null]), scale=3.0
        )
    return results


KINDS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "attention": attention,
    "dit_tiny": dit_tiny,
    "llama_attention": llama_attention,
    "transnext_tiny": transnext,
}

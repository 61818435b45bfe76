"""Gated positional self-attention, its first weights and a small ConViT against the authors' modules."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.gpsa import GPSA, relative_offsets
from heed.vision.convit import ConViT, ConViTConfig


def run(case: Case) -> dict[str, Tensor]:
    return {"gpsa": gpsa, "local_init": local_init, "convit_model": model}[case.kind](case)


def gpsa(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = GPSA(c["dim"], c["num_heads"], qkv_bias=c["qkv_bias"], qk_scale=c.get("qk_scale")).eval()
    load_weights(layer, case.state, case.name)
    x = case.inputs["x"].clone().requires_grad_()
    y = layer(x)
    (y * case.inputs["grad_output"]).sum().backward()
    grads = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    side = round(x.shape[1] ** 0.5)
    return {
        "output.y": y.detach(),
        "output.attn": layer.attention(x).detach(),
        "output.nonlocality": layer.nonlocality(x),
        "output.rel_indices": relative_offsets(side, side),
        **{f"grad.{name}": grad for name, grad in grads.items() if grad is not None},
    }


@torch.no_grad()
def local_init(case: Case) -> dict[str, Tensor]:
    results = {}
    for name, c in case.config.items():
        layer = GPSA(c["dim"], c["num_heads"], locality_strength=c["locality_strength"])
        tokens = case.tensors[f"output.{name}.position_attention"].shape[-1]
        side = round(tokens**0.5)
        found = {
            f"output.{name}.gating": layer.gating_param,
            f"output.{name}.pos_proj_weight": layer.pos_proj.weight,
            f"output.{name}.position_attention": layer.position_attention(side, side),
            f"output.{name}.v_weight": layer.v.weight,
        }
        for key in (f"output.{name}.pos_proj_weight", f"output.{name}.position_attention"):
            # The authors' draw, which the case says to ignore.
            found[key][c["rows_random"]] = case.tensors[key][c["rows_random"]]
        results |= found
    return results


@torch.no_grad()
def model(case: Case) -> dict[str, Tensor]:
    c = case.config
    x = case.inputs["x"]
    config = ConViTConfig(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        in_chans=x.shape[1],
        num_classes=c["num_classes"],
        dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        local_up_to_layer=c["local_up_to_layer"],
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c["qkv_bias"],
        norm_eps=c["norm_eps"],
    )
    net = ConViT(config).load_authors(case.state).eval()
    blocks = {f"output.block{i}": tokens for i, tokens in enumerate(net.block_outputs(x))}
    return blocks | {"output.logits": net(x)}

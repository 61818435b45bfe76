"""Halo attention and a small HaloNet against timm's and lucidrains' code."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from timm.layers import make_divisible
from torch import Tensor

from heed.layers.halo import HaloAttention, HaloSelfAttention
from heed.vision.halonet import HaloNet, HaloNetConfig


def run(case: Case) -> dict[str, Tensor]:
    return {"attention": attention, "attention_masked_padding": masked_padding, "model_tiny": model}[case.kind](case)


def attention(case: Case) -> dict[str, Tensor]:
    layer = HaloAttention(**case.config).eval()
    layer.load_state_dict(case.state)
    x = case.inputs["x"].clone().requires_grad_()
    y = layer(x)
    (y * case.inputs["grad_output"]).sum().backward()
    grads = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output.y": y.detach(), **{f"grad.{name}": grad for name, grad in grads.items() if grad is not None}}


@torch.no_grad()
def masked_padding(case: Case) -> dict[str, Tensor]:
    settings = dict(case.config)
    layer = HaloSelfAttention(
        settings.pop("dim"), settings.pop("heads"), **settings, padding="mask", scale_pos_embed=True
    ).eval()
    layer.load_lucidrains(case.state)
    return {"output.y": layer(case.inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)}


@torch.no_grad()
def model(case: Case) -> dict[str, Tensor]:
    net = HaloNet(net_config(case.config)).load_authors(case.state).eval()
    x = case.inputs["x"]
    return {
        "output.stem": net.stem(x),
        "output.stage1": net.stage_maps(x)[0],
        "output.features": net.forward_features(x),
        "output.logits": net(x),
    }


def net_config(config: dict[str, Any]) -> HaloNetConfig:
    """timm's ByoModelCfg fields as a HaloNetConfig; a stage is one entry of blocks, or a list of them."""
    stages = [entry if isinstance(entry, list) else [entry] for entry in config["blocks"]]
    attn = dict(config["self_attn_kwargs"])
    letters = {"self_attn": "h", "bottle": "c"}
    return HaloNetConfig(
        layout=tuple("".join(letters[block["type"]] * block["d"] for block in stage) for stage in stages),
        channels=tuple(make_divisible(stage[0]["c"]) for stage in stages),
        bottleneck=tuple(stage[0]["br"] for stage in stages),
        strides=tuple(stage[0]["s"] for stage in stages),
        num_heads=(attn.pop("num_heads", 8),) * len(stages),
        conv_group=stages[0][0]["gs"],
        stem=(config["stem_chs"],),
        final_width=config["num_features"],
        act=config["act_layer"],
        num_classes=config["num_classes"],
        **attn,
    )

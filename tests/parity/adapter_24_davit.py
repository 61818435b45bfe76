"""DaViT's layers, blocks and models against the authors' code, and timm's v2 channel attention."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from torch import Tensor, nn

from heed.checkpoint import load_weights
from heed.layers.channel import ChannelGroupAttention
from heed.layers.window import WindowAttention
from heed.vision.davit import DaViT, DaViTBlock, DaViTConfig


def run(case: Case) -> dict[str, Tensor]:
    kinds = {
        "channel_attention": channel,
        "channel_attention_v2": channel,
        "channel_block": block,
        "spatial_block": block,
        "davit": model,
    }
    return kinds[case.kind](case)


def channel(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = ChannelGroupAttention(
        c["dim"],
        c["num_heads"],
        qkv_bias=c["qkv_bias"],
        v2=case.kind == "channel_attention_v2",
        dynamic_scale=c.get("dynamic_scale", True),
    )
    return _run(case, layer, case.inputs["x"])


def block(case: Case) -> dict[str, Tensor]:
    c = case.config
    if case.kind == "spatial_block":
        attention = WindowAttention(c["dim"], c["num_heads"], c["window_size"], qkv_bias=c["qkv_bias"])
    else:
        attention = ChannelGroupAttention(c["dim"], c["num_heads"], qkv_bias=c["qkv_bias"])
    layer = DaViTBlock(attention, c["mlp_ratio"], ffn=c.get("ffn", True), cpe_act=c.get("cpe_act", False))
    return _run(case, layer, case.inputs["x"], (c["H"], c["W"]))


def _run(case: Case, layer: nn.Module, x: Tensor, grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
    load_weights(layer, case.state, case.name)
    layer.eval()
    x = x.requires_grad_()
    y = layer(x) if grid is None else layer(x.unflatten(1, grid)).flatten(1, 2)
    results = {"output.y": y.detach()}
    if "grad_output" in case.inputs:
        y.backward(case.inputs["grad_output"])
        results |= {f"grad.{name}": p.grad for name, p in [("x", x), *layer.named_parameters()] if p.grad is not None}
    return results


@torch.no_grad()
def model(case: Case) -> dict[str, Tensor]:
    net = DaViT(_config(case.config, case.inputs["x"].shape[1])).load_authors(case.state).eval()
    x = case.inputs["x"]
    results = {"output.logits": net(x), "output.patch_embed0": net.patch_embeds[0](x).flatten(1, 2)}
    for i, stage in enumerate(net.stage_maps(x)):
        results[f"output.stage{i}"] = stage.flatten(2).transpose(1, 2)
    return results


def _config(c: dict[str, Any], in_chans: int) -> DaViTConfig:
    return DaViTConfig(
        patch_size=c["patch_size"],
        in_chans=in_chans,
        num_classes=c["num_classes"],
        dims=tuple(c["embed_dims"]),
        depths=tuple(c["depths"]),
        num_heads=tuple(c["num_heads"]),
        window_size=c["window_size"],
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c.get("qkv_bias", True),
        blocks=tuple(c.get("attention_types", ("spatial", "channel"))),
        ffn=c.get("ffn", True),
        overlapped=c["overlapped_patch"],
        cpe_act=c.get("cpe_act", False),
    )

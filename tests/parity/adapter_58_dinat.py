"""NAT, DiNAT, DiNAT_s, the isotropic models and their layer against the authors' code."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.neighborhood import NeighborhoodAttention2D
from heed.vision.dinats import DiNATs
from heed.vision.nat import NAT, NATConfig, NATLayer
from heed.vision.nat_isotropic import NATIsotropic, NATIsotropicConfig, ViTRPB, ViTRPBConfig


def run(case: Case) -> dict[str, Tensor]:
    kinds = {
        "attn_small_map_padded": attention,
        "dinat_layer": layer,
        "nat_model": model,
        "dinat_s_model": model,
        "isotropic_model": isotropic,
    }
    return kinds[case.kind](case)


def windows(config: dict[str, Any]) -> NeighborhoodAttention2D:
    return NeighborhoodAttention2D(
        config["dim"],
        config["num_heads"],
        config["kernel_size"],
        dilation=config.get("dilation") or 1,
        rel_pos_bias=True,
        pad=True,
        qkv_bias=config.get("qkv_bias", True),
    )


@torch.no_grad()
def attention(case: Case) -> dict[str, Tensor]:
    module = windows(case.config).eval()
    load_weights(module, case.state, case.name)
    return {"output.y": module(case.inputs["x"])}


def layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = NATLayer(windows(c), c["mlp_ratio"], layer_scale=c.get("layer_scale")).eval()
    load_weights(module, case.state, case.name)
    x = case.inputs["x"].requires_grad_()
    y = module(x)
    results = {"output.y": y.detach()}
    if "grad_output" in case.inputs:
        (y * case.inputs["grad_output"]).sum().backward()
        grads = [("x", x), *module.named_parameters()]
        results |= {f"grad.{name}": p.grad for name, p in grads if p.grad is not None}
    return results


@torch.no_grad()
def model(case: Case) -> dict[str, Tensor]:
    c = case.config
    dilations = c.get("dilations")
    config = NATConfig(
        in_chans=case.inputs["x"].shape[1],
        num_classes=c["num_classes"],
        dim=c["embed_dim"],
        depths=tuple(c["depths"]),
        num_heads=tuple(c["num_heads"]),
        kernel_size=c["kernel_size"],
        dilations=None if dilations is None else tuple(map(tuple, dilations)),
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c.get("qkv_bias", True),
        layer_scale=c.get("layer_scale"),
    )
    swin = case.kind == "dinat_s_model"
    net = (DiNATs if swin else NAT)(config).load_authors(case.state).eval()
    tokens = net.patch_embed(case.inputs["x"])
    results = {"output.patch_embed": tokens}
    for i, level in enumerate(net.levels):
        _, tokens = level(tokens)
        results[f"output.{'layer' if swin else 'level'}{i}"] = tokens
    results["output.logits"] = net(case.inputs["x"])
    return {name: value for name, value in results.items() if name in case.tensors}


@torch.no_grad()
def isotropic(case: Case) -> dict[str, Tensor]:
    c = case.config
    settings: dict[str, Any] = {
        "img_size": c["img_size"],
        "patch_size": c["patch_size"],
        "in_chans": case.inputs["x"].shape[1],
        "num_classes": c["num_classes"],
        "dim": c["embed_dim"],
        "depth": c["depth"],
        "num_heads": c["num_heads"],
        "mlp_ratio": c["mlp_ratio"],
        "layer_scale": c.get("layer_scale"),
    }
    net: NATIsotropic | ViTRPB
    if c.get("kernel_size"):
        dilation = c.get("dilation") or 1
        net = NATIsotropic(NATIsotropicConfig(**settings, kernel_size=c["kernel_size"], dilation=dilation))
    else:
        net = ViTRPB(ViTRPBConfig(**settings))
    net.load_authors(case.state).eval()
    tokens = net.patch_embed(case.inputs["x"])
    results = {"output.patch_embed": tokens}
    for i, block in enumerate(net.layers):
        tokens = block(tokens)
        results[f"output.layer{i}"] = tokens
    results["output.logits"] = net(case.inputs["x"])
    return {name: value for name, value in results.items() if name in case.tensors}

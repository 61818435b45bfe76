"""HiLo attention and LITv2 against the authors' layer, detection layer and classifier."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.hilo import HiLoAttention
from heed.vision.litv2 import LITv2, LITv2Config


def run(case: Case) -> dict[str, Tensor]:
    if case.kind in ("hilo_layer", "hilo_padded"):
        return _layer(case)
    if case.kind == "litv2_model":
        return _model(case)
    raise ValueError(f"unknown kind {case.kind!r}")


def _layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = HiLoAttention(
        c["dim"],
        c["num_heads"],
        qkv_bias=c["qkv_bias"],
        qk_scale=c.get("qk_scale"),
        window_size=c["window_size"],
        alpha=c["alpha"],
    )
    load_weights(layer, case.state, case.name)
    if "flops" in c:
        assert layer.flops(c["H"], c["W"]) == c["flops"]
    x = case.inputs["x"].requires_grad_()
    y = layer(x, c["H"], c["W"])
    results = {"output.y": y.detach()}
    with torch.no_grad():
        branches = layer.branches(x.view(x.shape[0], c["H"], c["W"], c["dim"]))
    for name, branch in zip(("output.hifi", "output.lofi"), branches, strict=True):
        if name in case.tensors:
            results[name] = branch
    if "grad_output" in case.inputs:
        y.backward(case.inputs["grad_output"])
        results |= {f"grad.{name}": p.grad for name, p in [("x", x), *layer.named_parameters()] if p.grad is not None}
    return results


def _model(case: Case) -> dict[str, Tensor]:
    c = case.config
    attends = c.get("has_msa", [0, 0, 1, 1])
    config = LITv2Config(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        num_classes=c["num_classes"],
        in_chans=case.inputs["x"].shape[1],
        dim=c["embed_dim"],
        depths=tuple(c["depths"]),
        num_heads=tuple(c["num_heads"]),
        windows=tuple(s if on else 0 for s, on in zip(c["local_ws"], attends, strict=True)),
        alpha=c["alpha"],
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c["qkv_bias"],
    )
    model = LITv2(config).load_authors(case.state).eval()
    with torch.no_grad():
        tokens = model.patch_embed(case.inputs["x"])
        results = {"output.patch_embed": tokens.flatten(1, 2)}
        for i, stage in enumerate(model.stages):
            _, tokens = stage(tokens)
            results[f"output.layer{i}"] = tokens.flatten(1, 2)
        results["output.logits"] = model(case.inputs["x"])
    return results

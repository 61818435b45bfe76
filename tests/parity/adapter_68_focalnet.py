"""Focal modulation, FocalNet, and the detection backbone against the authors' code."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.focal import FocalModulation
from heed.vision.focalnet import FocalNet, FocalNetConfig

_SETTINGS = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dim": "dim",
    "mlp_ratio": "mlp_ratio",
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "patch_norm": "patch_norm",
    "use_conv_embed": "conv_embed",
    "use_postln": "post_norm",
    "use_postln_in_modulation": "post_norm_in_modulation",
    "normalize_modulator": "normalize_modulator",
    "frozen_stages": "frozen_stages",
}


def run(case: Case) -> dict[str, Tensor]:
    return {"modulation": _modulation, "model": _model, "dense_backbone": _dense}[case.kind](case)


def _modulation(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = FocalModulation(
        c["dim"],
        c["focal_window"],
        c["focal_level"],
        c.get("focal_factor", 2),
        bias=c.get("bias", True),
        post_norm=c.get("use_postln_in_modulation", False),
        normalize_modulator=c.get("normalize_modulator", False),
    ).eval()
    load_weights(layer, case.state, case.name)
    x = case.inputs["x"].requires_grad_()
    y = layer(x)
    y.sum().backward()
    with torch.no_grad():
        parts = layer.parts(x)
    *contexts, whole = parts.contexts
    results = {
        "output.q": parts.query,
        "output.gates": parts.gates,
        "output.ctx_global": whole,
        "output.modulator": parts.modulator,
        "output.y": y.detach(),
        "grad.x": x.grad,
    }
    return results | {f"output.ctx{i}": context for i, context in enumerate(contexts, 1)}


def _config(case: Case, **settings: object) -> FocalNetConfig:
    c = case.config
    stages = len(c["depths"])
    return FocalNetConfig(
        **{ours: c[theirs] for theirs, ours in _SETTINGS.items() if theirs in c} | settings,  # type: ignore[arg-type]
        depths=tuple(c["depths"]),
        levels=tuple(c.get("focal_levels", [2] * stages)),
        windows=tuple(c.get("focal_windows", [3] * stages)),
        layer_scale=c.get("layerscale_value", 1e-4) if c.get("use_layerscale") else None,
    )


@torch.no_grad()
def _model(case: Case) -> dict[str, Tensor]:
    model = FocalNet(_config(case)).load_authors(case.state).eval()
    x = case.inputs["x"]
    tokens = model.patch_embed(x)
    results = {"output.stem": tokens.flatten(1, 2)}
    for i, stage in enumerate(model.stages):
        _, tokens = stage(tokens)
        results[f"output.layer{i}"] = tokens.flatten(1, 2)
    results["output.features"] = model.forward_head(model.forward_features(x), pre_logits=True)
    results["output.logits"] = model(x)
    return results


@torch.no_grad()
def _dense(case: Case) -> dict[str, Tensor]:
    outs = tuple(case.config.get("out_indices", range(len(case.config["depths"]))))
    x = case.inputs["x"]
    config = _config(case, dense=True, out_indices=outs, num_classes=0, in_chans=x.shape[1])
    model = FocalNet(config).load_authors(case.state).eval()
    maps = model.forward_intermediates(x, intermediates_only=True)
    return {f"output.map{i}": found for i, found in zip(outs, maps, strict=True)}

"""Head importance, pruning and strength profiles against the card's equations on a tiny timm ViT and on planted maps."""

from __future__ import annotations

import torch
from case import Case
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import heed
from heed.checkpoint import load_weights
from heed.explain.heads import (
    METRICS,
    HeadGate,
    WatchAttention,
    analyse,
    head_importance,
    prune_order,
    pruning_curve,
    strength_profile,
)
from heed.explain.heads.profile import Rings
from heed.explain.vit import Vit

PROFILE = ("ring_total", "ring_mean", "patch_to_cls", "cls_to_patches", "cls_to_cls", "mean_distance", "entropy")


def run(case: Case) -> dict[str, Tensor]:
    if case.kind == "planted_profiles":
        return _planted(case)
    if case.kind == "tiny_vit":
        return _model(case)
    raise ValueError(f"unknown kind {case.kind!r}")


def _planted(case: Case) -> dict[str, Tensor]:
    side = case.config["grid"]
    found = strength_profile(case.inputs["attention"], (side, side))
    return {f"output.{name}": getattr(found, name) for name in ("ring_total", "ring_mean", "patch_to_cls")}


def _model(case: Case) -> dict[str, Tensor]:
    settings = {name: value for name, value in case.config.items() if name != "model"}
    model = VisionTransformer(**settings).eval()
    load_weights(model, case.state, case.name)
    images, labels = case.inputs["images"], case.inputs["labels"]
    maps: dict[int, Tensor] = {}
    with torch.no_grad(), heed.apply(model, WatchAttention(maps.__setitem__)):
        prediction = (vit := Vit(model, images)).predict(images)
    importance = head_importance(model, images, labels, metrics=METRICS)
    curve = pruning_curve(model, images, prune_order(importance["jsd"]), labels)
    report = analyse(model, images, labels, patterns=None, curves=False)
    assert prediction.logits is not None
    return {
        "output.logits": prediction.logits,
        "output.cls_feature": prediction.feature,
        "output.attention": torch.stack([maps[layer] for layer in range(vit.layers)]),
        "output.pruned_probs": _pruned(model, images, vit),
        **{f"output.importance.{name}": value for name, value in importance.items()},
        "output.prune_order": curve.order,
        "output.prune_accuracy": curve.accuracy,
        "output.prune_true_prob": curve.true_prob,
        "output.ring_count": Rings(vit.grid).sizes,
        **{f"output.{name}": getattr(report.profile, name) for name in PROFILE},
        "output.content_agnostic": report.content_agnostic,
        "output.layer_trend_ring_total": report.profile.trend()["ring_total"][0],
    }


@torch.no_grad()
def _pruned(model: VisionTransformer, images: Tensor, vit: Vit) -> Tensor:
    """(L, H, B, C) probabilities with each head off."""
    rows = []
    for layer in range(vit.layers):
        for head in range(vit.heads):
            with heed.apply(model, HeadGate([(layer, head)])):
                rows.append(model(images).softmax(-1))
    return torch.stack(rows).unflatten(0, (vit.layers, vit.heads))

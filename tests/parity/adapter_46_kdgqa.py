"""Grouped layers, their allocations, the conversion and a small ViT against the authors' code."""

from __future__ import annotations

import re

import torch
from case import Case
from torch import Tensor

from heed.layers.allocation import evolving_allocation, key_driven_allocation, key_norms
from heed.layers.grouped import DGQA, GQA, KDGQA, PGQA, grouped_weights
from heed.vision.grouped_vit import GroupedViT, GroupedViTConfig


def run(case: Case) -> dict[str, Tensor]:
    kinds = {
        "allocation_rules": _rules,
        "conversion": _conversion,
        "gqa": _layer,
        "kdgqa": _layer,
        "pgqa": _layer,
        "dgqa": _evolving,
        "vit_kdgqa": _vit,
    }
    return kinds[case.kind](case)


def _rules(case: Case) -> dict[str, Tensor]:
    results = {}
    for name, norms in case.inputs.items():
        if not name.startswith("kd_norms_"):
            continue
        heads_and_groups = name.removeprefix("kd_norms_")
        heads = int(re.match(r"h(\d+)g", heads_and_groups)[1])  # type: ignore[index]
        caches = case.inputs[f"cache_{heads_and_groups}"]
        counts = [key_driven_allocation(row, heads) for row in norms]
        results[f"output.kd_alloc_{heads_and_groups}"] = torch.stack(counts)
        for kind in ("diff", "ema"):
            draws = case.group("rand")[f"{kind}_draws_{heads_and_groups}"]
            counts = [
                evolving_allocation(row, cache, heads, kind, draws=_drawn(drawn))
                for row, cache, drawn in zip(norms, caches, draws, strict=True)
            ]
            results[f"output.{kind}_alloc_{heads_and_groups}"] = torch.stack(counts)
    return results


def _drawn(draws: Tensor) -> list[int]:
    return [head for head in draws.tolist() if head >= 0]


def _conversion(case: Case) -> dict[str, Tensor]:
    c = case.config
    grouped = grouped_weights(case.inputs, c["num_heads"], c["num_kv_heads"])
    return {f"output.{name}": value for name, value in grouped.items()}


def _layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    kind = {"gqa": GQA, "kdgqa": KDGQA, "pgqa": PGQA}[case.kind]
    layer = kind(c["dim"], c["num_heads"], c["num_kv_heads"], qkv_bias=c["qkv_bias"]).eval()
    layer.load_state_dict(case.state)
    keys: list[Tensor] = []
    layer.k.register_forward_hook(lambda module, inputs, output: keys.append(output))
    x = case.inputs["x"].requires_grad_()
    drawn = case.group("rand")
    noise = {"noise": torch.stack([drawn[f"noise{i}"] for i in range(c["num_kv_heads"])])} if drawn else {}
    y = layer(x, **noise)
    (y * case.inputs["cotangent"]).sum().backward()
    assert x.grad is not None
    by_head = keys[0].unflatten(-1, (c["num_kv_heads"], -1)).transpose(1, 2)
    results = {"output.key_norms": key_norms(by_head), "output.y": y.detach(), "grad.x": x.grad}
    return results | ({"output.alloc": layer.allocation} if case.kind == "kdgqa" else {})


@torch.no_grad()
def _evolving(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = DGQA(c["dim"], c["num_heads"], c["num_kv_heads"], c["kind"], c["window_size"], qkv_bias=c["qkv_bias"])
    layer.load_state_dict(case.state)
    outputs, splits, caches = [], [], []
    for step, (x, drawn) in enumerate(zip(case.inputs["x"], case.group("rand")["draws"], strict=True)):
        outputs.append(layer.train(step < 4)(x, step=step, draws=_drawn(drawn)))
        splits.append(layer.allocation)
        caches.append(layer.cache.clone())
    return {
        "output.y": torch.stack(outputs),
        "output.splits": torch.stack(splits),
        "output.cache": torch.stack(caches),
    }


@torch.no_grad()
def _vit(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = GroupedViTConfig(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        in_chans=c["in_chans"],
        num_classes=c["num_classes"],
        dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        num_kv_heads=c["num_kv_heads"],
        att_scheme=c["att_scheme"],
        mlp_ratio=c["mlp_ratio"],
    )
    model = GroupedViT(config).load_authors(case.state).eval()
    model.load_timm(case.group("input.timm"), load_final_norm=False)  # once more, as the authors do
    x = case.inputs["x"]
    tokens = model.embed(x)
    for block in model.blocks:
        tokens = block(tokens)
    return {"output.tokens": model.norm(tokens), "output.alloc": model.allocations(), "output.logits": model(x)}

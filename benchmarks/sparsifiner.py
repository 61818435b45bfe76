"""Sparsifiner (card 17) against dense attention: layer times with the predictor, multiply-adds, kept pairs, accuracy.

    python benchmarks/sparsifiner.py [--threads 1] [--repeats 7] [--seeds 3] [--out docs/benchmarks/sparsifiner.json]

Layers are whole (qkv, predictor, attention, proj), float32, 384 channels, 6 heads; dense attention is PyTorch's
scaled_dot_product_attention. "shared by 1" is the authors' mechanism: every query has a list of keys of its own, whose
scores and order alone cost more than dense attention does on a CPU. With a choice shared by 128 or 256 neighbouring queries
(heed's own) the same pairs are left out, at a cost that can lie below dense attention's.
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import heed
from common import digits, interleaved, options, report
from heed.layers.attention import PatternAttention
from heed.layers.sparsifiner import Connectivity, SparsifinerAttention
from heed.vision.sparsifiner import Sparsifiner, predictors, sparsity_report
from heed.vision.sparsifiner_training import LossWeights, enter_phase, losses, teach

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
DIM, HEADS = 384, 6
SMALL = {"patch_size": 2, "reduce_n": 2, "coef_topk": 4}  # for digits: 16 patches and the class token
TOKENS, KEEPS = (197, 785, 1025, 3137), (0.5, 0.25, 0.1, 0.05)
SHARES, SLOW = (1, 128, 256), 2000  # lists of keys per query are left out above so many tokens: they take seconds


@torch.inference_mode()
def times(repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for batch, tokens in [(1, n) for n in TOKENS] + [(8, 1025)]:
        x = torch.randn(batch, tokens, DIM)
        modules: dict[tuple[float, int], nn.Module] = {(0.0, 0): PatternAttention(DIM, HEADS).eval()}
        for share in SHARES if batch * tokens < SLOW else SHARES[1:]:
            for keep in KEEPS:
                modules[keep, share] = SparsifinerAttention(DIM, HEADS, tokens, keep=keep, share=share).eval()
        calls = {str(key): lambda layer=layer, x=x: layer(x) for key, layer in modules.items()}
        measured = interleaved(calls, repeats)
        seconds = {key: measured[str(key)] for key in modules}
        base = seconds.pop((0.0, 0))
        for (keep, share), own in seconds.items():
            title = f"layer ms, {batch} x {tokens} tokens, keep {keep}, shared by {share}"
            rows.append([title, "dense", base * 1e3, own * 1e3, base / own])
    return rows


@torch.inference_mode()
def counts() -> list[list[object]]:
    rows: list[list[object]] = []
    for keep in KEEPS:
        layer = SparsifinerAttention(DIM, HEADS, 197, keep=keep).eval()
        trace = layer.trace(torch.randn(1, 197, DIM))
        pairs, kept = 197.0**2, trace.mask.float().mean().item() * 197**2
        rows.append([f"kept pairs per head, keep {keep}", "all", pairs, kept, pairs / kept])
        for density in (1.0, 0.1):
            macs = layer.macs(density=density)
            work = macs["predictor"] + macs["up"] + macs["attention"]
            title = f"M multiply-adds of attention, keep {keep}, basis density {density}"
            rows.append([title, "dense", macs["dense"] / 1e6, work / 1e6, macs["dense"] / work])
    pruned = cast(Sparsifiner, heed.create_model("sparsifiner_small_pruned"))
    blocks = sparsity_report(pruned, density=0.3)
    whole, work = (
        sum(sum(b[k] for k in keys) for b in blocks) for keys in (["dense"], ["predictor", "up", "attention"])
    )
    rows.append(["M multiply-adds, keep 0.25, tokens 0.7 at 3, 6, 9", "DeiT-S", whole / 1e6, work / 1e6, whole / work])
    total = sum(p.numel() for p in pruned.parameters())
    own = sum(p.numel() for part in predictors(pruned) for p in part.parameters())
    rows.append(["parameters of the predictors", "whole model", total, own, total / own])
    return rows


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, peak: float, teacher: nn.Module | None, phase: str
) -> None:
    """One phase on digits; without a teacher, by cross-entropy alone."""
    images, labels = data
    learning = enter_phase(model.train(), phase)
    optimiser = torch.optim.AdamW(learning, peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, epochs * 20)
    weights = LossWeights().for_phase(phase)
    for _ in range(epochs):
        for batch in torch.randperm(1280).split(64):
            if teacher is None:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            else:
                run = cast(Sparsifiner, model).run(images[batch], trace=True)
                loss = losses(run, labels[batch], teach(teacher, images[batch]), weights)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return (model.eval()(data[0][1280:]).argmax(1) == data[1][1280:]).float().mean().item()


def at_random(predictor: nn.Module, inputs: object, found: Connectivity) -> Connectivity:
    """A forward hook: as many keys, chosen at random."""
    slots = math.ceil(0.25 * found.scores.shape[-1])
    return found._replace(index=torch.rand_like(found.scores).topk(slots).indices)


def learned(seeds: int) -> list[list[object]]:
    data = digits()
    results: dict[str, list[float]] = {"dense": [], "shared by 1": [], "shared by 4": [], "random keys": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        teacher = VisionTransformer(
            8, 2, 1, 10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0, norm_layer=partial(nn.LayerNorm, eps=1e-6)
        )
        train(teacher, data, 40, 2e-3, None, "cls_distill")
        results["dense"].append(accuracy(teacher, data))
        for name, share in (("shared by 1", 1), ("shared by 4", 4), ("random keys", 1)):
            model = cast(Sparsifiner, heed.create_model("sparsifiner_micro", share=share, **SMALL))
            model.load_state_dict(teacher.state_dict(), strict=False)  # all but the predictors
            if name == "random keys":
                for part in predictors(model):
                    part.register_forward_hook(at_random)
            else:
                train(model, data, 10, 5e-3, teacher, "attn_recon")
            train(model, data, 8, 3e-4, teacher, "cls_distill")
            results[name].append(accuracy(model, data))
    means = {name: sum(values) / len(values) for name, values in results.items()}
    dense = means.pop("dense")
    return [
        [f"digits accuracy, keep 0.25, {name}, {seeds} seeds", "dense", dense, mean, mean / dense]
        for name, mean in means.items()
    ]


def main() -> None:
    given = options(__doc__)
    rows = times(given.repeats) + counts() + learned(given.seeds)
    report("Sparsifiner", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

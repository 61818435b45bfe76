"""iLLaMA's block under soft masks, a small model and the training tools against the authors' code."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.vision.illama import ILlama, ILlamaBlock, ILlamaConfig, SoftMask, rope_table
from heed.vision.illama_training import soft_mask_rates
from heed.vision.illama_weights import resize_positions, select_elements


def run(case: Case) -> dict[str, Tensor]:
    return {"block": _block, "model_tiny": _model, "tools": _tools}[case.kind](case)


def _block(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = ILlamaConfig(dim=c["dim"], num_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], qkv_bias=c["qkv_bias"])
    block = ILlamaBlock(config)
    load_weights(block, case.state, case.name)
    rope = rope_table(c["N"], c["dim"] // c["num_heads"])
    x = case.inputs["x"].requires_grad_()
    results = {"output.rope_cos": rope[0], "output.rope_sin": rope[1]}
    y = x
    for rate in c["soft_mask_rates"]:
        mask, name = (None, "nomask") if rate is None else (SoftMask(rate), f"rate{rate}")
        y = block(x, mask, rope)
        results[f"output.{name}"] = y.detach()
        results[f"output.attn_only_{name}"] = block.attn(block.norm1(x), mask, rope).detach()
    y.backward(case.inputs["grad_output"])  # of the last rate
    grads = {f"grad.{name}": p.grad for name, p in [("x", x), *block.named_parameters()] if p.grad is not None}
    return results | {name: grad for name, grad in grads.items() if name in case.tensors}


@torch.no_grad()
def _model(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = ILlamaConfig(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        in_chans=case.inputs["x"].shape[1],
        num_classes=c["num_classes"],
        dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c["qkv_bias"],
    )
    model = ILlama(config).load_authors(case.state).eval()
    results = {}
    for rate in c["rates"]:
        model.set_soft_mask(rate)
        results[f"output.logits_rate{rate}"] = model(case.inputs["x"])
        results[f"output.features_rate{rate}"] = model.forward_features(case.inputs["x"]).flatten(1)
    return results


def _tools(case: Case) -> dict[str, Tensor]:
    c = case.config
    length = c["epochs"], c["niter_per_ep"], c["soft_mask_rate"]
    return {
        "output.sched_standard": soft_mask_rates(*length, mode="standard"),
        "output.sched_constant": soft_mask_rates(*length, cutoff_epoch=c["cutoff_epoch"], decay="constant"),
        "output.sched_linear": soft_mask_rates(*length, cutoff_epoch=c["cutoff_epoch"], decay="linear"),
        "output.selected": select_elements(case.inputs["teacher_weight"], c["student_shape"]),
        "output.pos_embed_resized": resize_positions(case.inputs["pos_embed"], c["new_grid"]),
    }

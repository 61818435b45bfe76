"""Sparsifiner against the authors' predictor, models and losses."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.sparsifiner import ConnectivityPredictor
from heed.vision.sparsifiner import Sparsifiner, SparsifinerConfig, predictors
from heed.vision.sparsifiner_training import LossWeights, Teaching, losses


def run(case: Case) -> dict[str, Tensor]:
    return {"predictor": predictor, "model": model, "losses": both_phases}[case.kind](case)


@torch.no_grad()
def predictor(case: Case) -> dict[str, Tensor]:
    c = case.config
    by_rank = c.get("score_topk", True)
    module = ConnectivityPredictor(
        c["dim"] // c["num_heads"],
        c["num_heads"],
        c["num_tokens"],
        keep=c["attn_keep_rate"] if by_rank else None,
        score_threshold=None if by_rank else c["score_threshold"],
        reduce_n=c["reduce_n_factor"],
        reduce_c=c["reduce_c_factor"],
        coef_topk=c["coef_topk"],
        coef_threshold=c.get("coef_threshold", 0.05),
        basis_threshold=c.get("basis_threshold", 0.02),
        shared_projection=c.get("share_inout_proj", False),
        prune_rows=c.get("prune_row", False),
    )
    state = case.state
    if module.proj_back_n is None:
        state.pop("proj_back_n")
    load_weights(module, state, case.name)
    module.train(c["training"])
    module.reconstructing = c.get("use_attn_recon", False)
    token_mask = case.inputs.get("token_mask")
    token_mask = None if token_mask is None else token_mask.bool()
    found = module(case.inputs["q"], case.inputs["k"], token_mask)
    rows = 1.0 if token_mask is None else token_mask[:, None, :, None]
    return {
        "output.attn_mask": module.mask(found),
        "output.basis_coef": found.coefficients * rows,
        "output.approx_attn": found.scores * rows,
    }


def build(case: Case) -> Sparsifiner:
    c = case.config
    config = SparsifinerConfig(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        in_chans=case.inputs["x"].shape[1],
        num_classes=c["num_classes"],
        dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c["qkv_bias"],
        keep=tuple(c["attn_keep_rate_list"]),
        reduce_n=c["reduce_n_factor"],
        reduce_c=c["reduce_c_factor"],
        coef_topk=c["coef_topk"],
        basis_threshold=c.get("basis_threshold", 0.02),
        prune_rows=c.get("prune_row", False),
        token_keep=tuple(c["token_keep_rate_list"]),
        prune_at=tuple(i for i, prunes in enumerate(c["token_pruning_loc_indicator"]) if prunes),
    )
    return Sparsifiner(config).load_authors(case.state)


@torch.no_grad()
def model(case: Case) -> dict[str, Tensor]:
    net = build(case).eval()
    done = net.run(case.inputs["x"], trace=True)
    quick = net.run(case.inputs["x"])
    torch.testing.assert_close(quick.logits, done.logits)
    results = {"output.logits": quick.logits, "output.features": quick.tokens}
    for i, visit in enumerate(done.visits):
        assert visit.trace is not None
        results[f"output.attn_mask{i}"] = visit.trace.mask
        results[f"output.masked_attn{i}"] = visit.trace.masked
        if visit.token_mask is not None:
            results[f"output.token_mask{i}"] = visit.token_mask
    return results


def both_phases(case: Case) -> dict[str, Tensor]:
    inputs, depth = case.inputs, case.config["depth"]
    teaching = Teaching(
        inputs["teacher_logits"], inputs["teacher_tokens"], [inputs[f"teacher_attn{i}"] for i in range(depth)]
    )
    weights = LossWeights(**case.config["weights"])
    results = {}
    for phase in ("attn_recon", "cls_distill"):
        net = build(case).train()
        for part in predictors(net):
            part.reconstructing = phase == "attn_recon"
        done = net.run(inputs["x"], trace=True)
        found = losses(done, inputs["labels"], teaching, weights.for_phase(phase))
        found["loss"].backward()
        results |= {f"output.{phase}.{name}": value.detach() for name, value in found.items()}
        results[f"output.{phase}.logits"] = done.logits.detach()
        for i, trace in enumerate(done.traces):
            results[f"output.{phase}.approx_attn{i}"] = trace.connectivity.scores.detach()
        for name, parameter in net.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            results[f"grad.{phase}.{name}"] = grad
    return {name: value for name, value in results.items() if name in case.tensors}

"""ACMIL with gated and with multi-head attention against the authors' classes and losses."""

from __future__ import annotations

import re

import torch
from case import Case
from torch import Tensor

from heed.predict.acmil import ACMIL, ACMILConfig


def run(case: Case) -> dict[str, Tensor]:
    arch = {"gated_attention": "ga", "multi_head": "mha"}.get(case.kind)
    if arch is None:
        raise ValueError(f"unknown kind {case.kind!r}")
    model = _model(case, arch)
    x = case.inputs["x"].requires_grad_()
    # The authors draw (branches, k) for gated attention, and (heads, k) once for every branch else.
    drawn = case.group("rand.stkim")
    rows = [drawn[i][:, None] if arch == "ga" else drawn[i] for i in sorted(drawn, key=int)]
    draws = (rows[0] if arch == "ga" else torch.stack(rows))[None] if rows else None
    output = model.train(draws is not None)(x, draws=draws)
    losses = model.losses(output, case.inputs["label"])
    losses.total.backward()
    branches = output.branch_logits
    assert branches is not None
    results = {
        "output.sub_preds": branches[0],
        "output.slide_pred": output.logits,
        "output.attn_logits": output.attention[0].transpose(0, 1),
        "output.loss_sub": losses.branch,
        "output.loss_slide": losses.slide,
        "output.loss_diff": losses.diversity,
        "output.loss": losses.total,
        "grad.x": x.grad,
    }
    if arch == "ga":
        with torch.no_grad():
            results["output.bag_feature_eval"] = model.eval()(x).features
    # Of the parameters, a case holds what the classifiers, the attention's last layer and the queries get.
    for theirs in filter(re.compile(r"(Slide_)?classifier\.|attention\.attention_weights\.|q$").match, case.state):
        gradient = model.get_parameter(str(ACMIL.authors_key(theirs))).grad
        if gradient is not None:
            results[f"grad.{theirs}"] = gradient
    return {name: value.detach() for name, value in results.items() if value is not None}


def _model(case: Case, arch: str) -> ACMIL:
    c = case.config
    config = ACMILConfig(
        in_features=c["D_feat"],
        dim=c["D_inner"],
        num_classes=c["n_class"],
        hidden=c.get("D", 128),
        arch=arch,
        n_token=c["n_token"],
        n_masked_patch=c["n_masked_patch"],
        mask_drop=c["mask_drop"],
        num_heads=c.get("num_heads", 8),
        dropout=0.0,
    )
    return ACMIL(config).load_authors(case.state, case.name)

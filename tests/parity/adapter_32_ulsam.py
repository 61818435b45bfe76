"""Subspace attention against the authors' module, in evaluation and in training."""

from __future__ import annotations

import copy

import torch
from case import Case
from torch import Tensor

from heed.layers.ulsam import ULSAM


def run(case: Case) -> dict[str, Tensor]:
    if case.kind != "ulsam":
        raise ValueError(f"unknown kind {case.kind!r}")
    layer = ULSAM(case.config["nin"], case.config["num_splits"]).eval()
    layer.load_authors(case.state)
    x = case.inputs["x"].requires_grad_()
    y = layer(x)
    (y * case.inputs["cotangent"]).sum().backward()
    with torch.no_grad():
        attention = layer.attention(x)
        training = copy.deepcopy(layer).train()
        y_train = training(x)
    first = layer.channels // layer.groups
    return {
        "output.attention": attention,
        "output.y": y.detach(),
        "output.y_train": y_train,
        "output.bn_dws0_running_var_after_train": training.bn_dws.running_var[:first],  # type: ignore[index]
        "grad.x": x.grad,  # type: ignore[dict-item]
    }

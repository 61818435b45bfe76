"""Polarized self-attention and an HRNet block with it against the authors' code."""

from __future__ import annotations

import torch
from case import Case
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from heed.layers.psa import PSA, insert_psa, load_authors


def run(case: Case) -> dict[str, Tensor]:
    return {"psa_p": layer, "psa_s": layer, "basic_block": block}[case.kind](case)


def layer(case: Case) -> dict[str, Tensor]:
    psa = PSA(case.config["planes"], "parallel" if case.kind == "psa_p" else "sequential").eval()
    load_authors(psa, case.state)
    x = case.inputs["x"].requires_grad_()
    y = psa(x)
    (y * case.inputs["cotangent"]).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        channel, spatial = psa.masks(x)
        channel_out = psa.channel(x)
        spatial_out = psa.spatial(x if psa.layout == "parallel" else channel_out)
    return {
        "output.channel_mask": channel,
        "output.channel_out": channel_out,
        "output.spatial_mask": spatial,
        "output.spatial_out": spatial_out,
        "output.y": y.detach(),
        "grad.x": x.grad,
    }


@torch.no_grad()
def block(case: Case) -> dict[str, Tensor]:
    width_in, width, stride = (case.config[key] for key in ("inplanes", "planes", "stride"))
    shortcut = None
    if case.config["downsample"]:
        shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    residual = BasicBlock(width_in, width, stride, shortcut).eval()
    insert_psa(residual)
    load_authors(residual, case.state)
    seen = {}
    residual.aa.register_forward_hook(lambda module, inputs, output: seen.update(after=output))
    return {"output.y": residual(case.inputs["x"]), "output.after_attention": seen["after"]}

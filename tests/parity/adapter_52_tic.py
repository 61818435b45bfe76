"""MSA-Conv's two operators, its heads and its layer against the authors' operator and layer."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.msa_conv import msa_conv, msa_conv_av, msa_conv_qk
from heed.layers.tic import MSAConv2d


def run(case: Case) -> dict[str, Tensor]:
    return {"op": operators, "msa_conv": heads, "tic_layer": layer}[case.kind](case)


def operators(case: Case) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for name, c in case.config.items():
        window = c["kernel_size"], c["dilation"]
        q, k, v = (case.inputs[f"{name}.{key}"].clone().requires_grad_() for key in "qkv")
        dots = msa_conv_qk(q, k, *window)
        out = msa_conv_av((dots * c["channels"] ** -0.5).softmax(1), v, *window)
        (out * case.inputs[f"{name}.grad_out"]).sum().backward()
        results |= {f"output.{name}.dots": dots.detach(), f"output.{name}.out": out.detach()}
        results |= {f"grad.{name}.{key}": x.grad for key, x in zip("qkv", (q, k, v), strict=True)}  # type: ignore[misc]
    return results


def heads(case: Case) -> dict[str, Tensor]:
    c = case.config
    q, k, v = (case.inputs[key] for key in "qkv")
    return {"output.out": msa_conv(q, k, v, c["kernel_size"], c["dilation"], heads=c["heads"])}


@torch.no_grad()
def layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = MSAConv2d(
        c["input_channel"],
        c["output_channel"],
        c["kernel_size"],
        c["stride"],
        c["dilation"],
        padding=c["padding"],
        bias=c.get("bias", False),
    ).eval()
    load_weights(module, case.state, case.name)
    x = case.inputs["x"]
    return {"output.attention": module.attention(x), "output.mixed": module.mixed(x), "output.y": module(x)}

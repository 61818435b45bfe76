"""NATTEN's fused and unfused functions, its masks, its merge and its module against the authors' code."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.engine.patterns import Neighborhood
from heed.layers import natten
from heed.layers.neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D


def run(case: Case) -> dict[str, Tensor]:
    kinds = {"fused": _fused, "windows": _windows, "merge": _merge, "module": _module, "unfused": _unfused}
    return kinds[case.kind](case)


def _fused(case: Case) -> dict[str, Tensor]:
    results = {}
    for tag, c in case.config.items():
        inputs = _leaves(case, tag)
        function = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(c["layout"])]
        out, lse = function(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            tuple(c["kernel_size"]),
            tuple(c["stride"]),
            tuple(c["dilation"]),
            tuple(c["is_causal"]),
            c["scale"],
            inputs.get("add_k"),
            inputs.get("add_v"),
            return_lse=True,
        )
        results |= {f"output.{tag}.out": out.detach(), f"output.{tag}.lse": lse.detach()}
        results |= _gradients(case, tag, out, inputs)
    return results


def _windows(case: Case) -> dict[str, Tensor]:
    results = {}
    for tag, c in case.config.items():
        settings = (tuple(c[key]) for key in ("layout", "kernel_size", "dilation", "stride", "is_causal"))
        pattern = Neighborhood(*settings)
        tokens = torch.Size(pattern.grid).numel()
        results[f"output.{tag}"] = pattern.mask(tokens).to(torch.uint8)
    return results


def _merge(case: Case) -> dict[str, Tensor]:
    parts = range(case.config["num_splits"])
    out, lse = natten.merge_attentions([case.inputs[f"out{i}"] for i in parts], [case.inputs[f"lse{i}"] for i in parts])
    return {"output.out": out, "output.lse": lse}


def _module(case: Case) -> dict[str, Tensor]:
    c, x = case.config, case.inputs["x"].requires_grad_()
    classes = {3: NeighborhoodAttention1D, 4: NeighborhoodAttention2D, 5: NeighborhoodAttention3D}
    layer = classes[x.ndim](
        c["embed_dim"],
        c["num_heads"],
        tuple(c["kernel_size"]),
        stride=tuple(c["stride"]),
        dilation=tuple(c["dilation"]),
        is_causal=tuple(c["is_causal"]),
        rel_pos_bias="rpb" in case.state,
        qkv_bias="qkv.bias" in case.state,
        qk_scale=c.get("qk_scale"),
    ).eval()
    load_weights(layer, case.state, case.name)
    y = layer(x)
    results = {"output.y": y.detach()}
    if "grad_output" in case.inputs:
        y.backward(case.inputs["grad_output"])
        results |= {f"grad.{name}": p.grad for name, p in [("x", x), *layer.named_parameters()] if p.grad is not None}
    return results


def _unfused(case: Case) -> dict[str, Tensor]:
    results = {}
    for tag, c in case.config.items():
        inputs = _leaves(case, tag)
        rank = len(c["layout"])
        qk = {1: natten.na1d_qk, 2: natten.na2d_qk, 3: natten.na3d_qk}[rank]
        av = {1: natten.na1d_av, 2: natten.na2d_av, 3: natten.na3d_av}[rank]
        kernel, dilation, causal = (tuple(c[key]) for key in ("kernel_size", "dilation", "is_causal"))
        logits = qk(inputs["q"], inputs["k"], kernel, dilation, inputs.get("add_k"), causal, inputs.get("rpb"))
        out = av(logits.softmax(-1), inputs["v"], kernel, dilation, inputs.get("add_v"), causal)
        results |= {f"output.{tag}.logits": logits.detach(), f"output.{tag}.out": out.detach()}
        results |= _gradients(case, tag, out, inputs)
    return results


def _leaves(case: Case, tag: str) -> dict[str, Tensor]:
    return {
        name: x if name == "grad_out" else x.clone().requires_grad_() for name, x in case.group(f"input.{tag}").items()
    }


def _gradients(case: Case, tag: str, out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that the case holds, of (out * grad_out).sum()."""
    wanted = case.group(f"grad.{tag}")
    if not wanted:
        return {}
    grads = torch.autograd.grad(out, [inputs[name] for name in wanted], inputs["grad_out"])
    return {f"grad.{tag}.{name}": grad for name, grad in zip(wanted, grads, strict=True)}

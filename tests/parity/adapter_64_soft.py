"""SOFT's kernel, its Newton inverses and a small backbone against the authors' code."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.soft import SoftKernel, authors_key, newton_inverse, normalised_newton_inverse
from heed.vision.soft import Soft, SoftConfig


def run(case: Case) -> dict[str, Tensor]:
    kinds = {"attention_ratio2": _kernel, "attention_norm": _kernel, "newton": _newton, "model_tiny": _model}
    return kinds[case.kind](case)


def _kernel(case: Case) -> dict[str, Tensor]:
    c = case.config
    kernel = SoftKernel(
        c["dim"] // c["num_heads"],
        c["num_heads"],
        c["ratio"],
        c["use_conv"] or 0,
        iterations=c["max_iter"],
        normalised=case.kind == "attention_norm",
    )
    load_weights(kernel, {authors_key(key): value for key, value in case.state.items()}, case.name)
    q, v = (case.inputs[name].requires_grad_() for name in "QV")
    x = kernel(q, v, c["H"], c["W"])
    (x * case.inputs["cotangent"]).sum().backward()
    assert q.grad is not None
    assert v.grad is not None
    with torch.no_grad():
        low_rank = kernel.low_rank(q, c["H"], c["W"])
        return {
            "output.landmarks": low_rank.landmarks,
            "output.kernel_NM": low_rank.tokens,
            "output.kernel_MM": low_rank.kernel,
            "output.inverse": low_rank.inverse,
            "output.low_rank": kernel.mix(q, v, c["H"], c["W"]),
            "output.X": x.detach(),
            "grad.Q": q.grad,
            "grad.V": v.grad,
        }


def _newton(case: Case) -> dict[str, Tensor]:
    results = {}
    for iterations in case.config["iterations"]:
        kernel = case.inputs["P"].clone().requires_grad_()
        inverse = newton_inverse(kernel, iterations)
        (results[f"grad.P{iterations}"],) = torch.autograd.grad(inverse, kernel, case.inputs["cotangent"])
        results[f"output.inverse{iterations}"] = inverse.detach()
    for name in case.tensors:
        if name.startswith("output.norm_inverse"):
            iterations = int(name.removeprefix("output.norm_inverse"))
            results[name] = normalised_newton_inverse(case.inputs["P"], iterations)
    return results


@torch.no_grad()
def _model(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = SoftConfig(
        img_size=c["img_size"],
        in_chans=c["in_chans"],
        num_classes=c["num_classes"],
        dims=tuple(c["embed_dims"]),
        depths=tuple(c["depths"]),
        num_heads=tuple(c["num_heads"]),
        ratios=tuple(c["sr_ratios"][:-1]),
        stem_stride=c["patch_size"],
        mlp_ratio=c["mlp_ratios"][-1],
        qkv_bias=c["qkv_bias"],
    )
    model = Soft(config).load_authors(case.state).eval()
    results = {}
    for i in range(1, len(config.dims) + 1):

        def keep(_: object, __: object, tokens: Tensor, name: str = f"output.block{i}") -> None:
            results[name] = tokens.flatten(1, -2)

        model.get_submodule(f"stages.{i - 1}.blocks").register_forward_hook(keep)
    x = case.inputs["x"]
    results["output.logits"] = model(x)
    results["output.features"] = model.forward_features(x).flatten(1)
    return results

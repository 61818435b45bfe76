"""Terminator's block, a whole small model with its losses, and Kar's optimisers against the author's code."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from torch import Tensor, nn

from heed.checkpoint import load_weights
from heed.vision.terminator import Terminator, TerminatorConfig
from heed.vision.terminator_training import Kar2, Kar3, slow_neural_loss, terminator_loss


def run(case: Case) -> dict[str, Tensor]:
    kinds = {"sfne_block": _block, "sfne_block_first": _block, "model_tiny": _model, "kar_optimizers": _optimizers}
    return kinds[case.kind](case)


def _block(case: Case) -> dict[str, Tensor]:
    index = case.config["block_index"]
    x = case.inputs["x"].requires_grad_()
    block = next(b for i, b in enumerate(Terminator(_config(case.config)).sfne_blocks()) if i == index).eval()
    # A block of the author's is one of a network's, where its names are known.
    names = {f"blocks.0.{key}": value for key, value in case.state.items()}
    weights = {str(Terminator.authors_key(k)).removeprefix("blocks.0."): v for k, v in names.items()
               if Terminator.authors_key(k) is not None}  # fmt: skip
    load_weights(block, weights, case.name)
    previous = [case.inputs[name] for name in ("x_pre", "x_pre_pre") if name in case.inputs]

    kernel, context, fast = block.operator.parts(x)
    mix, hci = block.sources(x)
    branches = block.branches(x, *previous)
    bottleneck = block.bottleneck(torch.cat(list(branches.values()), 1))
    y = block(x, *previous)
    (y * case.inputs["cotangent"]).sum().backward()
    found = {"global_hk": kernel, "global_ctx_hk": context, "fast": fast, "mixer_x": mix, "x_hci": hci}
    found |= {name: branches[name] for name in ("out", "out_x", "out_hci", "out_glu", "fast")}
    found |= {"x_hyper": branches["hyper"], "bottleneck": bottleneck, "gibs": block.norm(bottleneck), "y": y}
    for i, (local, source) in enumerate(zip(block.local_branches(), (x, hci, mix, x), strict=True), 1):
        found |= {f"local_kernel{i}": local.slow(source), f"local{i}": branches[f"local{i}"]}
    assert x.grad is not None
    return {"grad.x": x.grad} | {f"output.{name}": value.detach() for name, value in found.items()}


def _model(case: Case) -> dict[str, Tensor]:
    model = Terminator(_config(case.config)).load_authors(case.state).eval()
    x, labels = case.inputs["x"], case.inputs["labels"]
    loss, logits = terminator_loss(model, x, labels)
    loss.total.backward()
    kernels = model.global_kernels()
    head, first = model.head, next(model.sfne_blocks()).operator.slow.output
    assert isinstance(head, nn.Linear)
    assert head.weight.grad is not None
    assert first.weight.grad is not None
    found = {f"block{i}": maps for i, maps in enumerate(model.stage_maps(x))}
    found |= {f"global_hk{i}": kernel for i, kernel in enumerate(kernels)}
    found |= {"logits": logits, "slow_loss": loss.slow, "ce": loss.cross_entropy, "reg": loss.weights}
    found |= {"slow_loss_channel_sum": slow_neural_loss(kernels, "channel_sum")}
    return {f"output.{name}": value.detach() for name, value in found.items()} | {
        "grad.out_layer.weight": head.weight.grad,
        "grad.block0_slow_net_g_output_linear.weight": first.weight.grad,
    }


def _optimizers(case: Case) -> dict[str, Tensor]:
    settings = case.config
    kinds = {
        "kar3": lambda p: Kar3([p], settings["kar3"]["lr"], tuple(settings["kar3"]["betas"])),
        "kar2": lambda p: Kar2([p], settings["kar2"]["lr"], settings["kar2"]["betas"]),
    }
    results = {}
    for name, make in kinds.items():
        p = nn.Parameter(case.inputs[f"{name}.p0"].clone())
        optimizer = make(p)
        trajectory = []
        for grad in case.inputs[f"{name}.grads"]:
            p.grad = grad.clone()
            optimizer.step()
            trajectory.append(p.detach().clone())
        results[f"output.{name}.trajectory"] = torch.stack(trajectory)
    return results


def _config(config: dict[str, Any]) -> TerminatorConfig:
    """The author's settings file as a TerminatorConfig."""
    net, block = config["net_cfg"], config["net_cfg"]["block"]
    g, local, gc = config["kernel_cfg_g"], config["kernel_cfg_l"], config["kernel_cfg_gc"]
    gc_hi, gs_hi = config["kernel_cfg_gc_hi"], config["kernel_cfg_gs_hi"]
    widths, factors = block["in_channel"], block["bottleneck_factors"]
    return TerminatorConfig(
        img_size=g["size"],
        in_chans=widths[0],
        num_classes=config.get("out_channels", 10),
        dims=tuple(width * factor for width, factor in zip(widths, factors, strict=True)),
        previous=tuple(block["num_concat_pre"]),
        local_sizes=tuple(local["sizes"]),
        global_hidden=g["no_hidden"],
        global_layers=tuple(g["num_layers_list"]),
        local_hidden=local["no_hidden"],
        local_layers=local["num_layers"],
        channel_hidden=gc["no_hidden"],
        channel_layers=gc["num_layers"],
        interaction_channel_hidden=gc_hi["no_hidden"],
        interaction_spatial_hidden=64,  # written into the author's code, whatever the settings say
        interaction_layers=gs_hi["num_layers"],
        dropout=tuple(net["dropout"]),
        omega=1.0,
    )

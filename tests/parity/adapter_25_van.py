"""Large kernel attention, its block and a small VAN against the authors' modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.lka import VANAttention
from heed.vision.van import VAN, VANBlock, VANConfig


def run(case: Case) -> dict[str, Tensor]:
    return {"attention_lka": attention, "block": block, "model_tiny": model}[case.kind](case)


def attention(case: Case) -> dict[str, Tensor]:
    module = VANAttention(case.config["d_model"]).eval()
    load_weights(module, case.state, case.name)
    x = case.inputs["x"].clone().requires_grad_()
    y = module(x)
    y.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        inner = F.gelu(module.proj_1(x))
        lka = module.spatial_gating_unit
        return {
            "output.lka_in": inner,
            "output.gate": lka.gate(inner),
            "output.lka": lka(inner),
            "output.y": y.detach(),
            "grad.x": x.grad,
        }


@torch.no_grad()
def block(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = VANBlock(VANAttention(c["dim"]), c["mlp_ratio"], c["drop"], c["drop_path"])
    # A block of the authors' is one of a network's, where their names are known.
    prefix = "stages.0.blocks.0."
    weights = {str(VAN.authors_key(f"block1.0.{key}")).removeprefix(prefix): value for key, value in case.state.items()}
    load_weights(module, weights, case.name)
    x = case.inputs["x"]
    evaluated = module.eval()(x)
    trained = module.train()(x)
    assert module.norm1.running_mean is not None
    assert module.norm1.running_var is not None
    return {
        "output.eval": evaluated,
        "output.train": trained,
        "output.norm1_running_mean_after_train": module.norm1.running_mean,
        "output.norm1_running_var_after_train": module.norm1.running_var,
    }


@torch.no_grad()
def model(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = VANConfig(
        img_size=c["img_size"],
        in_chans=c["in_chans"],
        num_classes=c["num_classes"],
        dims=tuple(c["embed_dims"]),
        mlp_ratios=tuple(c["mlp_ratios"]),
        depths=tuple(c["depths"]),
        drop=c["drop_rate"],
        drop_path=c["drop_path_rate"],
        norm_eps=float(c["norm_layer"].partition("eps=")[2].rstrip(")") or 1e-5),
    )
    net = VAN(config).load_authors(case.state).eval()
    x = case.inputs["x"]
    results = {f"output.stage{i + 1}": stage for i, stage in enumerate(net.stage_maps(x))}
    features = net.forward_features(x)
    return results | {"output.features": net.forward_head(features, pre_logits=True), "output.logits": net(x)}

"""Subsampled attention: its rules with given draws, and the authors' graph transformers with theirs."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.language.self_ensemble import average_members
from heed.layers.egt import EGT, EGTConfig, EGTLayer, egt_from_authors
from heed.layers.subsampled import Blocks, Draw, Sources
from heed.layers.subsampling import Subsampling, local_order


def run(case: Case) -> dict[str, Tensor]:
    return KINDS[case.kind](case)


def rules(case: Case) -> dict[str, Tensor]:
    c, x, rand = case.config, case.inputs, case.group("rand")
    q, k, v = x["q"], x["k"], x["v"]
    order = local_order(rand["noise"], c["sigma"], c["shift"])
    draws: dict[str, Draw] = {
        "unbiased": Sources(rand["permutation"][:, : c["keep"]]),
        "local": Blocks(order, c["window"]),
        "dense": Subsampling(ratio=1.0).draw(c["batch"], c["length"]),
    }
    results = {"output.local_order": order.int()}
    for name, draw in draws.items():
        results[f"output.{name}"] = draw.attend(q, k, v)
        results[f"output.{name}_causal"] = draw.attend(q, k, v, causal=True)
    for average in ("probabilities", "values"):
        results[f"output.ensemble_{average}"] = average_members(list(x["member_logits"]), average)
    return results


def source_dropout(case: Case) -> dict[str, Tensor]:
    c = case.config
    model = EGT(
        EGTConfig(
            c["node_width"],
            c["edge_width"],
            c["num_heads"],
            activation=c["activation"],
            node_multiplier=c["node_ffn_multiplier"],
            edge_multiplier=c["edge_ffn_multiplier"],
            scale_degree=c["scale_degree"],
            source_dropout=c["source_dropout"],
            dropout=c["node_act_dropout"],
        ),
        c["model_height"],
        c["drop_path"],
    )
    load_weights(model, egt_from_authors(case.state), "the case")
    node_mask = case.inputs["node_mask"].bool()
    pair_mask = (node_mask[:, :, None] & node_mask[:, None])[..., None]
    rand = case.group("rand")
    h, e = (case.inputs[name].requires_grad_() for name in ("h", "e"))
    results, members = {}, []
    for sample in range(len({key.split(".")[0] for key in rand})):
        dropped = [rand[f"sample{sample}.layer{layer}.dropped"].bool() for layer in range(c["model_height"])]
        new_h, new_e = model(h, e, node_mask, dropped)
        new_h, new_e = new_h * node_mask[..., None], new_e * pair_mask
        members.append(new_h.detach())
        results[f"output.sample{sample}.h"] = new_h.detach()
        if sample == 0:
            results["output.sample0.e"] = new_e.detach()
            results["grad.h"], results["grad.e"] = torch.autograd.grad(new_h.sum() + new_e.sum(), [h, e])
    with torch.no_grad():
        dense_h, dense_e = model.eval()(h, e, node_mask)
    results["output.ensemble.h"] = average_members(members, "values")
    return results | {"output.dense.h": dense_h * node_mask[..., None], "output.dense.e": dense_e * pair_mask}


@torch.no_grad()
def connection_maskout(case: Case) -> dict[str, Tensor]:
    c = case.config
    if not c["scale_dot"]:
        raise NotImplementedError("scores that are not scaled are not part of heed")
    layer = EGTLayer(
        EGTConfig(
            c["node_width"],
            c["edge_width"],
            c["num_heads"],
            activation=c["activation"],
            node_multiplier=c["node_ffn_multiplier"],
            edge_multiplier=c["edge_ffn_multiplier"],
            scale_degree=c["scale_degree"],
            clip=tuple(c["clip_logits_value"]),
            connection_dropout=c["attn_maskout"],
        )
    )
    load_weights(layer, egt_from_authors(case.state), "the case")
    x = case.inputs
    h, e = layer(x["h"], x["e"], lost=case.group("rand")["dropped"].bool())
    dense_h, dense_e = layer.eval()(x["h"], x["e"])
    return {"output.h": h, "output.e": e, "output.dense.h": dense_h, "output.dense.e": dense_e}


KINDS = {
    "ssa_rules": rules,
    "egt_source_dropout": source_dropout,
    "egt_connection_maskout": connection_maskout,
}

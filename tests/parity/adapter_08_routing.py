"""Routing Transformer against the authors' TensorFlow code and the PyTorch package."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.language.routing import (
    PackageConfig,
    PackageLM,
    RoutingAttention,
    RoutingConfig,
    RoutingSettings,
    RoutingTransformerLM,
    from_tensorflow,
)

_SCOPE = "multihead_attention_nd/"
_RELATIVE = {
    "cluster": "sparsity_cluster_relative",
    "cluster_strided": "sparsity_cluster_strided_relative",
    "strided": "sparsity_strided_relative",
    "local": "local_relative",
}


def run(case: Case) -> dict[str, Tensor]:
    kinds = {
        "tf_causal_train": layer,
        "tf_encoder_eval": layer,
        "tf_lm_eval": language,
        "pt_lm_causal_shared_qk": package,
    }
    if case.kind not in kinds:
        raise ValueError(f"no adapter for kind {case.kind!r}")
    return kinds[case.kind](case)


def heads(c: dict[str, Any], relative: bool) -> dict[str, Any]:
    """The settings that layers and language models name alike; `relative` is the default of the switches."""
    return {
        "cluster_heads": c.get("sparsity_cluster_num_heads", 0),
        "cluster_strided_heads": c.get("sparsity_cluster_strided_num_heads", 0),
        "strided_heads": c.get("sparsity_strided_num_heads", 0),
        "local_heads": c.get("local_num_heads", 0),
        "clusters": c.get("sparsity_cluster_size", 1),
        "window": c.get("sparsity_cluster_attention_window", 1),
        "block": tuple(c["query_shape"]),
        "flange": tuple(c["memory_flange"]),
        "relative": tuple(kind for kind, name in _RELATIVE.items() if c.get(name, relative)),
        "max_relative": c.get("max_relative_position"),
        "share_qk": c.get("share_qk", True),
        "hash_items": c.get("hash_items", False),
        "beta": c.get("beta", 1e-4),
        "decay": c.get("decay", 0.999),
        "ema": c.get("ema", True),
    }


def layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    model = RoutingAttention(RoutingSettings(dim=c["total_key_depth"], masked=c["masked"], **heads(c, relative=False)))
    load_weights(model, from_tensorflow(case.state, _SCOPE), case.name)
    model.train(c["mode"] == "train")
    x = case.inputs["x"].clone().requires_grad_()
    padding = case.inputs.get("padding_bias")
    y, loss = model(x, padding=None if padding is None else padding > 0)
    ((y * case.inputs["grad_weight"]).sum() + 1000 * loss).backward()
    assert x.grad is not None
    results = {"output.y": y.detach(), "output.cluster_loss": loss.detach().view(1), "grad.x": x.grad}
    own = model.state_dict()
    for name in case.group("output.updated"):
        (key,) = from_tensorflow({name: own[next(iter(own))]}, _SCOPE)
        results[f"output.updated.{name}"] = own[key]
    return results


def language(case: Case) -> dict[str, Tensor]:
    c = case.config
    if (c.get("layer_preprocess_sequence", "none"), c.get("layer_postprocess_sequence", "dan")) != ("none", "dan"):
        raise NotImplementedError("heed has the released order of layers only: none before, dan after")
    config = RoutingConfig(
        **heads(c, relative=True),
        dim=c["hidden_size"],
        embed_dim=c["embedding_dims"],
        ffn_dim=c["filter_size"],
        layers=c["num_decoder_layers"],
        skip_first=c.get("sparsity_skip_first", 0),
        vocab=c["vocab_size"],
        length=c["max_target_length"],
    )
    model = RoutingTransformerLM(config).load_authors(case.state).eval()
    with torch.no_grad():
        score = model.score(case.inputs["ids"].long())
    return {
        "output.logits": score.logits,
        "output.loss_ce": score.cross_entropy.view(1),
        "output.loss_extra": score.clustering.view(1),
    }


def package(case: Case) -> dict[str, Tensor]:
    c = case.config
    local = c.get("n_local_attn_heads", 0)
    config = PackageConfig(
        vocab=c["num_tokens"],
        dim=c["dim"],
        layers=c["depth"],
        length=c["max_seq_len"],
        heads=c["heads"],
        head_dim=c["dim_head"],
        window=c["window_size"],
        local_window=c["local_attn_window_size"],
        local_heads=tuple(local) if isinstance(local, list) else local,
        causal=c["causal"],
        share_qk=c.get("shared_qk"),
        glu=c["ff_glu"],
        decay=c["kmeans_ema_decay"],
        rotary=c["rel_pos_emb"],
        memory=c.get("num_mem_kv", 0),
    )
    model = PackageLM(config).load_authors(case.state).train()
    logits = model(case.inputs["ids"].long(), case.inputs["mask"].bool())
    aux = model.auxiliary_loss
    ((logits * case.inputs["grad_weight"]).sum() + 1000 * aux).backward()  # the centroids move with it
    assert model.token_emb.weight.grad is not None
    results = {
        "output.logits": logits.detach(),
        "output.aux_loss": aux.detach().view(1),
        "grad.token_emb": model.token_emb.weight.grad,
    }
    own = model.state_dict()
    for name in case.group("output.updated"):
        results[f"output.updated.{name}"] = own[str(PackageLM.authors_key(name))]
    return results

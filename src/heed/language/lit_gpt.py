"""Weights of lit-gpt, in which the authors of selective attention (card 18) trained, in transformers' models.

    transformer.h.L.attn.attn.weight  (G (H / G + 2) d, C)   per group: its query heads, one key head, one value head
    transformer.h.L.attn.beta         ()                     g = exp(-exp(beta)), the temperature of the layer's queries

Llama's q_proj, k_proj and v_proj are cut from the fused matrix; GPT-NeoX has it as it is; GPT-2's are transposed, since
transformers' Conv1D multiplies from the other side. The authors published no checkpoints: these are the names of their
code (umich-sota/selective_attention).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.language.selective import SelectiveTemperatures
from heed.methods import Handle, apply

_LLAMA = {
    "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head",
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
}  # fmt: skip
_NEOX = {
    "transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm", "lm_head": "lm_head",
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.attn": "attention.query_key_value",
    "attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h",
}  # fmt: skip
_BLOCKS = {"llama": "model.layers", "mistral": "model.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@provides("18-selective-ssa")
def load_lit_gpt(model: nn.Module, weights: dict[str, Tensor]) -> Handle:
    """Load the authors' weights into a model of transformers, and give its queries their temperatures.

    Args:
        model: Llama, Mistral, GPT-NeoX (Pythia) or GPT-2, for causal language modelling, of the same sizes.
        weights: by lit-gpt's names, with one `attn.beta` per layer, as `heed.checkpoint.read_weights` reads them.

    Returns:
        The handle of the temperatures; their `alpha` is the authors' beta.

    Raises:
        ValueError: another kind of model, or weights that do not fit it.
    """
    host, betas = lit_gpt_weights(model, weights)
    handle = apply(model, SelectiveTemperatures(query=("position",), value=(), position="exp_exp"))
    try:
        if betas.keys() != handle.state.layers.keys():
            raise ValueError(
                f"the weights have beta in layers {sorted(betas)}, the model {len(handle.state.layers)} layers"
            )
        ours = {name: value for name, value in model.state_dict().items() if ".temperatures." in name}
        for number, key in enumerate(ours):
            ours[key] = betas[number].reshape(()).to(ours[key])
        load_weights(model, host | ours, "the checkpoint")
    except ValueError:
        handle.remove()
        raise
    return handle


@provides("18-selective-ssa")
def lit_gpt_weights(model: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Weights under transformers' names, and beta by layer.

    Args:
        model: whose kind and numbers of heads are read.
        weights: by lit-gpt's names.

    Raises:
        ValueError: another kind of model, or a name that it does not have.
    """
    kind = model.config.model_type
    if kind not in _BLOCKS:
        raise ValueError(f"lit-gpt's weights are for {', '.join(_BLOCKS)}, not for {kind}")
    found: dict[str, Tensor] = {}
    betas: dict[int, Tensor] = {}
    for key, value in weights.items():
        start, number, name = "", -1, key
        if key.startswith("transformer.h."):
            _, _, layer, name = key.split(".", 3)
            number, start = int(layer), f"{_BLOCKS[kind]}.{layer}."
        part, _, leaf = name.rpartition(".")
        if name == "attn.beta":
            betas[number] = value
        elif kind == "gpt2":
            found[start + name] = value.T if name.endswith(_TRANSPOSED) else value
        elif part == "attn.attn" and kind != "gpt_neox":
            projections = zip(("q_proj", "k_proj", "v_proj"), _unfused(value, model.config), strict=True)
            found |= {f"{start}self_attn.{projection}.{leaf}": piece for projection, piece in projections}
        else:
            names = _NEOX if kind == "gpt_neox" else _LLAMA
            if part not in names:
                raise ValueError(f"{key!r} is no weight that a {kind} has")
            found[f"{start}{names[part]}.{leaf}"] = value
    if kind == "gpt2":
        found.setdefault("lm_head.weight", found["transformer.wte.weight"])
    return found, betas


def _unfused(fused: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q (H d, ...), k and v (G d, ...) of a fused projection."""
    groups = config.num_key_value_heads
    per_group = config.num_attention_heads // groups
    parts = fused.unflatten(0, (groups, per_group + 2, -1))
    q, k, v = parts.split([per_group, 1, 1], 1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


@provides("18-selective-ssa")
def fused_qkv(q: Tensor, k: Tensor, v: Tensor, heads: int, groups: int) -> Tensor:
    """lit-gpt's fused projection (or its gradient) of q (H d, ...), k and v (G d, ...)."""
    parts = (x.unflatten(0, (groups, size, -1)) for x, size in ((q, heads // groups), (k, 1), (v, 1)))
    return torch.cat(list(parts), 1).flatten(0, 2)

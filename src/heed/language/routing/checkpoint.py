"""The authors' names: TensorFlow variables of google-research/routing_transformer, and keys of the PyTorch package.

    TensorFlow, official                                            here
    decoder_layer_0/self_attention/self_attention/q/kernel          blocks.0.attn.q.weight, transposed
    .../attention_nd/cluster_attention/cluster_attention/means      blocks.0.attn.routed.clusters.means
    .../attention_nd/local_nd/relative_positions_keys/embeddings    blocks.0.attn.local.relative.keys

    PyTorch, lucidrains                                             here
    routing_transformer.layers.layers.0.0.fn.to_q.weight            blocks.0.attn.to_q.weight
    routing_transformer.layers.layers.0.1.fn.fn.w1.weight           blocks.0.ffn.w1.weight

TensorFlow checkpoints have to be converted to safetensors first, under their own names; a leading
`sparse_transformer/body/` is dropped. The names of strided heads and of the ReLU network are heed's reading: no case
holds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from heed.catalogue import provides

_ATTENTION = [
    (r"attention_nd/cluster_attention/cluster_attention/", "routed/"),
    (r"attention_nd/cluster_strided_attention/cluster_strided_attention/", "routed_strided/"),
    (r"attention_nd/strided_attention/(strided_attention/)?", "strided/"),
    (r"attention_nd/local_nd/", "local/"),
    (r"attention_nd/dense/kernel", "mix/kernel"),
    (r"output_transform/kernel", "out/kernel"),
    (r"(routed|routed_strided)/(means|ema_count|ema_means)", r"\1/clusters/\2"),
    (r"relative_positions_(keys|values)/embeddings", r"relative/\1"),
]
_MODEL = [
    (r"^decoder_layer_(\d+)/self_attention/self_attention/", r"blocks/\1/attn/"),
    (r"^decoder_layer_(\d+)/self_attention/layer_postprocess/layer_norm/layer_norm_", r"blocks/\1/norm1/"),
    (r"^decoder_layer_(\d+)/self_attention/layer_postprocess_1/layer_norm/layer_norm_", r"blocks/\1/norm2/"),
    (r"^decoder_layer_(\d+)/self_attention/ffn/", r"blocks/\1/ffn/"),
    (r"/conv([12])/", r"/weight\1/"),
    (r"/scale$", "/weight"),
    (r"^embeddings/embedding$", "tokens/embed/weight"),
    (r"^emb_dense/", "tokens/embed_map/"),
    (r"^final_dense_1/", "unembed_map/"),
    (r"^final_dense_2/", "head/"),
]
_PACKAGE = [
    (r"^routing_transformer\.layers\.layers\.(\d+)\.0\.(norm|g)\b", r"blocks.\1.attn_\2"),
    (r"^routing_transformer\.layers\.layers\.(\d+)\.1\.(norm|g)\b", r"blocks.\1.ffn_\2"),
    (r"^routing_transformer\.layers\.layers\.(\d+)\.0\.fn\.", r"blocks.\1.attn."),
    (r"^routing_transformer\.layers\.layers\.(\d+)\.1\.fn\.(fn\.)?", r"blocks.\1.ffn."),
    (r"\.global_attn\.", "."),
]
# Tables that follow from the settings.
_DERIVED = re.compile(r"(^|\.)(sinu_pos_emb\.emb|rel_pos\.inv_freq)$")


@provides("08-routing")
def from_tensorflow(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """State dict for `RoutingTransformerLM`, or for `RoutingAttention`, from TensorFlow variables.

    Args:
        weights: variables by name; kernels are [in, out].
        prefix: scope to drop, such as "multihead_attention_nd/" of a single layer; others are left out.
    """
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not name.startswith(prefix):
            continue
        key = re.sub(r"^(.*/)?sparse_transformer/body/", "", name.removeprefix(prefix))
        for theirs, ours in (*_MODEL, *_ATTENTION):
            key = re.sub(theirs, ours, key)
        if key.endswith("/kernel"):
            key, value = key.removesuffix("kernel") + "weight", value.squeeze().T.contiguous()
        found[key.replace("/", ".")] = value
    return found


@provides("08-routing")
def package_key(key: str) -> str | None:
    """The name here of a key of lucidrains' `RoutingTransformerLM`; None for tables that follow from the settings."""
    if _DERIVED.search(key):
        return None
    for theirs, ours in _PACKAGE:
        key = re.sub(theirs, ours, key)
    return key

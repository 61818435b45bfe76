"""Checkpoints of NAT and DiNAT from elsewhere (card 58): windows of another size, transformers' names.

The models, whose `from_authors` reads the authors' files, are in `heed.vision.nat`.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from heed.catalogue import provides


@provides("58-dinat")
def resize_windows(weights: dict[str, Tensor], kernel_size: int) -> dict[str, Tensor]:
    """Weights for windows of another size: the tables of relative positions interpolated, everything else as it is.

    Bicubic with align_corners=False, as Swin does it; the authors say only that their 11x11 model was made by
    interpolation, so this is heed's reading.

    Args:
        weights: a state dict, in the authors' names or heed's; tables end in "attn.rpb".
        kernel_size: side of the new windows; odd.

    Raises:
        ValueError: a kernel_size that is even or below 3, or weights without tables.
    """
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size!r} must be an odd integer >= 3")
    tables = {key: value for key, value in weights.items() if key.endswith("attn.rpb")}
    if not tables:
        raise ValueError("these weights hold no tables of relative positions, whose names end in 'attn.rpb'")
    size = (2 * kernel_size - 1,) * 2
    resized = {
        key: F.interpolate(value[None].float(), size, mode="bicubic", align_corners=False)[0].to(value.dtype)
        for key, value in tables.items()
    }
    return weights | resized


# transformers' names and the authors'; the first that fits counts.
_TRANSFORMERS = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (r"encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"encoder\.levels\.", "levels."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.rpb", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


@provides("58-dinat")
def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' DinatModel, DinatForImageClassification or DinatBackbone in the authors' names.

    Queries, keys and values become one projection, the pair of layer scales two vectors. `NAT.from_authors` and
    `load_authors` call this by themselves. The optional norm of a DinatBackbone on its stem is left out.
    """
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix("dinat.").removeprefix("nat.")
        if name.startswith("hidden_states_norms."):
            _, stage, kind = name.split(".")
            if stage != "stem":
                named[f"norm{int(stage.removeprefix('stage')) - 1}.{kind}"] = value
            continue
        for theirs, ours in _TRANSFORMERS:
            name = re.sub(theirs, ours, name)
        if name.endswith(".layer_scale_parameters"):
            stem = name.removesuffix("layer_scale_parameters")
            named[f"{stem}gamma1"], named[f"{stem}gamma2"] = value
        else:
            named[name] = value
    for query in [name for name in named if ".attention.self.query." in name]:
        parts = [named.pop(query.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        named[query.replace(".attention.self.query.", ".attn.qkv.")] = torch.cat(parts)
    return named

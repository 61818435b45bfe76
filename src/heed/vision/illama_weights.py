"""Weights for iLLaMA from elsewhere (card 07): a larger LLaMA's, and positions for images of another size.

Wang et al., "Adapting LLaMA Decoder to Vision Transformer", 2024 (arXiv 2404.06773). The model is in `heed.vision.illama`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides

# Part of a block -> the parts of a LLaMA layer that it comes from.
LLAMA_NAMES = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc1": ("mlp.gate_proj",),
    "mlp.fc2": ("mlp.down_proj",),
    "mlp.fc3": ("mlp.up_proj",),
    "norm1": ("input_layernorm",),
    "norm2": ("post_attention_layernorm",),
}


@provides("07-illama")
def select_elements(teacher: Tensor, shape: Sequence[int]) -> Tensor:
    """The elements of a larger tensor at evenly spaced indices along every axis: indices 0, s, 2s, ... where the sizes
    divide with quotient s, else round(linspace(0, size - 1, count)).

    Args:
        teacher: any tensor.
        shape: of the result; as many axes, none longer than the teacher's.
    """
    if len(shape) != teacher.ndim or any(s > t for s, t in zip(shape, teacher.shape, strict=True)):
        raise ValueError(
            f"a teacher {tuple(teacher.shape)} cannot give {tuple(shape)}; none of its axes may be shorter"
        )
    for axis, count in enumerate(shape):
        size = teacher.shape[axis]
        if size % count == 0:
            index = torch.arange(count) * (size // count)
        else:
            index = torch.linspace(0, size - 1, count).round().long()
        teacher = teacher.index_select(axis, index.to(teacher.device))
    return teacher


@provides("07-illama")
def resize_positions(positions: Float[Tensor, "1 N C"], side: int, class_first: bool = False) -> Float[Tensor, "1 M C"]:
    """Position embeddings for side x side patches: bicubic from the old square grid; the class token keeps its slot."""
    old = math.isqrt(positions.shape[1] - 1)
    if old**2 + 1 != positions.shape[1]:
        raise ValueError(
            f"{positions.shape[1]} position embeddings are no square grid and one slot for the class token"
        )
    token, grid = positions.split([1, old**2], 1) if class_first else reversed(positions.split([old**2, 1], 1))
    maps = grid.transpose(1, 2).unflatten(2, (old, old))
    if side != old:
        maps = F.interpolate(maps.float(), (side, side), mode="bicubic", align_corners=False).to(positions.dtype)
    grid = maps.flatten(2).transpose(1, 2)
    return torch.cat([token, grid] if class_first else [grid, token], 1)

"""Multi-head self-attention under a pattern: one projection to q, k, v, the engine, one projection back.

q, k, v = x W_qkv        (B, heads, N, head_dim) each; columns ordered [q, k, v][head][channel]
y = softmax(scale * q k^T + bias, over the pattern's keys) v W_proj
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn

from heed.engine.attend import attend
from heed.engine.bias import Bias
from heed.engine.pattern import Pattern
from heed.engine.patterns import Full
from heed.layers.registry import layers


def check_heads(dim: int, num_heads: int) -> int:
    """The head width, or a ValueError when the heads do not divide the channels."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
    return dim // num_heads


class PatternAttention(nn.Module):
    """Self-attention whose subclasses say which pattern holds on a layout of tokens. This base class is dense.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        qkv_bias: whether the q, k, v projection has a bias.
        qk_scale: factor on q k^T, default head_dim ** -0.5.
        attn_drop: dropout on the weights while training.
        proj_drop: dropout on the output while training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.scale = qk_scale or self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def pattern(self, layout: tuple[int, ...]) -> Pattern:
        """The pattern on a layout: (N,) for a sequence, (rows, columns) for a grid."""
        return Full(layout)

    def bias(self) -> Bias | None:
        """What is added to the scores."""
        return None

    def forward(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... C"]:
        """Mix tokens; x is (B, *layout, C), e.g. (B, N, C) or (B, H, W, C)."""
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__} has dim={self.dim}, the input has {x.shape[-1]} channels; channels come last"
            )
        layout = tuple(x.shape[1:-1])
        tokens = math.prod(layout)
        q, k, v = self.qkv(x).view(x.shape[0], tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = self.mix(q, k, v, layout)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))

    def mix(
        self,
        q: Float[Tensor, "B heads N d"],
        k: Float[Tensor, "B heads N d"],
        v: Float[Tensor, "B heads N d"],
        layout: tuple[int, ...],
    ) -> Float[Tensor, "B heads N d"]:
        """Attention between the two projections."""
        dropout = self.attn_drop if self.training else 0.0
        return attend(q, k, v, self.pattern(layout), bias=self.bias(), scale=self.scale, dropout=dropout)


@layers.register("softmax")
def _softmax(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    return PatternAttention(dim, num_heads, **options)  # type: ignore[arg-type]

"""Neighborhood attention modules (card 13): each token attends to its nearest neighbours on a 1-D, 2-D or 3-D grid.

    y_i = sum_{j in neighborhood(i)} softmax_j(scale * q_i . k_j + rpb[i - j]) v_j W_proj

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023) and "Faster Neighborhood Attention" (NeurIPS 2024); stride
from "Generalized Neighborhood Attention" (arXiv 2504.16922). Parameter names are NATTEN's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.bias import Bias, RelativeBias
from heed.engine.checks import per_axis
from heed.engine.pattern import Pattern
from heed.engine.patterns import Neighborhood
from heed.layers.attention import PatternAttention
from heed.layers.registry import layers


class NeighborhoodAttention(PatternAttention):
    """Self-attention over neighborhoods; the classes with 1D, 2D and 3D in their names fix the number of axes.

    Args:
        dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop: as in `PatternAttention`.
        kernel_size: window per axis; kernel_size * dilation must fit the grid.
        dilation: step between the keys of a window, per axis.
        stride: queries that share a window, per axis.
        is_causal: whether an axis may look ahead, per axis.
        rel_pos_bias: add a learned table over relative positions (odd windows, no causal axis), as NAT and DiNAT do.
        pad: what happens where kernel_size * dilation exceeds the grid: True adds zero tokens at the bottom and right,
            which take part as keys, and cuts them off again (NATTEN 0.14, DiNAT's detectors); False raises ValueError.
    """

    rank: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, ...] = 7,
        *,
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
        rel_pos_bias: bool = False,
        pad: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=proj_drop)
        self.kernel_size = per_axis("kernel_size", kernel_size, self.rank, least=2)
        self.dilation = per_axis("dilation", dilation, self.rank)
        self.stride = per_axis("stride", stride, self.rank)
        self.is_causal = per_axis("is_causal", is_causal, self.rank, kind=bool)
        self.pad = pad
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            if any(self.is_causal):
                raise ValueError(f"rel_pos_bias is not defined with is_causal={self.is_causal}")
            if any(w % 2 == 0 for w in self.kernel_size):
                raise ValueError(f"rel_pos_bias needs odd windows, not kernel_size={self.kernel_size}")
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * w - 1 for w in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def pattern(self, layout: tuple[int, ...]) -> Pattern:
        if len(layout) != self.rank:
            raise ValueError(
                f"{type(self).__name__} takes {self.rank} axes of tokens, the input has {len(layout)}: {layout}"
            )
        return Neighborhood(layout, self.kernel_size, self.dilation, self.stride, self.is_causal)

    def bias(self) -> Bias | None:
        return None if self.rpb is None else RelativeBias(self.rpb)

    def padded(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The grid on which tokens of this grid attend: larger along axes that are too short for a window."""
        if not self.pad or len(grid) != self.rank:
            return grid
        return tuple(max(x, w * t) for x, w, t in zip(grid, self.kernel_size, self.dilation, strict=True))

    def forward(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... C"]:
        grid = tuple(x.shape[1:-1])
        large = self.padded(grid)
        if large == grid:
            return super().forward(x)
        missing = [side for y, x in zip(reversed(large), reversed(grid), strict=True) for side in (0, y - x)]
        y = super().forward(F.pad(x, (0, 0, *missing)))
        return y[(slice(None), *map(slice, grid))]


@provides("13-fna")
class NeighborhoodAttention1D(NeighborhoodAttention):
    """(B, N, C) -> (B, N, C)"""

    rank = 1


@provides("13-fna")
@provides("58-dinat")
class NeighborhoodAttention2D(NeighborhoodAttention):
    """(B, H, W, C) -> (B, H, W, C)"""

    rank = 2


@provides("13-fna")
class NeighborhoodAttention3D(NeighborhoodAttention):
    """(B, T, H, W, C) -> (B, T, H, W, C)"""

    rank = 3


@layers.register("neighborhood")
def _neighborhood(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # NAT's 7 x 7 where it leaves something out, a smaller odd window on small grids.
    options.setdefault("kernel_size", tuple(min(7, max(2, (x // 2) | 1)) for x in grid))
    options.setdefault("rel_pos_bias", True)
    return NeighborhoodAttention2D(dim, num_heads, **options)  # type: ignore[arg-type]

"""Window attention (card 24): tokens attend inside w x w windows that tile the grid, without shift or relative positions.

    q, k, v = x W_qkv + b                  per window: (heads, w*w, c) each, columns ordered [q, k, v][head][channel]
    y = softmax(c^-1/2 q k^T) v W_proj     (w*w, C)

A grid that windows do not tile is completed at the bottom and right by zeros, before the projection: padding takes part as
keys and values that equal the bias. Windows without shift: Ding et al., "DaViT: Dual Attention Vision Transformers", ECCV
2022 (arXiv 2204.03645), after Liu et al., "Swin Transformer", ICCV 2021.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.attention import PatternAttention
from heed.layers.registry import layers


@provides("24-davit")
class WindowAttention(PatternAttention):
    """Self-attention inside windows of a grid of tokens, (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        window_size: side w of a window in tokens, >= 1. One window that covers the grid exactly is full attention.
        options: qkv_bias, qk_scale, attn_drop, proj_drop, as in `PatternAttention`.

    Raises:
        ValueError: heads that do not divide dim, window_size < 1, or an input that is not (B, H, W, dim).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 7, **options: object) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f"window_size={window_size!r} must be an integer >= 1")
        self.window_size = window_size

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(
                f"WindowAttention takes a grid of tokens (B, H, W, {self.dim}), channels last; got {tuple(x.shape)}"
            )
        (batch, height, width, _), w = x.shape, self.window_size
        if height % w or width % w:  # padding by nothing would copy
            x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        rows, columns = x.shape[1] // w, x.shape[2] // w
        # A window becomes a batch element: copying it together once is faster than selecting its keys from the grid.
        windows = x.view(batch, rows, w, columns, w, self.dim).transpose(2, 3).reshape(-1, w * w, self.dim)
        y = super().forward(windows).view(batch, rows, columns, w, w, self.dim)
        y = y.transpose(2, 3).reshape(x.shape)
        return y if y.shape[1:3] == (height, width) else y[:, :height, :width]

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one grid of height x width tokens, padding included."""
        w = self.window_size
        tokens = (height + -height % w) * (width + -width % w)
        return tokens * (4 * self.dim**2 + 2 * w**2 * self.dim)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}"


@layers.register("window")
def _window(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # The paper's 7 where several windows tile the grid, else the largest smaller side that does, else padding.
    most = min(7, max(1, max(grid) // 2))
    tiling = [w for w in range(2, most + 1) if all(side % w == 0 for side in grid)]
    options.setdefault("window_size", tiling[-1] if tiling and 2 * tiling[-1] > most else most)
    return WindowAttention(dim, num_heads, **options)  # type: ignore[arg-type]

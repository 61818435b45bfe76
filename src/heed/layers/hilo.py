"""HiLo attention (card 23): some heads attend inside small windows, the others attend everywhere to pooled tokens.

    low = int(heads * alpha) heads of width d, high = heads - low          s = window side
    Hi-Fi, per window (s*s tokens):  y_hi = softmax(scale * q k^T) v W_h,  q, k, v = x W_qkv     (s*s, high*d)
    Lo-Fi, over the whole grid:      y_lo = softmax(scale * q k^T) v W_l,  q = x W_q             (H*W, low*d)
                                     k, v = mean over each window of x, times W_kv               (H*W/s^2, low*d)
    y = [y_hi, y_lo]                                                                              (H, W, C)

Pan, Cai, Zhuang, "Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213. Parameter names are
the authors': h_qkv, h_proj, l_q, l_kv, l_proj. Grids that windows do not tile are padded as in their detection code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.layers.attention import check_heads
from heed.layers.registry import layers


@provides("23-hilo")
class HiLoAttention(nn.Module):
    """Self-attention on a grid of tokens, its heads split into high-frequency and low-frequency ones.

    Grids that the windows do not tile are padded with zero tokens at the bottom and right; these take part as keys, as
    in the authors' detection code. There is no place for a class token: keep it outside.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        qkv_bias: whether the query, key and value projections have biases.
        qk_scale: factor on q k^T, default head_dim ** -0.5.
        window_size: side s of the windows and of the pooling, in tokens; 1 makes every head a low-frequency one, which
            is plain multi-head attention.
        alpha: share of low-frequency heads, in [0, 1]; int(num_heads * alpha) heads. A branch without heads has no
            parameters.

    Raises:
        ValueError: a setting outside these ranges.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        window_size: int = 2,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f"window_size={window_size!r} must be an integer >= 1")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must lie in [0, 1]; it is the share of low-frequency heads")
        self.dim = dim
        self.head_dim = check_heads(dim, num_heads)
        self.scale = qk_scale or self.head_dim**-0.5
        self.window_size = window_size
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        self.low_dim = self.low_heads * self.head_dim
        self.high_dim = self.high_heads * self.head_dim
        if self.low_heads:
            self.l_q = nn.Linear(dim, self.low_dim, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * self.low_dim, bias=qkv_bias)
            self.l_proj = nn.Linear(self.low_dim, self.low_dim)
        if self.high_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.high_dim, bias=qkv_bias)
            self.h_proj = nn.Linear(self.high_dim, self.high_dim)

    def forward(
        self, x: Float[Tensor, "B *N C"], height: int | None = None, width: int | None = None
    ) -> Float[Tensor, "B *N C"]:
        """Mix tokens.

        Args:
            x: (B, H, W, C), or (B, N, C) with the tokens in row-major order.
            height, width: H and W of the grid, for (B, N, C) only; N = H * W.

        Returns:
            The same shape: Hi-Fi channels first, then Lo-Fi.
        """
        grid = self._grid(x, height, width)
        _, rows, columns, _ = grid.shape
        y = torch.cat(self._branches(grid), -1)
        return y[:, :rows, :columns].reshape(x.shape)

    def branches(self, x: Float[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B H W high"], Float[Tensor, "B H W low"]]:
        """The Hi-Fi and the Lo-Fi output before concatenation; a branch without heads has 0 channels."""
        _, rows, columns, _ = self._grid(x, None, None).shape
        high, low = (y[:, :rows, :columns] for y in self._branches(x))
        return high, low

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds for one image of height x width tokens, padding included, counted as the authors do."""
        s = self.window_size
        windows = -(-height // s) * -(-width // s)
        tokens = windows * s * s
        high = tokens * self.dim * 3 * self.high_dim + windows * s**4 * 2 * self.high_dim + tokens * self.high_dim**2
        low = (tokens + 2 * windows) * self.dim * self.low_dim + 2 * tokens * windows * self.low_dim
        return high + low + tokens * self.low_dim**2

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, high_heads={self.high_heads}, low_heads={self.low_heads}"

    def _grid(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"HiLoAttention has dim={self.dim}, the input {tuple(x.shape)} has {x.shape[-1]} channels; "
                "channels come last: (B, H, W, C) or (B, N, C)"
            )
        if x.ndim == 4 and height in (None, x.shape[1]) and width in (None, x.shape[2]):
            return x
        if x.ndim == 3 and height is not None and width is not None and height * width == x.shape[1]:
            return x.unflatten(1, (height, width))
        raise ValueError(
            f"input {tuple(x.shape)} with height={height}, width={width}: give (B, H, W, C), "
            "or (B, N, C) with height * width = N"
        )

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches, (B, H, W, channels) each with H and W of the padded grid."""
        s = self.window_size
        below, right = -x.shape[1] % s, -x.shape[2] % s
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return self._hifi(x), self._lofi(x)

    def _hifi(self, x: Tensor) -> Tensor:
        s, heads = self.window_size, self.high_heads
        batch, rows, columns, _ = x.shape
        if not heads:
            return x[..., :0]
        # Brings the tokens of a window together, for q, k and v at once.
        qkv = self.h_qkv(x).view(batch, rows // s, s, columns // s, s, 3 * self.high_dim).transpose(2, 3)
        windows = batch * (rows // s) * (columns // s)
        q, k, v = qkv.reshape(windows, s * s, 3 * heads, self.head_dim).transpose(1, 2).split(heads, 1)
        y = attend(q, k, v, Full(), scale=self.scale).transpose(1, 2)
        y = y.reshape(batch, rows // s, columns // s, s, s, self.high_dim).transpose(2, 3)
        return self.h_proj(y.reshape(batch, rows, columns, self.high_dim))

    def _lofi(self, x: Tensor) -> Tensor:
        s, heads = self.window_size, self.low_heads
        batch, rows, columns, _ = x.shape
        if not heads:
            return x[..., :0]
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), s).permute(0, 2, 3, 1) if s > 1 else x
        keys = pooled.shape[1] * pooled.shape[2]
        k, v = self.l_kv(pooled).view(batch, keys, 2, heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q = self.l_q(x).view(batch, rows * columns, heads, self.head_dim).transpose(1, 2)
        y = attend(q, k, v, Full(), scale=self.scale).transpose(1, 2)
        return self.l_proj(y.reshape(batch, rows, columns, self.low_dim))


@provides("23-hilo")
def radial_spectrum(
    maps: Float[Tensor, "B H W C"], bins: int = 16
) -> tuple[Float[Tensor, " bins"], Float[Tensor, " bins"]]:
    """How the energy of feature maps spreads over spatial frequency: what shows the high/low split of the branches.

    Args:
        maps: (B, H, W, C) features, such as one of `HiLoAttention.branches`.
        bins: rings of equal width that the frequencies are gathered into.

    Returns:
        The rings' middle frequencies in cycles per token, from 0 to sqrt(1/2), and the energy in each ring, averaged
        over images and channels. Each channel's mean is left out: the energies sum to the channels' mean variance.

    Raises:
        ValueError: maps that are not (B, H, W, C).
    """
    if maps.ndim != 4:
        raise ValueError(f"maps {tuple(maps.shape)} must be (B, H, W, C)")
    maps = maps.float()
    waves = torch.fft.fft2(maps - maps.mean((1, 2), keepdim=True), dim=(1, 2), norm="forward")
    energy = waves.abs().square().mean((0, 3))
    fy, fx = (torch.fft.fftfreq(size, device=maps.device) for size in energy.shape)
    edges = torch.linspace(0, 0.5**0.5, bins + 1, device=maps.device)
    ring = torch.bucketize(torch.hypot(fy[:, None], fx), edges[1:-1])
    gathered = torch.zeros(bins, device=maps.device).index_add(0, ring.flatten(), energy.flatten())
    return (edges[:-1] + edges[1:]) / 2, gathered


@layers.register("hilo")
def _hilo(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    options.setdefault("window_size", 2 if min(grid) > 1 else 1)
    options.setdefault("qkv_bias", True)
    return HiLoAttention(dim, num_heads, **options)  # type: ignore[arg-type]

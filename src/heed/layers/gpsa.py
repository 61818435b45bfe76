"""Gated positional self-attention (card 16): each head mixes where it wants to look with what it wants to look at.

    S = softmax(scale * q k^T)                               content   (B, h, N, N),  q, k = x W_qk
    P[n, m] = softmax_m(w . (dx, dy, dx^2 + dy^2))           position  (h, N, N),     (dx, dy) = place of m - place of n
    A = (1 - g) S + g P,   g = sigmoid(gate) per head
    y = (A v) W_proj,   v = x W_v

w starts as 2a (X, Y, -1/2), so that P is a bump exp(-a |(dx, dy) - (X, Y)|^2) at the head's own offset (X, Y): nine heads
begin as the taps of a 3 x 3 convolution, a being the locality strength. The score is a sum over rows and columns of the
grid, hence P a product of a softmax over rows and one over columns, and P v costs N (H + W) instead of N^2 per channel.

d'Ascoli, Touvron, Leavitt, Morcos, Biroli, Sagun, "ConViT: Improving Vision Transformers with Soft Convolutional
Inductive Biases", ICML 2021, arXiv 2103.10697. Parameter names are the authors'.
"""

from __future__ import annotations

import math
import warnings
from typing import Self, cast

import torch
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.errors import unknown
from heed.layers.attention import PatternAttention, check_heads
from heed.layers.registry import layers

MODES = ("gated", "position", "content")


@provides("16-convit")
class GPSA(nn.Module):
    """Gated positional self-attention on a grid of tokens. There is no place for a class token: keep it outside.

    Args:
        dim: channels C.
        num_heads: heads h; must divide dim. With k = int(sqrt(h)), k * k heads start at the offsets of a k x k kernel,
            and heads beyond these with small random weights, which look almost everywhere alike.
        qkv_bias: whether the query, key and value projections have biases.
        qk_scale: factor on q k^T, default head_dim ** -0.5.
        attn_drop: dropout on the mixed weights while training.
        proj_drop: dropout on the output while training.
        locality_strength: a, how sharp the bumps are at first; 0 makes P uniform.
        local_init: start as a convolution, with W_v the identity; otherwise all weights are random.
        mode: "gated"; "position" holds every gate at 1 (a convolution with learned taps), "content" at 0.
        freeze_gates: gates are not trained.
        freeze_positions: the weights w are not trained.

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
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        local_init: bool = True,
        mode: str = "gated",
        freeze_gates: bool = False,
        freeze_positions: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(unknown("mode", mode, MODES))
        if locality_strength < 0:
            warnings.warn(
                f"locality_strength={locality_strength} is negative: heads start by looking away from their offsets",
                stacklevel=2,
            )
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.scale = qk_scale or self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.locality_strength = locality_strength
        self.mode = mode
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.qk, self.v, self.proj, self.pos_proj):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if local_init:
            self.local_init()
        self.gating_param.requires_grad_(not freeze_gates)
        self.pos_proj.requires_grad_(not freeze_positions)

    @torch.no_grad()
    def local_init(self) -> None:
        """Values pass unchanged, and head i1 + k i2 looks at the pixel i1 - (k-1)/2 below and i2 - (k-1)/2 to the right."""
        nn.init.eye_(self.v.weight)
        kernel = math.isqrt(self.num_heads)
        centre = (kernel - 1) / 2
        for i2 in range(kernel):
            for i1 in range(kernel):
                row = torch.tensor([2 * (i2 - centre), 2 * (i1 - centre), -1.0])
                self.pos_proj.weight[i1 + kernel * i2] = row
        self.pos_proj.weight *= self.locality_strength

    @property
    def gates(self) -> Float[Tensor, " h"]:
        """g, the share of the positional weights per head."""
        fixed = {"position": 1.0, "content": 0.0}.get(self.mode)
        gates = self.gating_param.sigmoid()
        return gates if fixed is None else torch.full_like(gates, fixed)

    def forward(
        self, x: Float[Tensor, "B *N C"], height: int | None = None, width: int | None = None
    ) -> Float[Tensor, "B *N C"]:
        """Mix tokens.

        Args:
            x: (B, H, W, C), or (B, N, C) with the tokens in row-major order.
            height, width: H and W of the grid, for (B, N, C) only; a square grid where they are not given.
        """
        rows, columns = self._grid(x, height, width)
        tokens = x.reshape(x.shape[0], rows * columns, self.dim)
        v = self._heads(self.v(tokens))
        if self.training and self.attn_drop > 0:  # one draw for the mixed weights, which therefore have to be formed
            weights = nn.functional.dropout(self._weights(tokens, rows, columns), self.attn_drop)
            y = weights.to(v.dtype) @ v
        else:
            y = self._mixed(tokens, v, rows, columns)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))

    def attention(
        self, x: Float[Tensor, "B *N C"], height: int | None = None, width: int | None = None
    ) -> Float[Tensor, "B h N N"]:
        """A, the mixed weights, rows summing to 1; arguments as in `forward`."""
        rows, columns = self._grid(x, height, width)
        return self._weights(x.reshape(x.shape[0], rows * columns, self.dim), rows, columns)

    def position_attention(self, height: int, width: int) -> Float[Tensor, "h N N"]:
        """P on a grid of height x width tokens."""
        down, right = self._along_axes(height, width)
        return torch.einsum("hyY,hxX->hyxYX", down, right).reshape(self.num_heads, height * width, height * width)

    @torch.no_grad()
    def nonlocality(
        self, x: Float[Tensor, "B *N C"], height: int | None = None, width: int | None = None
    ) -> Float[Tensor, " h"]:
        """Mean distance in tokens between a query and what it attends to, per head; arguments as in `forward`."""
        return nonlocality(self.attention(x, height, width), *self._grid(x, height, width))

    @classmethod
    def from_attention(cls, attention: nn.Module, **options: object) -> Self:
        """Turn trained self-attention into GPSA: W_qk, W_v and W_proj are copied, gates and positions are new.

        Args:
            attention: has num_heads and the linear layers qkv and proj, as timm's and heed's have.
            options: settings of `GPSA`; local_init is False, since it would overwrite the values.
        """
        qkv, proj = cast(nn.Linear, attention.qkv), cast(nn.Linear, attention.proj)
        heads, dim = cast(int, attention.num_heads), proj.out_features
        layer = cls(dim, heads, qkv_bias=qkv.bias is not None, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for own, theirs in ((layer.qk, slice(0, 2 * dim)), (layer.v, slice(2 * dim, None))):
                own.weight.copy_(qkv.weight[theirs])
                if own.bias is not None:
                    own.bias.copy_(qkv.bias[theirs])
        layer.proj.load_state_dict(proj.state_dict())
        return layer

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, locality_strength={self.locality_strength}, mode={self.mode!r}"

    def _grid(self, x: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        if x.shape[-1] != self.dim:
            raise ValueError(f"GPSA has dim={self.dim}, the input {tuple(x.shape)} has {x.shape[-1]} channels")
        if x.ndim == 4 and height in (None, x.shape[1]) and width in (None, x.shape[2]):
            return x.shape[1], x.shape[2]
        if x.ndim == 3 and height is None and width is None:
            side = math.isqrt(x.shape[1])
            if side * side == x.shape[1]:
                return side, side
            token = " (keep a class token outside)" if (x.shape[1] - 1) == side * side else ""
            raise ValueError(f"{x.shape[1]} tokens are no square grid{token}: give height and width, or (B, H, W, C)")
        if x.ndim == 3 and height is not None and width is not None and height * width == x.shape[1]:
            return height, width
        raise ValueError(
            f"input {tuple(x.shape)} with height={height}, width={width}: give (B, H, W, C), or (B, N, C) with "
            "height * width = N"
        )

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, h * c) -> (B, h, N, c)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _query_key(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self._heads(self.qk(tokens)).split(self.num_heads, 1)
        return q, k

    def _along_axes(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The factors of P: softmax over rows (h, rows, rows) and over columns (h, columns, columns), in float32.

        They need weights, not attention output, so the softmax is here: P has no queries and is shared by the batch.
        """
        weight = self.pos_proj.weight.float()
        factors = []
        for size, linear in ((rows, weight[:, 1]), (columns, weight[:, 0])):
            place = torch.arange(size, device=weight.device, dtype=torch.float32)
            offset = place - place[:, None]
            # The bias is the same for all keys, so softmax takes it out again; the authors have it, so it stays a part.
            score = linear[:, None, None] * offset + weight[:, 2, None, None] * offset**2
            factors.append((score + self.pos_proj.bias.float()[:, None, None]).softmax(-1))
        return factors[0], factors[1]

    def _mixed(self, tokens: Tensor, v: Tensor, rows: int, columns: int) -> Tensor:
        """A v without forming A. Its rows sum to 1 already, which is all that the authors' renormalisation sees to."""
        g = self.gates[:, None, None].to(v.dtype)
        content = position = None
        if self.mode != "position":
            content = cast(Tensor, attend(*self._query_key(tokens), v, Full(), scale=self.scale))
        if self.mode != "content":
            position = self._placed(v, rows, columns)
        if content is None or position is None:
            return cast(Tensor, position if content is None else content)
        return (1 - g) * content + g * position

    def _placed(self, v: Tensor, rows: int, columns: int) -> Tensor:
        """P v, along rows and then along columns. Heads come first, so that each is one product for the whole batch."""
        down, right = (factor.to(v.dtype) for factor in self._along_axes(rows, columns))
        batch, heads, _, width = v.shape
        y = v.unflatten(2, (rows, columns)).permute(1, 2, 0, 3, 4).reshape(heads, rows, -1)
        y = (down @ y).view(heads, rows, batch, columns, width).permute(0, 3, 2, 1, 4).reshape(heads, columns, -1)
        return (right @ y).view(heads, columns, batch, rows, width).permute(2, 0, 3, 1, 4).flatten(2, 3)

    def _weights(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        q, k = self._query_key(tokens)
        _, content = attend(q, k, k, Full(), scale=self.scale, return_weights=True)
        g = self.gates[:, None, None]
        mixed = (1 - g) * content + g * self.position_attention(rows, columns)
        return mixed / mixed.sum(-1, keepdim=True)


@provides("16-convit")
class MHSA(PatternAttention):
    """Multi-head self-attention, (B, N, C) -> (B, N, C), that can show its weights: ConViT's later layers.

    Args:
        dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop: as in `PatternAttention`, without biases by default.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = False, **options: float | None) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **options)  # type: ignore[arg-type]

    def attention(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B h N N"]:
        """The weights, rows summing to 1."""
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return attend(q, k, k, Full(), scale=self.scale, return_weights=True)[1]

    @torch.no_grad()
    def nonlocality(self, x: Float[Tensor, "B N C"], height: int, width: int) -> Float[Tensor, " h"]:
        """Mean distance in tokens between a query and what it attends to, per head.

        Tokens before the grid's, such as a class token, are left out, both as queries and as keys, and what remains of a
        row is brought back to sum 1. That is heed's reading; the authors' function takes patch tokens alone.
        """
        patches = height * width
        if x.shape[1] < patches:
            raise ValueError(f"{x.shape[1]} tokens are fewer than height * width = {patches}")
        weights = self.attention(x)[..., -patches:, -patches:]
        return nonlocality(weights / weights.sum(-1, keepdim=True), height, width)


@provides("16-convit")
def relative_offsets(height: int, width: int, device: torch.device | None = None) -> Float[Tensor, "1 N N 3"]:
    """(dx, dy, dx^2 + dy^2) from every query to every key of a row-major grid, in tokens, float32."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    dx, dy = (place.flatten().float() - place.flatten().float()[:, None] for place in (x, y))
    return torch.stack([dx, dy, dx**2 + dy**2], -1)[None]


@provides("16-convit")
def nonlocality(weights: Float[Tensor, "B h N N"], height: int, width: int) -> Float[Tensor, " h"]:
    """D = (1/N) sum_n sum_m A[n, m] |place of m - place of n| per head, in tokens, A averaged over the batch.

    Args:
        weights: (B, h, N, N) attention on a row-major grid, rows summing to 1.
        height, width: of the grid; height * width = N.
    """
    if weights.shape[-1] != height * width:
        raise ValueError(f"weights {tuple(weights.shape)} are not those of {height} x {width} tokens")
    distance = relative_offsets(height, width, weights.device)[0, ..., 2].sqrt()
    return (weights.mean(0) * distance).sum((1, 2)) / distance.shape[0]


@layers.register("gpsa")
def _gpsa(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    options.setdefault("qkv_bias", True)
    return GPSA(dim, num_heads, **options)  # type: ignore[arg-type]

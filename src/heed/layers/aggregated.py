"""Aggregated attention (TransNeXt; card 27): each query sees its own 3x3 window and the whole map pooled, in one softmax.

For query i on a grid of N = H W tokens, with w^2 window positions and M pooled tokens:

    q_i = unit(x_i W_q),  k_j = unit(x_j W_k),  v_j = x_j W_v                            (h, d) each, unit length per head
    p   = LN(adaptive mean(GELU(x W_sr)))                                               (M, C), keys and values by W_k, W_v
    s_i = (q_i + e) softplus(t) log(keys that i sees)                                   (h, d), e and t learned per head
    [a, b] = softmax([s_i . k_window + bias, s_i . k_pooled + MLP(offsets)])            (h, w^2 + M) together
    y_i = (a + q_i T + u) v_window + b v_pooled                                         (h, d), T and u learned
    out = (g_i y_i) W_o                                                                 g: gates of a mixture of heads, or 1

The length-scaled cosine attention of the last stage is the same with all tokens as keys and no window. Shi, "TransNeXt:
Robust Foveal Visual Perception for Vision Transformers", CVPR 2024, arXiv 2311.17132; gates from Jin, Zhu, Yuan, Yan,
"MoH", ICML 2025, arXiv 2410.11842. Parameter names are the authors', the gates' lie under `router`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.constants import kept
from heed.engine.patterns import Full
from heed.layers.attention import check_heads
from heed.layers.moh import MoHRouter, gated_heads
from heed.layers.registry import layers

_CPB_WIDTH = 512  # hidden width of the position MLP


class CosineHeads(nn.Module):
    """What both attentions share: scaled unit queries, biases from positions, gates and the output projection.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        grid: rows and columns of the tokens; tables hold for these alone.
        key_grid: rows and columns of the keys that lie all over the map.
        shared: heads that every token uses; None for no gates at all, which is TransNeXt without MoH.
        routed: further heads per token that a router chooses.
        pretrain_grid: the grid on which offsets span -8 .. 8, default `grid`; keep that of the weights on another grid.
        attn_drop: dropout on the weights while training.
        proj_drop: dropout on the output while training.

    Raises:
        ValueError: heads that do not divide the channels, or a split that does not fit the heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        key_grid: tuple[int, int],
        *,
        shared: int | None = None,
        routed: int = 0,
        pretrain_grid: tuple[int, int] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if min(grid) < 1:
            raise ValueError(f"grid={grid} needs at least one row and one column")
        if shared is None and routed:
            raise ValueError(f"routed={routed} heads with shared=None: give shared, 0 for routed heads only")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.grid = grid
        self.key_grid = key_grid
        self.pretrain_grid = pretrain_grid or grid
        self.attn_drop = attn_drop
        self.router = None if shared is None else MoHRouter(dim, num_heads, shared, routed)
        # softplus(temperature) starts at 1 / 0.24.
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, self.head_dim), std=0.02))
        self.cpb_fc1 = nn.Linear(2, _CPB_WIDTH)
        self.cpb_fc2 = nn.Linear(_CPB_WIDTH, num_heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def position_table(self) -> tuple[Float[Tensor, "T 2"], Int[Tensor, " pairs"]]:
        """The offsets from keys to queries that occur, on a logarithmic scale, and which of them each pair (N * M) has."""
        (down, rows), (right, columns) = self._offsets()
        table = torch.stack(torch.meshgrid(down, right, indexing="ij"), -1).flatten(0, 1)
        index = rows[:, None, :, None] * len(right) + columns[None, :, None, :]
        return table, index.flatten()

    def position_bias(self) -> Float[Tensor, "h N M"]:
        """What positions add to the scores of all queries on the keys all over the map: an MLP of the offsets."""
        (down, rows), (right, columns) = self._offsets()
        table = torch.stack(torch.meshgrid(down, right, indexing="ij"), -1).to(self.cpb_fc1.weight.dtype)
        values = self.cpb_fc2(F.relu(self.cpb_fc1(table))).permute(2, 0, 1)
        # Axis by axis: each look-up is small, and so is its gradient.
        values = values.index_select(1, rows.flatten()).index_select(2, columns.flatten())
        values = values.unflatten(2, columns.shape).unflatten(1, rows.shape)
        return values.transpose(2, 3).reshape(self.num_heads, math.prod(self.grid), -1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid={self.grid}, key_grid={self.key_grid}"

    def _offsets(self) -> list[tuple[Tensor, Tensor]]:
        device = self.temperature.device
        sizes = zip(self.grid, self.key_grid, self.pretrain_grid, strict=True)
        return [_offsets(*size, device) for size in sizes]

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != (*self.grid, self.dim):
            raise ValueError(
                f"input {tuple(x.shape)}: this {type(self).__name__} takes (B, {self.grid[0]}, {self.grid[1]}, "
                f"{self.dim}); its position tables are made for that grid"
            )

    def _heads(self, x: Tensor, count: int = 1) -> tuple[Tensor, ...]:
        """(..., count * C) to `count` tensors (..., h, d)"""
        return x.unflatten(-1, (count, self.num_heads, self.head_dim)).unbind(-3)

    def _scaled(self, q: Tensor, log_keys: Tensor | float) -> Tensor:
        """s, from unit queries (..., h, d)"""
        factor = F.softplus(self.temperature).squeeze(1) * log_keys
        return ((q + self.query_embedding.squeeze(1)) * factor).to(q.dtype)

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads (B, N, h, d), weighted by the gates of the tokens x, to (B, H, W, C)."""
        if self.router is not None:
            y = gated_heads(y, self.router(x.flatten(1, 2)).gates)
        return self.proj_drop(self.proj(y.reshape(x.shape)))


@provides("27-moh")
class AggregatedAttention(CosineHeads):
    """Attention to a window and to the pooled map, (B, H, W, C) -> (B, H, W, C); the module has the equations.

    Args:
        dim, num_heads, grid, shared, routed, pretrain_grid, attn_drop, proj_drop: as in `CosineHeads`.
        window_size: side w of the window in tokens, odd; positions outside the map are left out.
        pool_ratio: tokens per pooled token along each axis; at least one pooled token remains.
        qkv_bias: whether the query, key and value projections have biases.

    Raises:
        ValueError: as `CosineHeads`, an even window, or a ratio below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        window_size: int = 3,
        pool_ratio: int = 2,
        qkv_bias: bool = True,
        **options: Any,
    ) -> None:
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"window_size={window_size} must be odd and positive, so that the query is in the middle")
        if pool_ratio < 1:
            raise ValueError(f"pool_ratio={pool_ratio} must be at least 1 token per pooled token")
        rows, columns = (max(1, side // pool_ratio) for side in grid)
        super().__init__(dim, num_heads, grid, (rows, columns), **options)
        self.window_size = window_size
        positions = window_size**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(num_heads, positions), std=0.0004))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(num_heads, self.head_dim, positions), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, positions))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        self._check(x)
        (q,) = self._heads(self.q(x))
        k, v = self._heads(self.kv(x), 2)
        q, k = _unit(q), _unit(k)
        far_k, far_v = (t.transpose(1, 2) for t in self._heads(self.kv(self.pooled(x)), 2))  # (B, h, M, d)
        near, far = self._weights(q, k, far_k)
        near = near.unflatten(2, self.grid).permute(4, 0, 2, 3, 1).contiguous()
        y = _Mix.apply(near, self._padded(v)).flatten(1, 2) + (far @ far_v).transpose(1, 2)
        return self._out(y, x)

    def attention(self, x: Float[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B h N window"], Float[Tensor, "B h N M"]]:
        """What each query takes from its window, row by row, and from the pooled tokens.

        Only the sum of the softmax's parts is 1: the window's part holds the learned a + q T + u.
        """
        self._check(x)
        (q,) = self._heads(self.q(x))
        k, _ = self._heads(self.kv(x), 2)
        far_k, _ = self._heads(self.kv(self.pooled(x)), 2)
        return self._weights(_unit(q), _unit(k), far_k.transpose(1, 2))

    def pooled(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B M C"]:
        """p, the tokens that stand for the whole map."""
        x = F.gelu(F.linear(x, self.sr.weight.flatten(1), self.sr.bias))
        return self.norm(F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.key_grid).flatten(2).transpose(1, 2))

    def _weights(self, q: Tensor, k: Tensor, far_k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, N, w^2) and (B, h, N, M) from q, k (B, H, W, h, d) and pooled keys (B, h, M, d).

        The softmax is here, not in the engine, since the window's weights are changed after it.
        """
        outside, log_keys = _window(self.grid, self.window_size, math.prod(self.key_grid), q.device)
        scaled = self._scaled(q, log_keys)
        near = _Scores.apply(scaled, self._padded(k)).permute(1, 4, 2, 3, 0).flatten(2, 3)
        far = scaled.flatten(1, 2).transpose(1, 2) @ _unit(far_k).transpose(-1, -2)
        near_bias = self.relative_pos_bias_local[:, None].masked_fill(outside, -torch.inf)
        far_bias = self.position_bias()
        scores = torch.cat([near, far.to(near.dtype)], -1) + torch.cat([near_bias, far_bias.to(near_bias.dtype)], -1)
        weights = F.dropout(scores.softmax(-1).to(q.dtype), self.attn_drop, self.training)
        near, far = weights.split([near.shape[-1], far.shape[-1]], -1)
        learned = q.flatten(1, 2).transpose(1, 2) @ self.learnable_tokens.to(q.dtype) + self.learnable_bias
        return near + learned.to(q.dtype), far

    def _padded(self, x: Tensor) -> Tensor:
        """(B, H, W, h, d) with zeros around the map."""
        reach = self.window_size // 2
        return F.pad(x, (0, 0, 0, 0, reach, reach, reach, reach))


@provides("27-moh")
class LengthScaledAttention(CosineHeads):
    """Length-scaled cosine attention of all tokens to all, (B, H, W, C) -> (B, H, W, C).

    Args:
        dim, num_heads, grid, shared, routed, pretrain_grid, attn_drop, proj_drop: as in `CosineHeads`.
        qkv_bias: whether the query, key and value projection has a bias.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: tuple[int, int], *, qkv_bias: bool = True, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, grid, grid, **options)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        self._check(x)
        q, k, v = self._heads(self.qkv(x).flatten(1, 2), 3)
        q, k, v = (t.transpose(1, 2) for t in (self._scaled(_unit(q), math.log(q.shape[1])), _unit(k), v))
        dropout = self.attn_drop if self.training else 0.0
        y = attend(q, k, v, Full(), bias=self.position_bias(), scale=1.0, dropout=dropout)
        return self._out(y.transpose(1, 2), x)


def _unit(x: Tensor) -> Tensor:
    """x at length 1 along the last axis."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


@kept
def _offsets(queries: int, keys: int, pretrain: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis, log-spaced offsets (T,) in rising order, and the place there of each pair (queries, keys).

    A pooled key lies at the mean index of the tokens under it. Twice that is an integer, so offsets are counted in halves.
    """
    twice = [key * queries // keys - (-(key + 1) * queries // keys) - 1 for key in range(keys)]
    step = 2 if len({place % 2 for place in twice}) == 1 else 1
    least = -twice[-1]
    count = (2 * (queries - 1) - twice[0] - least) // step + 1
    halves = least + step * torch.arange(count, device=device)
    index = (2 * torch.arange(queries, device=device)[:, None] - torch.tensor(twice, device=device) - least) // step
    reach = halves.float() / 2 / max(1, pretrain - 1) * 8
    return reach.sign() * (reach.abs() + 1).log2() / 3, index


@kept
def _window(grid: tuple[int, int], size: int, pooled: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which window positions lie outside the map (N, size^2), and log of the keys each query sees (H, W, 1, 1)."""
    reach = torch.arange(size, device=device) - size // 2
    places = [torch.arange(side, device=device)[:, None] + reach for side in grid]
    rows, columns = ((place >= 0) & (place < side) for place, side in zip(places, grid, strict=True))
    inside = rows[:, None, :, None] & columns[None, :, None, :]
    log_keys = (inside.sum((2, 3)) + pooled).float().log()
    return ~inside.flatten(2).flatten(0, 1), log_keys[..., None, None]


# A window of keys per query without copying the keys w^2 times: the map is shifted under the queries instead. With
# a, b and y of (B, H, W, h, d), b padded, and s, w of (w^2, B, H, W, h), the three sums below are each other's gradients.


def _shifts(padded: Tensor, rows: int, columns: int) -> Iterator[Tensor]:
    """The views of a padded map under each position of the window, row by row."""
    for down in range(padded.shape[1] - rows + 1):
        for right in range(padded.shape[2] - columns + 1):
            yield padded[:, down : down + rows, right : right + columns]


class _Scores(torch.autograd.Function):
    """s_n(i) = a(i) . b(i + n)"""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        views = list(_shifts(b, a.shape[1], a.shape[2]))
        precise = torch.promote_types(a.dtype, torch.float32)
        scores = a.new_empty(len(views), *a.shape[:-1], dtype=precise)
        for place, view in enumerate(views):
            scores[place] = (a * view).sum(-1, dtype=precise)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return _Mix.apply(grad, b), _Spread.apply(grad, a, b.shape)


class _Mix(torch.autograd.Function):
    """y(i) = sum_n w_n(i) b(i + n)"""

    @staticmethod
    def forward(ctx: Any, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(w, b)
        mixed = b.new_zeros(*w.shape[1:], b.shape[-1], dtype=torch.promote_types(b.dtype, torch.float32))
        for weight, view in zip(w.unsqueeze(-1), _shifts(b, w.shape[2], w.shape[3]), strict=True):
            mixed.addcmul_(weight.to(b.dtype), view)
        return mixed.to(b.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, b = ctx.saved_tensors
        return _Scores.apply(grad, b), _Spread.apply(w, grad, b.shape)


class _Spread(torch.autograd.Function):
    """z(i + n) = sum over i and n of w_n(i) a(i), the padded map"""

    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(w, a)
        spread = a.new_zeros(shape, dtype=torch.promote_types(a.dtype, torch.float32))
        for weight, view in zip(w.unsqueeze(-1), _shifts(spread, a.shape[1], a.shape[2]), strict=True):
            view.addcmul_(weight.to(a.dtype), a)
        return spread.to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        w, a = ctx.saved_tensors
        return _Scores.apply(a, grad), _Mix.apply(w, grad), None


@layers.register("aggregated")
def _aggregated(dim: int, num_heads: int, grid: tuple[int, int], **options: Any) -> nn.Module:
    # TransNeXt pools any map to 7 x 7 tokens; small grids to half their sides.
    options.setdefault("pool_ratio", max(2, min(grid) // 7))
    return AggregatedAttention(dim, num_heads, grid, **options)

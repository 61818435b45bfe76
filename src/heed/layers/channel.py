"""Channel attention (card 24): channels are the tokens, and what describes a channel is its value at every position.

    q, k, v = W_qkv x^T + b                  (groups g, c, N) each: c = C / g channels with N positions as features
    original:    A = softmax(c^-1/2 k v^T)   (g, c, c)   y = A q      (g, c, N)
    Florence-2:  A = softmax(N^-1/2 q k^T)   (g, c, c)   y = A v      (g, c, N)

and y^T W_proj. Every output position is a mixture of channels whose weights have seen the whole grid, at a cost linear in
N. In the authors' code k, v, q play the roles that the paper's formula calls query, key and value; the order of the columns
of their weights follows the code, and so does this. The original's logits grow with N (they are sums over positions), so
that they and the softmax are in float32 for half-precision inputs; Florence-2's scale removes the growth.

Ding et al., "DaViT: Dual Attention Vision Transformers", ECCV 2022 (arXiv 2204.03645); the variant is from Xiao et al.,
"Florence-2", CVPR 2024 (arXiv 2311.06242).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.engine.precision import at_least_float32, no_autocast
from heed.layers.attention import check_heads
from heed.layers.registry import layers

_MANY = 4  # positions per channel from which it pays to project with positions last (measured on CPUs)


@provides("24-davit")
class ChannelGroupAttention(nn.Module):
    """Attention between the channels of a group, (B, ..., C) -> (B, ..., C); the axes between are positions.

    Args:
        dim: channels C.
        num_heads: groups g of channels that attend to each other; must divide dim.
        qkv_bias: whether the q, k, v projection has a bias.
        v2: Florence-2's variant, with other roles of q, k, v and the scale that `dynamic_scale` says.
        dynamic_scale: with v2, scale logits by (number of positions)^-1/2; otherwise by (C / g)^-1/2.

    Raises:
        ValueError: groups that do not divide dim, or an input without positions or with other channels.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, v2: bool = False, dynamic_scale: bool = True
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.v2 = v2
        self.dynamic_scale = dynamic_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... C"]:
        query, key, value, scale = self._channels(x)
        if query.shape[-1] >= _MANY * self.dim:
            y = attend(query, key, value, Full(), scale=scale)
            return self.proj(y.flatten(1, 2).transpose(1, 2)).view(x.shape)
        # Few positions: A is as large as what it mixes, and plain products of the projection as it lies are fastest.
        with no_autocast(x):
            query, key = (t.to(at_least_float32(t)) for t in (query, key))
            weights = (query * scale @ key.transpose(-2, -1)).softmax(-1)
        y = value.transpose(-2, -1) @ weights.transpose(-2, -1).to(value.dtype)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def weights(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B g c c"]:
        """A: the share of every channel (last axis) in every output channel, before the output projection."""
        query, key, value, scale = self._channels(x)
        return attend(query, key, value, Full(), scale=scale, return_weights=True)[1]

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one grid of height x width tokens."""
        return height * width * (4 * self.dim**2 + 2 * self.dim * self.head_dim)

    def _channels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """What attends, what is attended to and what is mixed, (B, g, c, N) each, and the scale of the logits."""
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"ChannelGroupAttention takes tokens (B, ..., {self.dim}), channels last; got {tuple(x.shape)}"
            )
        tokens = x.flatten(1, -2)
        if tokens.shape[1] < _MANY * self.dim:
            qkv = self.qkv(tokens).view(*tokens.shape[:2], 3, self.num_heads, self.head_dim).permute(0, 2, 3, 4, 1)
        else:
            # Projected with positions last, so that a channel's features lie together.
            weight, positions = self.qkv.weight.expand(x.shape[0], -1, -1), tokens.transpose(1, 2)
            if self.qkv.bias is None:
                qkv = torch.bmm(weight, positions)
            else:
                qkv = torch.baddbmm(self.qkv.bias[:, None], weight, positions)
            qkv = qkv.view(x.shape[0], 3, self.num_heads, self.head_dim, -1)
        q, k, v = qkv.unbind(1)
        if not self.v2:
            return k, v, q, self.head_dim**-0.5
        return q, k, v, (max(1, tokens.shape[1]) if self.dynamic_scale else self.head_dim) ** -0.5

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, v2={self.v2}"


@layers.register("channel")
def _channel(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    return ChannelGroupAttention(dim, num_heads, **options)  # type: ignore[arg-type]

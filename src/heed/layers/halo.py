"""Halo attention (card 04): the queries of a block share one window, the block enlarged by a halo on every side.

With blocks of b x b pixels, halo h, window side w = b + 2h, n heads, query and key width d, value width dv:

    q = W_q x                 (B, n, HW / t^2, d)   t = 2 keeps every second query per axis
    k, v = W_kv x             (B, n, HW, d + dv)    channels ordered [head][key, value]
    A[q, j] = s q . k_j + q . R_h[j_r - i_r + w - 1] + q . R_w[j_c - i_c + w - 1],   s = d^-1/2
    y = softmax(A over the w x w window of q's block) v

i counts rows and columns inside the query's block, j inside its window; R_h and R_w are (2w - 1, d), shared by heads.

Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021 (arXiv 2103.12731).
No official code was released; `HaloAttention` computes what timm's HaloAttn does and has its constructor and parameter
names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import make_divisible, trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.engine.attend import attend
from heed.engine.bias import RelativeLogits
from heed.engine.patterns import Halo
from heed.layers.attention import check_heads
from heed.layers.registry import layers


@provides("04-halonet")
@dataclass(frozen=True)
class HaloComplexity:
    """What a halo attention layer costs on a map of H x W pixels.

    Args:
        receptive_field: side of the window a query sees, b + 2h pixels.
        memory_ratio: copies of every key and value that the windows hold together, w^2 / b^2.
        per_pixel_ratio: the same when every pixel has a window of its own with reach h, (2h + 1)^2.
        multiply_adds: of the projections, the scores, the relative logits and the mixing of values.
    """

    receptive_field: int
    memory_ratio: float
    per_pixel_ratio: int
    multiply_adds: int


class RelativePosition(nn.Module):
    """Embeddings of relative rows and columns, (2 * window - 1, dim_head) each, shared by heads and blocks."""

    def __init__(self, window: int, halo: int, dim_head: int, **factory: object) -> None:
        super().__init__()
        # The engine counts offsets from the query's own pixel, the tables from the window's corner: halo apart. The
        # query's place is at most block - 1, so the first 2 * halo rows are never read.
        self.centre = halo + window - 1
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, **factory))  # type: ignore[arg-type]
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, **factory))  # type: ignore[arg-type]

    def forward(self, q: Float[Tensor, "B n N d"]) -> RelativeLogits:
        return RelativeLogits((q @ self.height_rel.T, q @ self.width_rel.T), (self.centre, self.centre))


@provides("04-halonet")
class HaloAttention(nn.Module):
    """Halo attention on feature maps, (B, dim, H, W) -> (B, dim_out, H / stride, W / stride). No output projection.

    A drop-in for `timm.layers.halo_attn.HaloAttn`, with the same parameter names.

    Args:
        dim: input channels.
        dim_out: output channels, default dim; the value width is dim_out / num_heads.
        feat_size: ignored, the layer takes any size; timm passes it.
        stride: 1, or 2 to halve the map, by keeping every second query or, with avg_down or an odd block_size, by
            average pooling after the attention.
        num_heads: heads n; must divide dim_out.
        dim_head: query and key width d, default make_divisible(dim_out * qk_ratio, 8) // num_heads.
        block_size: side b of a block of queries, in pixels; must divide H and W unless `pad`.
        halo_size: reach h of the window beyond the block, in pixels; 0 keeps attention inside the blocks.
        qk_ratio: width of queries and keys over dim_out where dim_head is not given.
        qkv_bias: whether the projections have a bias.
        avg_down: pool after the attention instead of striding the queries.
        scale_pos_embed: multiply the relative logits by s, too.
        padding: what a window sees beyond the map: "zeros" (timm's) lets them take part with key and value
            0, so that their logit is the relative one alone; "mask" gives them weight 0.
        pad: accept any H and W: the map is completed to whole blocks, which count as padding, and the output cropped to
            ceil(H / stride) x ceil(W / stride).
        device, dtype: of the parameters.

    Raises:
        ValueError: settings that do not fit each other, a map that blocks do not divide, or another number of channels.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        padding: str = "zeros",
        pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride={stride} must be 1 or 2")
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        if halo_size < 0:
            raise ValueError(f"halo_size={halo_size} must not be negative; 0 keeps attention inside the blocks")
        if padding not in ("zeros", "mask"):
            raise ValueError(f"padding={padding!r} must be 'zeros' (seen, with key and value 0) or 'mask' (not seen)")
        self.dim = dim
        self.dim_out = dim_out or dim
        self.num_heads = num_heads
        check_heads(self.dim_out, num_heads)
        self.dim_head = dim_head or make_divisible(self.dim_out * qk_ratio, 8) // num_heads
        if self.dim_head < 1:
            raise ValueError(
                f"qk_ratio={qk_ratio} leaves no query channel for each of num_heads={num_heads}; set dim_head"
            )
        self.scale = self.dim_head**-0.5
        self.scale_pos_embed = scale_pos_embed
        self.block_size = block_size
        self.halo_size = halo_size
        self.padding = padding
        self.pad = pad
        pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = 1 if pooled else stride
        factory = {"device": device, "dtype": dtype}
        width = num_heads * self.dim_head
        self.q = nn.Conv2d(dim, width, 1, stride=self.query_stride, bias=qkv_bias, **factory)  # type: ignore[arg-type]
        self.kv = nn.Conv2d(dim, width + self.dim_out, 1, bias=qkv_bias, **factory)  # type: ignore[arg-type]
        self.pos_embed = RelativePosition(self.window, halo_size, self.dim_head, **factory)
        # Maps of odd size come out as large as strided queries would make them where any size is accepted.
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=pad) if pooled else nn.Identity()
        self.reset_parameters()

    @property
    def window(self) -> int:
        """Side of the window a block of queries sees, in pixels."""
        return self.block_size + 2 * self.halo_size

    def reset_parameters(self) -> None:
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=self.dim**-0.5)
        for table in (self.pos_embed.height_rel, self.pos_embed.width_rel):
            trunc_normal_(table, std=self.scale)

    def complexity(self, height: int, width: int) -> HaloComplexity:
        """Costs on a map of height x width pixels; average pooling is not counted."""
        queries = -(-height // self.query_stride) * -(-width // self.query_stride)
        projections = self.q.weight.numel() * queries + self.kv.weight.numel() * height * width
        keys = self.num_heads * self.dim_head
        per_query = self.window**2 * (keys + self.dim_out) + 2 * (2 * self.window - 1) * keys
        return HaloComplexity(
            receptive_field=self.window,
            memory_ratio=self.window**2 / self.block_size**2,
            per_pixel_ratio=(2 * self.halo_size + 1) ** 2,
            multiply_adds=projections + queries * per_query,
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Cout Hout Wout"]:
        height, width = x.shape[-2:]
        bottom, right = self._missing(x)
        grid = (height + bottom, width + right)
        stride, halo = self.query_stride, self.halo_size

        q, kv = self.q(x), self.kv(x)
        rows, columns = q.shape[-2:]
        q = F.pad(q, (0, grid[1] // stride - columns, 0, grid[0] // stride - rows))
        # Padding follows the projection, so that padded keys and values are 0 even with a bias.
        around = halo if self.padding == "zeros" else 0
        kv = F.pad(kv, (around, around + right, around, around + bottom))
        k, v = self._tokens(kv).split([self.dim_head, self.dim_out // self.num_heads], dim=-1)
        q_tokens = self._tokens(q)
        bias = self.pos_embed(q_tokens * self.scale if self.scale_pos_embed else q_tokens)
        y = attend(
            q_tokens,
            k,
            v,
            Halo(grid, self.block_size, halo, stride, padded=self.padding == "zeros"),
            bias=bias,
            scale=self.scale,
            key_mask=self._inside(x, grid) if self.padding == "mask" and (bottom or right) else None,
        )
        y = y.transpose(2, 3).reshape(x.shape[0], self.dim_out, *q.shape[-2:])  # type: ignore[union-attr]
        return self.pool(y[:, :, :rows, :columns])

    def _missing(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns that complete the map to whole blocks."""
        channels, height, width = x.shape[-3:]
        if channels != self.dim:
            raise ValueError(f"HaloAttention has dim={self.dim}, the input has {channels} channels")
        bottom, right = -height % self.block_size, -width % self.block_size
        if (bottom or right) and not self.pad:
            raise ValueError(
                f"a map of {height} x {width} pixels is not divisible into blocks of block_size={self.block_size}: add "
                f"{bottom} rows and {right} columns, or set pad=True"
            )
        return bottom, right

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, n * c, H, W) to (B, n, H * W, c)."""
        return x.reshape(x.shape[0], self.num_heads, -1, x.shape[2] * x.shape[3]).transpose(2, 3)

    @staticmethod
    def _inside(x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, H * W) bool on the completed grid: which keys are pixels of the map."""
        inside = torch.zeros(grid, dtype=torch.bool, device=x.device)
        inside[: x.shape[2], : x.shape[3]] = True
        return inside.flatten().expand(x.shape[0], -1)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, halo_size={self.halo_size}, padding={self.padding!r}"


@provides("04-halonet")
class HaloSelfAttention(nn.Module):
    """Halo attention with an output projection on a grid of tokens, (B, H, W, C) -> (B, H, W, C).

    With padding="mask" and scale_pos_embed=True it is the layer of lucidrains/halonet-pytorch, with the mask put right
    (that repository long masked the pixels and kept the padding); `load_lucidrains` reads its weights.

    Args:
        dim: channels C.
        num_heads: heads.
        block_size, halo_size: as in `HaloAttention`.
        dim_head: width of queries, keys and values, default dim / num_heads.
        options: further settings of `HaloAttention`, but for the stride and the widths.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block_size: int = 8,
        halo_size: int = 3,
        *,
        dim_head: int | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        dim_head = dim_head or check_heads(dim, num_heads)
        self.attn = HaloAttention(
            dim,
            num_heads * dim_head,
            num_heads=num_heads,
            dim_head=dim_head,
            block_size=block_size,
            halo_size=halo_size,
            **options,  # type: ignore[arg-type]
        )
        self.proj = nn.Linear(num_heads * dim_head, dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return self.proj(self.attn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def load_lucidrains(self, weights: dict[str, Tensor]) -> None:
        """Load a state dict of halonet_pytorch.HaloAttention, whose kv projection holds all keys, then all values."""
        names = {
            "to_q.weight": "attn.q.weight",
            "to_kv.weight": "attn.kv.weight",
            "to_out.weight": "proj.weight",
            "to_out.bias": "proj.bias",
            "rel_pos_emb.rel_height": "attn.pos_embed.height_rel",
            "rel_pos_emb.rel_width": "attn.pos_embed.width_rel",
        }
        own = {names.get(key, key): value for key, value in weights.items()}
        heads = self.attn.num_heads
        for name in own.keys() & {"attn.q.weight", "attn.kv.weight"}:
            parts = 2 if name == "attn.kv.weight" else 1
            by_head = own[name].unflatten(0, (parts, heads, -1)).transpose(0, 1)
            own[name] = by_head.reshape(own[name].shape)[:, :, None, None]
        load_weights(self, own, "the weights of halonet_pytorch")


@layers.register("halo")
def _halo(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # The paper's 8 x 8 blocks where there are several of them, else smaller ones; the halo keeps the paper's 3 : 8.
    most = min(8, max(1, max(grid) // 2))
    fitting = [b for b in range(2, most + 1) if all(side % b == 0 for side in grid)]
    block = options.setdefault("block_size", fitting[-1] if fitting and 2 * fitting[-1] > most else most)
    options.setdefault("halo_size", (3 * block + 4) // 8)  # type: ignore[operator]
    options.setdefault("pad", True)
    return HaloSelfAttention(dim, num_heads, **options)  # type: ignore[arg-type]

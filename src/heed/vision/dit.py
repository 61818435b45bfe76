"""MoH-DiT, a class-conditional diffusion transformer on latents, with plain or Mixture-of-Head attention (card 27).

    c = MLP(sinusoid(t)) + table[y]                                  (B, C); the last row of the table is "no class"
    (shift, scale, gate) x 2 = W SiLU(c) per block                   adaLN-Zero: W is 0 at first, blocks are identities
    x = x + gate_1 attention((1 + scale_1) LN(x) + shift_1)          (B, N, C), N = (img_size / patch_size)^2
    x = x + gate_2 MLP((1 + scale_2) LN(x) + shift_2)
    noise, variance = unpatch(W ((1 + scale) LN(x) + shift))         (B, 2 * in_chans, H, W)

Peebles, Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, arXiv 2212.09748; with Mixture-of-Head attention
Jin et al., "MoH", ICML 2025, arXiv 2410.11842, where layers differ in their number of heads. Training adds 0.01 times
the loss of `heed.layers.moh.collect_balance`. Parameter names are the authors', but for the router's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from timm.layers import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.attention import PatternAttention
from heed.layers.moh import MoHAttention, authors_router_key
from heed.models import HeedModel, register_models

_FREQUENCIES = 256  # channels of the sinusoid of the time step
_GUIDED = 3  # channels that classifier-free guidance acts on, as in the authors' code


@provides("27-moh")
@dataclass(frozen=True)
class DiTConfig:
    """Settings of `DiT`; heads are listed per layer.

    Args:
        img_size: side of the square latent image (pixels / 8 for Stable Diffusion's autoencoder); patches tile it.
        patch_size: side of a patch.
        in_chans: channels of the latent image.
        num_classes: classes; the class `num_classes` is "none".
        dim: channels.
        num_heads: heads of every layer; their number is the depth.
        head_dim: width of a head; 0 for dim / heads.
        mlp_ratio: hidden width of the MLP over dim.
        shared, routed: per layer the heads that all tokens use, and that a token chooses; None for plain attention.
    """

    img_size: int = 32
    patch_size: int = 2
    in_chans: int = 4
    num_classes: int = 1000
    dim: int = 1152
    num_heads: tuple[int, ...] = (16,) * 28
    head_dim: int = 0
    mlp_ratio: float = 4.0
    shared: tuple[int, ...] | None = None
    routed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size={self.img_size} is not a multiple of patch_size={self.patch_size}")
        if self.dim % 4:
            raise ValueError(f"dim={self.dim} is not a multiple of 4, as the position embedding needs")
        if (self.shared is None) != (self.routed is None):
            raise ValueError(
                f"shared={self.shared} and routed={self.routed}: give both, or neither for plain attention"
            )
        lengths = {len(heads) for heads in (self.num_heads, self.shared, self.routed) if heads is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"num_heads has {len(self.num_heads)} layers, shared {len(self.shared or ())}, "
                f"routed {len(self.routed or ())}; every list needs one entry per layer"
            )


class TimeEmbedding(nn.Module):
    """Time steps (B,) to (B, C): sinusoids, cosines first, then an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = _FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(next(self.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """Classes (B,) to (B, C); one row more than classes."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def _modulation(dim: int, pieces: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, pieces * dim))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One layer with adaLN-Zero: tokens (B, N, C) and condition (B, C) to (B, N, C)."""

    def __init__(self, config: DiTConfig, layer: int) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads[layer]
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        if config.shared is None or config.routed is None:
            self.attn: nn.Module = PatternAttention(dim, heads)
        else:
            self.attn = MoHAttention(
                dim, heads, shared=config.shared[layer], routed=config.routed[layer], head_dim=config.head_dim or None
            )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))  # type: ignore[arg-type]
        self.adaLN_modulation = _modulation(dim, 6)

    def forward(self, x: Float[Tensor, "B N C"], c: Float[Tensor, "B C"]) -> Float[Tensor, "B N C"]:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_1[:, None] * self.attn(_modulate(self.norm1(x), shift_1, scale_1))
        return x + gate_2[:, None] * self.mlp(_modulate(self.norm2(x), shift_2, scale_2))


class FinalLayer(nn.Module):
    """Tokens (B, N, C) to the pixels of their patches (B, N, outputs)."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = _modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(_modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, 1)))


@provides("27-moh")
class DiT(HeedModel):
    """Noisy latents, time steps and classes to the noise and its variance; see the module for the equations.

    Raises:
        ValueError: lists of heads of different lengths; heads that do not fit dim.
    """

    Config = DiTConfig
    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        side, dim = config.img_size // config.patch_size, config.dim
        self.x_embedder = PatchEmbed(config.img_size, config.patch_size, config.in_chans, dim)
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = LabelEmbedding(config.num_classes, dim)
        self.register_buffer("pos_embed", _positions(side, dim)[None])
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(len(config.num_heads)))
        self.final_layer = FinalLayer(dim, config.patch_size**2 * 2 * config.in_chans)
        self._initialise()

    @classmethod
    def authors_key(cls, key: str) -> str:
        return authors_router_key(key)

    def condition(self, t: Float[Tensor, " B"] | Int[Tensor, " B"], y: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
        """What steers every block: time step and class."""
        return self.t_embedder(t) + self.y_embedder(y)

    def forward(
        self, x: Float[Tensor, "B c H W"], t: Float[Tensor, " B"] | Int[Tensor, " B"], y: Int[Tensor, " B"]
    ) -> Float[Tensor, "B 2*c H W"]:
        """Noise (the first in_chans channels) and variance of noisy latents.

        Args:
            x: (B, in_chans, img_size, img_size) noisy latents.
            t: (B,) time steps of the diffusion, 0 to 999.
            y: (B,) classes; num_classes for none.

        Raises:
            ValueError: images of another size or number of channels.
        """
        config = self.config
        if x.shape[1:] != (config.in_chans, config.img_size, config.img_size):
            raise ValueError(
                f"x {tuple(x.shape)}: this model takes (B, {config.in_chans}, {config.img_size}, {config.img_size})"
            )
        c = self.condition(t, y)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        side, patch = config.img_size // config.patch_size, config.patch_size
        pixels = self.final_layer(tokens, c).unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, config.img_size, config.img_size)

    def forward_with_cfg(
        self, x: Float[Tensor, "B c H W"], t: Tensor, y: Int[Tensor, " B"], scale: float
    ) -> Float[Tensor, "B 2*c H W"]:
        """Classifier-free guidance: none + scale * (class - none), for the noise of the first three channels.

        Args:
            x: latents; the second half is ignored, the first half stands in for it.
            t: (B,) time steps.
            y: (B,) classes in the first half, num_classes in the second.
            scale: strength of the guidance; 1 is none.

        Raises:
            ValueError: a batch that has no two halves.
        """
        if len(x) % 2:
            raise ValueError(f"a batch of {len(x)} has no two halves; stack the latents twice, with and without class")
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        given, none = out[:, :_GUIDED].chunk(2)
        noise = none + scale * (given - none)
        return torch.cat([torch.cat([noise, noise]), out[:, _GUIDED:]], 1)

    def drop_labels(
        self, y: Int[Tensor, " B"], rate: float = 0.1, generator: torch.Generator | None = None
    ) -> Int[Tensor, " B"]:
        """Replace classes by "none" with probability `rate`: training with it is what makes guidance possible."""
        drop = torch.rand(y.shape, generator=generator, device=y.device) < rate
        return y.masked_fill(drop, self.config.num_classes)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.dim, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for weight in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(weight.weight, std=0.02)  # type: ignore[arg-type]
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]]:  # type: ignore[index,union-attr]
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def _positions(side: int, dim: int) -> Float[Tensor, "N C"]:
    """Sinusoids of column and row, half of the channels each, (side * side, dim)."""
    rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1).float()
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], 1)


def _moh(dim: int, head_dim: int, layers: Sequence[tuple[int, int, int, int]]) -> DiTConfig:
    """A configuration from runs of equal layers: (layers, heads, shared, routed)."""
    heads, shared, routed = (tuple(run[i] for run in layers for _ in range(run[0])) for i in (1, 2, 3))
    return DiTConfig(dim=dim, head_dim=head_dim, num_heads=heads, shared=shared, routed=routed)


register_models(
    DiT,
    moh_dit_micro=DiTConfig(
        img_size=8,
        in_chans=3,
        num_classes=10,
        dim=32,
        num_heads=(4, 6),
        head_dim=8,
        mlp_ratio=2.0,
        shared=(4, 2),
        routed=(0, 2),
    ),
    moh_dit_s2_90=_moh(384, 64, [(8, 6, 3, 2), (4, 6, 6, 0)]),
    moh_dit_s2_75=_moh(384, 64, [(2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)]),
    moh_dit_b2_90=_moh(768, 64, [(5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)]),
    moh_dit_b2_75=_moh(768, 64, [(2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0)]),
    moh_dit_l2_90=_moh(1024, 64, [(8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)]),
    moh_dit_l2_75=_moh(1024, 64, [(8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)]),
    moh_dit_xl2_90=_moh(1152, 72, [(9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)]),
    moh_dit_xl2_75=_moh(1152, 72, [(9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)]),
    dit_s2=DiTConfig(dim=384, num_heads=(6,) * 12),
    dit_b2=DiTConfig(dim=768, num_heads=(12,) * 12),
    dit_l2=DiTConfig(dim=1024, num_heads=(16,) * 24),
    dit_xl2=DiTConfig(),
)

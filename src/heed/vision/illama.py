"""iLLaMA (card 07): a LLaMA decoder as image classifier; the class token comes last, where a causal mask sees all.

    x = [patches(image); class token] + positions                         (B, N, C), N = patches + 1
    q, k, v = x W_qkv;  q, k turned by RoPE: channels (2i, 2i+1) of token n by the angle n * 10000^(-2i/d)
    attn(x) = (softmax(q k^T / sqrt(d)) * M) v W_proj,   M = r * ones + (1 - r) * lower triangle       (N, N)
    x = x + attn(RMSNorm(x));  x = x + W_2 (silu(W_1 y) * W_3 y), y = RMSNorm(x)
    logits = head(RMSNorm(x)[last])

The soft mask rate r falls from 1 (bidirectional) to 0 (causal) early in training: `heed.vision.illama_training`.

The released code multiplies by the mask AFTER the softmax and does not renormalise, and released weights need that: it
is mask_mode="post", the default. Rows of patches then do not sum to 1 and their normalisers see later tokens, so the
network is NOT causal: evaluating a prefix gives other numbers, and no products are saved. The paper describes an
ordinary causal mask; that is mask_mode="pre", softmax(q k^T / sqrt(d) + log M).

Wang et al., "Adapting LLaMA Decoder to Vision Transformer", 2024 (arXiv 2404.06773).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal, Full
from heed.errors import unknown
from heed.layers.attention import check_heads
from heed.models import register_models
from heed.vision.backbone import ClassTokenBackbone
from heed.vision.illama_weights import LLAMA_NAMES, resize_positions, select_elements
from heed.vision.parts import drop_path_rates, init_linear

_CHOICES = {
    "ffn": ("swiglu", "mlp"),
    "norm": ("rms", "layer"),
    "mask": ("causal", "modified", "none"),
    "mask_mode": ("post", "pre"),
    "positions": ("both", "learned", "rope"),
}


@provides("07-illama")
@dataclass(frozen=True)
class ILlamaConfig:
    """Settings of `ILlama`; the defaults are iLLaMA-Tiny. `ROADMAP` has the steps that lead here from a ViT.

    Args:
        img_size: side of the square input image in pixels; a multiple of patch_size.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels C.
        depth: blocks.
        num_heads: heads per block; C / num_heads must be even for RoPE.
        mlp_ratio: the hidden width is int(2 * int(mlp_ratio * C) / 3), rounded up to hidden_multiple ("swiglu"), or
            int(mlp_ratio * C) ("mlp").
        hidden_multiple: see mlp_ratio.
        ffn: "swiglu" (no biases) or "mlp" (GELU).
        norm: "rms" or "layer".
        mask: "causal"; "modified", which opens the first row for a class token that comes first (heed's reading of the
            paper's Figure 2c, the code has none); or "none".
        mask_mode: "post" multiplies the weights after the softmax as released, "pre" masks the scores; see the module.
        soft_mask_rate: r in [0, 1]; 1 opens the mask, 0 closes it. `set_soft_mask` changes it.
        class_first: put the class token before the patches; under a causal mask it then sees nothing but itself.
        positions: "learned" embeddings, "rope", or "both".
        qkv_bias: whether queries, keys and values have biases.
        drop_path: stochastic depth of the last block, linear from 0.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    hidden_multiple: int = 256
    ffn: str = "swiglu"
    norm: str = "rms"
    mask: str = "causal"
    mask_mode: str = "post"
    soft_mask_rate: float = 0.0
    class_first: bool = False
    positions: str = "both"
    qkv_bias: bool = True
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(unknown(name, getattr(self, name), choices))
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size={self.img_size} is not a multiple of patch_size={self.patch_size}")
        if self.positions != "learned" and check_heads(self.dim, self.num_heads) % 2:
            raise ValueError(
                f"RoPE turns pairs of channels: dim={self.dim} over num_heads={self.num_heads} must be even, or "
                "positions='learned'"
            )
        SoftMask(self.soft_mask_rate)

    @property
    def side(self) -> int:
        """Patches per row and column."""
        return self.img_size // self.patch_size


# From a ViT to iLLaMA, one change of the paper at a time: name of the step -> settings of `ILlamaConfig`.
_VIT = {"ffn": "mlp", "norm": "layer", "mask": "none", "class_first": True, "positions": "learned"}
_LLAMA_BLOCK = _VIT | {"ffn": "swiglu", "norm": "rms"}
ROADMAP: dict[str, dict[str, Any]] = {
    "ViT": _VIT,
    "SwiGLU": _VIT | {"ffn": "swiglu"},
    "RMSNorm": _LLAMA_BLOCK,
    "causal, class token first": _LLAMA_BLOCK | {"mask": "causal", "mask_mode": "pre"},  # attention collapses
    "causal, modified mask": _LLAMA_BLOCK | {"mask": "modified", "mask_mode": "pre"},
    "causal, class token last": _LLAMA_BLOCK | {"mask": "causal", "class_first": False},
    "RoPE": _LLAMA_BLOCK | {"mask": "causal", "class_first": False, "positions": "rope"},
    "iLLaMA": {},
}


@provides("07-illama")
@dataclass(frozen=True)
class SoftMask:
    """M = rate * ones + (1 - rate) * lower triangle.

    Args:
        rate: r in [0, 1]: 1 bidirectional, 0 causal.
        opened: whether the first row is 1 throughout.
    """

    rate: float = 0.0
    opened: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"soft_mask_rate={self.rate} must lie in [0, 1]: 1 is bidirectional, 0 causal")

    def weights(self, n: int, device: torch.device | None = None) -> Float[Tensor, "N N"]:
        """M for n tokens, float32."""
        lower = torch.ones(n, n, device=device).tril()
        if self.opened:
            lower[0] = 1
        return self.rate + (1 - self.rate) * lower


@provides("07-illama")
def rope_table(
    n: int, head_dim: int, theta: float = 10000.0, device: torch.device | None = None
) -> tuple[Float[Tensor, "N pairs"], Float[Tensor, "N pairs"]]:
    """Cosines and sines, (n, head_dim / 2) float32, of the angles position * theta^(-2i / head_dim)."""
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs of channels; head_dim={head_dim} is odd")
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x: Float[Tensor, "B h N d"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "B h N d"]:
    """Turn ADJACENT channels (2i, 2i + 1), in float32; LLaMA in transformers pairs channels half the width apart."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


@provides("07-illama")
class SoftMaskedAttention(nn.Module):
    """Multi-head self-attention with RoPE under a soft mask, (B, N, C) -> (B, N, C).

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        qkv_bias: whether the q, k, v projection has a bias.
        mask_mode: "post" or "pre", see the module.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, mask_mode: str = "post") -> None:
        super().__init__()
        if mask_mode not in _CHOICES["mask_mode"]:
            raise ValueError(unknown("mask_mode", mask_mode, _CHOICES["mask_mode"]))
        self.head_dim = check_heads(dim, num_heads)
        self.mask_mode = mask_mode
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "B N C"], mask: SoftMask | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "B N C"]:
        """Mix tokens; no mask is a mask of rate 1, and no `rope` leaves queries and keys as they are."""
        q, k, v = self._project(x, rope)
        if mask is None or mask.rate == 1:
            y = attend(q, k, v, Full())
        elif self.mask_mode == "post":
            # The mask multiplies the weights, so they are needed as such.
            y = _post_weights(q, k, mask).to(v.dtype) @ v
        elif mask == SoftMask(0):
            y = attend(q, k, v, Causal())
        else:
            y = attend(q, k, v, Full(), bias=mask.weights(q.shape[2], q.device).log().to(q.dtype))
        return self.proj(y.transpose(1, 2).flatten(2))

    def maps(
        self, x: Float[Tensor, "B N C"], mask: SoftMask | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "B h N N"]:
        """What each token (row) takes from each, masked, float32; in "post" mode rows need not sum to 1."""
        q, k, _ = self._project(x, rope)
        if self.mask_mode == "post":
            return _post_weights(q, k, mask or SoftMask(1.0))
        scores = self.head_dim**-0.5 * (q @ k.transpose(-1, -2)).float()
        return (scores + (mask or SoftMask(1.0)).weights(q.shape[2], q.device).log()).softmax(-1)

    def _project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return (q, k, v) if rope is None else (apply_rope(q, rope), apply_rope(k, rope), v)


def _post_weights(q: Tensor, k: Tensor, mask: SoftMask) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.float().softmax(-1) * mask.weights(q.shape[2], q.device)


class SwiGlu(nn.Module):
    """W_2 (silu(W_1 x) * W_3 x) without biases, (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


@provides("07-illama")
class ILlamaBlock(nn.Module):
    """Pre-norm decoder block, (B, N, C) -> (B, N, C).

    Args:
        config: the model's settings.
        drop_path: probability of skipping a branch while training, per image.
    """

    def __init__(self, config: ILlamaConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        c = config
        self.norm1 = _norm(c)
        self.attn = SoftMaskedAttention(c.dim, c.num_heads, qkv_bias=c.qkv_bias, mask_mode=c.mask_mode)
        self.norm2 = _norm(c)
        wide = int(c.mlp_ratio * c.dim)
        hidden = math.ceil(int(2 * wide / 3) / c.hidden_multiple) * c.hidden_multiple
        self.mlp = SwiGlu(c.dim, hidden) if c.ffn == "swiglu" else Mlp(c.dim, wide)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "B N C"], mask: SoftMask | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "B N C"]:
        x = x + self.drop_path(self.attn(self.norm1(x), mask, rope))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _norm(config: ILlamaConfig) -> nn.Module:
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.dim, eps=1e-6)


class PatchEmbed(nn.Module):
    """Images to patches in row-major order, (B, in_chans, H, W) -> (B, N, C)."""

    def __init__(self, config: ILlamaConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.dim, config.patch_size, config.patch_size)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        return self.proj(x).flatten(2).transpose(1, 2)


@provides("07-illama")
class ILlama(ClassTokenBackbone):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits; see the module for the equations.

    `forward_intermediates` gives the patch tokens after every block as maps, for segmentation.
    """

    Config = ILlamaConfig

    def __init__(self, config: ILlamaConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dim
        self.feature_info = [
            {"num_chs": c.dim, "reduction": c.patch_size, "module": f"blocks.{i}"} for i in range(c.depth)
        ]
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.pos_embed: nn.Parameter | None = None
        if c.positions != "rope":
            self.pos_embed = nn.Parameter(torch.empty(1, c.side**2 + 1, c.dim))
            trunc_normal_(self.pos_embed, std=0.02)
        (rates,) = drop_path_rates(c.drop_path, [c.depth])
        self.blocks = nn.ModuleList(ILlamaBlock(c, rate) for rate in rates)
        self.norm = _norm(c)
        self.head = self.classifier(c.num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    @property
    def mask(self) -> SoftMask | None:
        """The mask of all blocks as it is now."""
        c = self.config
        return None if c.mask == "none" else SoftMask(c.soft_mask_rate, c.mask == "modified")

    def set_soft_mask(self, rate: float) -> None:
        """Set r, in [0, 1], for all blocks; a compiled model is compiled anew for every other rate."""
        self.config = replace(self.config, soft_mask_rate=float(rate))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the authors do not decay, for timm's optimiser factory."""
        return {"pos_embed", "cls_token"}

    def embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """What the blocks start from: patches and the class token, with learned positions."""
        token, patches = self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)
        tokens = torch.cat([token, patches] if self.config.class_first else [patches, token], 1)
        return tokens if self.pos_embed is None else tokens + self.pos_embed

    def rope(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for all tokens, or None where positions are learned alone."""
        c = self.config
        if c.positions == "learned":
            return None
        return rope_table(c.side**2 + 1, c.dim // c.num_heads, device=device)

    def maps_and_token(self, x: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], Tensor]:
        c = self.config
        tokens, mask, rope = self.embed(x), self.mask, self.rope(x.device)
        patches = slice(1, None) if c.class_first else slice(-1)
        maps = []
        for block in self.blocks:
            tokens = block(tokens, mask, rope)
            maps.append(tokens[:, patches].transpose(1, 2).unflatten(2, (c.side, c.side)))
        return maps, self.norm(tokens[:, 0 if c.class_first else -1])

    @torch.no_grad()
    def attention_maps(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "depth B h N N"]:
        """What each token takes from each in every block, after the mask; see `SoftMaskedAttention.maps`."""
        tokens, mask, rope = self.embed(x), self.mask, self.rope(x.device)
        maps = []
        for block in self.blocks:
            maps.append(block.attn.maps(block.norm1(tokens), mask, rope))  # type: ignore[operator, union-attr]
            tokens = block(tokens, mask, rope)
        return torch.stack(maps)

    def resized(self, img_size: int) -> ILlama:
        """The same model for images of another size, as for fine-tuning at 384 pixels: learned positions are resized,
        RoPE goes on with more tokens, all other weights are copied."""
        other = ILlama(replace(self.config, img_size=img_size))
        weights = self.state_dict()
        if "pos_embed" in weights:
            weights["pos_embed"] = resize_positions(weights["pos_embed"], other.config.side, self.config.class_first)
        other.load_state_dict(weights)
        return other.to(self.cls_token.device, self.cls_token.dtype).train(self.training)

    def load_llama(self, weights: dict[str, Tensor]) -> list[str]:
        """Start from a larger LLaMA: every block from its namesake, by `select_elements`; the rest stays as it is.

        Rows of the concatenated q, k, v projection are picked evenly, as the authors do, so a student's q, k and v
        cross the teacher's borders where its width does not divide the teacher's. LLaMA's RoPE pairs other channels
        than this model's; both make it an initialisation, not a conversion.

        Args:
            weights: a LLaMA-2 state dict with transformers' names, at least as many layers as this model has blocks.

        Returns:
            The names of the parameters that were set.

        Raises:
            ValueError: a layer is missing, or the teacher is smaller than this model.
        """
        if self.config.ffn != "swiglu" or self.config.norm != "rms":
            raise ValueError(f"ffn={self.config.ffn!r}, norm={self.config.norm!r}: LLaMA has 'swiglu' and 'rms'")
        own, chosen = self.state_dict(), {}
        for i in range(self.config.depth):
            for name, theirs in LLAMA_NAMES.items():
                keys = [f"model.layers.{i}.{part}.weight" for part in theirs]
                missing = [key for key in keys if key not in weights]
                if missing:
                    raise ValueError(f"the LLaMA weights lack {missing[0]}; {self.config.depth} layers are needed")
                key = f"blocks.{i}.{name}.weight"
                chosen[key] = select_elements(torch.cat([weights[k] for k in keys]), tuple(own[key].shape))
        self.load_state_dict(chosen, strict=False)
        return list(chosen)


_TINY = ILlamaConfig()
_SMALL = replace(_TINY, dim=384, num_heads=6, drop_path=0.1)
_BASE = replace(_TINY, dim=768, num_heads=12, drop_path=0.4)
_LARGE = replace(_TINY, dim=1024, depth=24, num_heads=16)

register_models(
    ILlama,
    # For images of 8 to 32 pixels a side: the size of `vit_micro`.
    illama_micro=ILlamaConfig(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        hidden_multiple=8,
    ),
    illama_tiny=_TINY,
    illama_small=_SMALL,
    illama_base=_BASE,
    illama_base_384=replace(_BASE, img_size=384),
    illama_large=_LARGE,
    illama_large_384=replace(_LARGE, img_size=384),
)

"""Encoders that can drop tokens: small adapters around plain vision transformers.

    x = [prefix tokens, patches(image)[keep]] + positions            (B, P + K, C)
    latent = LN(blocks(x))

A transformer with dense softmax attention takes any subset of its tokens. Mechanisms that know the grid (windows,
convolutions, pooled keys) do not, and are refused here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int64
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from heed.layers.attention import PatternAttention
from heed.pretrain.masks import take
from heed.pretrain.positions import First, sincos_positions
from heed.vision.vit import ViT


class Encoder(nn.Module, ABC):
    """A backbone seen as an encoder of visible patches.

    Attributes:
        backbone: the model itself; train, save or fine-tune it as what it is.
        dim: channels of a token.
        channels: of the images.
        patch: side of a patch in pixels.
        grid: rows and columns of tokens.
        prefix: tokens in front that are never dropped (class token, registers).
    """

    backbone: Any
    dim: int
    channels: int
    patch: int
    grid: tuple[int, int]
    prefix: int

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "B C H W"], keep: Int64[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Encode images.

        Args:
            images: (B, C, H, W).
            keep: ids of the tokens to see, in the order in which they are wanted; None for all.

        Returns:
            (B, prefix + K, dim): after the last norm, prefix tokens first.
        """

    @abstractmethod
    def pooled(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """What the backbone's classifier reads, with every token visible."""

    @abstractmethod
    def position_table(self) -> tuple[nn.Parameter, int]:
        """The backbone's learned table of positions, and how many of its rows belong to prefix tokens."""

    def fix_positions(self, first: First = "row") -> None:
        """Overwrite the table of positions with sinusoids (see `sincos_positions`), and stop training it."""
        table, prefix = self.position_table()
        fixed = sincos_positions(self.grid, self.dim, first=first, prefix=prefix)
        with torch.no_grad():
            table.copy_(fixed.view(table.shape))
        table.requires_grad_(False)


class GridEncoder(Encoder):
    """heed's `ViT` as an encoder; it has no class token.

    Args:
        backbone: whose attention is "softmax".
    """

    def __init__(self, backbone: ViT) -> None:
        super().__init__()
        for block in backbone.blocks:
            # Exactly this class: those that derive from it put a pattern or a bias on the grid.
            if type(block.attn) is not PatternAttention:  # type: ignore[union-attr]
                raise ValueError(
                    f"attention={backbone.config.attention!r} needs the whole grid of tokens, so masked tokens cannot "
                    "be dropped; pre-train with attention='softmax'"
                )
        config = backbone.config
        self.backbone: ViT = backbone
        self.dim, self.channels, self.patch, self.prefix = config.dim, config.in_chans, config.patch_size, 0
        self.grid = (config.img_size // config.patch_size,) * 2

    def forward(
        self, images: Float[Tensor, "B C H W"], keep: Int64[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        self.backbone.check_images(images)
        x = (self.backbone.patch_embed(images).permute(0, 2, 3, 1) + self.backbone.pos_embed).flatten(1, 2)
        if keep is not None:
            x = take(x, keep)
        x = x[:, None]  # a grid of one row, which is all the same to dense attention
        for block in self.backbone.blocks:
            x = block(x)
        return self.backbone.norm(x)[:, 0]

    def pooled(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)

    def position_table(self) -> tuple[nn.Parameter, int]:
        return self.backbone.pos_embed, 0


class TimmEncoder(Encoder):
    """timm's `VisionTransformer` as an encoder, with whatever prefix tokens it has.

    Args:
        backbone: e.g. timm.create_model("vit_base_patch16_224").
    """

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        rows, columns = backbone.patch_embed.patch_size
        if rows != columns:
            raise ValueError(f"patches of {rows} x {columns} pixels: square ones are needed")
        self.backbone: Any = backbone
        self.dim, self.channels, self.patch = backbone.embed_dim, backbone.in_chans, rows
        self.prefix = backbone.num_prefix_tokens
        self.grid = tuple(backbone.patch_embed.grid_size)  # type: ignore[arg-type]

    def forward(
        self, images: Float[Tensor, "B C H W"], keep: Int64[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        vit = self.backbone
        if keep is None:
            return vit.forward_features(images)
        x = vit._pos_embed(vit.patch_embed(images))
        x = torch.cat([x[:, : self.prefix], take(x[:, self.prefix :], keep)], 1)
        return vit.norm(vit.blocks(vit.norm_pre(x)))

    def pooled(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)

    def position_table(self) -> tuple[nn.Parameter, int]:
        table = self.backbone.pos_embed
        if table is None:
            raise ValueError("this vision transformer has no table of positions; create it with pos_embed='learn'")
        return table, 0 if self.backbone.no_embed_class else self.prefix


def encoder_for(model: nn.Module) -> Encoder:
    """The adapter of a model.

    Args:
        model: heed's `ViT`, timm's `VisionTransformer`, or an `Encoder`, which is returned as it is.

    Raises:
        TypeError: no adapter knows the model.
        ValueError: its attention cannot drop tokens.
    """
    if isinstance(model, Encoder):
        return model
    if isinstance(model, ViT):
        return GridEncoder(model)
    if isinstance(model, VisionTransformer):
        return TimmEncoder(model)
    raise TypeError(
        f"a {type(model).__name__} is no encoder that can drop tokens; give heed's ViT ('vit_micro', ...), timm's "
        "VisionTransformer, or a subclass of heed.pretrain.encoders.Encoder"
    )


def initialise(module: nn.Module) -> None:
    """The start of masked autoencoders: linear weights and patch convolutions Xavier-uniform, tokens normal with 0.02.

    Biases are 0, but those of MLPs normal with deviation 1e-6; norms are the identity.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1))
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Mlp):
            for linear in (part.fc1, part.fc2):
                nn.init.normal_(linear.bias, std=1e-6)  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "reg_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)

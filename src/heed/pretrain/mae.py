"""Masked autoencoders: encode the visible patches, draw the masked ones.

    latent = encoder(image, keep)                                    (B, P + K, C)
    y = restore([W latent, mask token ...]) + positions              (B, P + N, D)
    prediction = W' LN(blocks(y))                                    (B, N, p p channels)
    loss = mean over masked patches of (prediction - target)^2       target: pixels of the patch, normalised

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377. With masks from green noise
it is ColorMAE (Hinojosa, Liu, Ghanem, ECCV 2024, arXiv 2407.13036), at the same size and cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Bool, Float, Int64
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights, read_weights
from heed.errors import unknown
from heed.layers.attention import check_heads
from heed.pretrain.color import ColorMask
from heed.pretrain.encoders import Encoder, encoder_for, initialise
from heed.pretrain.mae_checkpoints import mae_weights
from heed.pretrain.masks import BlockMask, GridMask, MaskGenerator, RandomMask, order_of
from heed.pretrain.noise import COLORS
from heed.pretrain.objective import Objective, Outcome, objectives
from heed.pretrain.patches import (
    masked_mean,
    normalise_patches,
    patchify,
    restore_patches,
    show_masked,
    unpatchify,
)
from heed.pretrain.positions import First, sincos_positions


class Decoder(nn.Module):
    """Latents of visible tokens to one vector per token, (B, P + K, C) -> (B, N, out).

    Args:
        encoder: gives the grid, the channels and the number of prefix tokens.
        out: values per token.
        dim, depth, num_heads: of the decoder's transformer.
        mlp_ratio: hidden width of its MLPs over dim.
        first: order of its fixed positions, see `sincos_positions`.
    """

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        first: First = "row",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.prefix = encoder.prefix
        self.embed = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = sincos_positions(encoder.grid, dim, first=first, prefix=encoder.prefix)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, mlp_ratio, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out)
        initialise(self)

    def forward(self, latent: Float[Tensor, "B T C"], restore: Int64[Tensor, "B N"]) -> Float[Tensor, "B N out"]:
        """Decode.

        Args:
            latent: prefix tokens, then the visible ones in the encoder's order.
            restore: see `TokenOrder`.
        """
        prefix, visible = self.embed(latent).tensor_split([self.prefix], 1)
        batch, seen, dim = visible.shape
        hidden = self.mask_token.to(visible.dtype).expand(batch, restore.shape[1] - seen, dim)
        tokens = torch.cat([visible, hidden], 1).gather(1, restore[..., None].expand(-1, -1, dim))
        x = self.blocks(torch.cat([prefix, tokens], 1) + self.pos_embed)
        return self.head(self.norm(x))[:, self.prefix :]


@provides("06-colormae")
class MaskedAutoencoder(Objective):
    """Reconstruct the pixels of masked patches from the visible ones; see the module for the equations.

    Args:
        encoder: heed's ViT, timm's VisionTransformer, or an `Encoder`.
        mask: which patches are masked, e.g. ColorMask("green") or RandomMask(0.75); may be exchanged at any time.
        decoder_dim, decoder_depth, decoder_heads: of the decoder, which is thrown away afterwards.
        mlp_ratio: hidden width of the decoder's MLPs over decoder_dim.
        norm_pix: normalise the pixels of every patch of the target.
        detach_target: take the target for a constant where images need gradients; the authors do not.
        positions: "row" (mmpretrain, ColorMAE) or "column" (facebookresearch, transformers) overwrites the encoder's
            positions with fixed sinusoids in this order; None leaves them as they are. The decoder's are sinusoids.

    Raises:
        TypeError, ValueError: the encoder cannot drop tokens, or the mask does not fit its grid.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mask: MaskGenerator,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix: bool = True,
        detach_target: bool = False,
        positions: First | None = "row",
    ) -> None:
        super().__init__()
        self.encoder = encoder_for(encoder)
        mask.visible(self.encoder.grid)
        self.mask = mask
        self.norm_pix = norm_pix
        self.detach_target = detach_target
        pixels = self.encoder.patch**2 * self.encoder.channels
        if norm_pix and pixels < 2:
            raise ValueError("norm_pix=True: patches of a single value cannot be normalised; set norm_pix=False")
        if positions is not None:
            self.encoder.fix_positions(positions)
        self.decoder = Decoder(
            self.encoder, pixels, decoder_dim, decoder_depth, decoder_heads, mlp_ratio, positions or "row"
        )

    def target(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """What is to be predicted of every patch."""
        patches = patchify(images.detach() if self.detach_target else images, self.encoder.patch)
        return normalise_patches(patches) if self.norm_pix else patches

    def loss(
        self,
        prediction: Float[Tensor, "B N D"],
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"],
    ) -> Float[Tensor, ""]:
        """Mean squared error over the masked patches."""
        error = (prediction - self.target(images)).square().mean(-1)
        return masked_mean(error, mask)

    def forward(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None) -> Outcome:
        mask, prediction = self._predict(images, generator)
        loss = self.loss(prediction, images, mask)
        return Outcome(loss, {"mask": mask, "prediction": prediction.detach()})

    def _predict(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        drawn = self.mask(len(images), self.encoder.grid, generator=generator)
        order = order_of(drawn.to(images.device))
        return order.mask, self.decoder(self.encoder(images, order.keep), order.restore)

    @torch.no_grad()
    def pictures(
        self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None
    ) -> dict[str, Float[Tensor, "B C H W"]]:
        """The visible patches ("masked"), and the image with its masked patches as predicted ("reconstructed").

        With norm_pix, a predicted patch gets the mean and contrast of the true one, as in He et al.'s figures.
        """
        mask, prediction = self._predict(images, generator)
        patches = patchify(images, self.encoder.patch)
        if self.norm_pix:
            prediction = restore_patches(prediction, patches)
        drawn = torch.where(mask[..., None], prediction, patches)
        shown = {"masked": show_masked(patches, mask), "reconstructed": drawn}
        return {name: unpatchify(value, self.encoder.patch, self.encoder.grid) for name, value in shown.items()}

    def load_authors(self, weights: dict[str, Tensor] | str | Path) -> Self:
        """Load a whole pre-training checkpoint of mmpretrain (ColorMAE), facebookresearch/mae or transformers.

        The encoder must be timm's `VisionTransformer` with a class token; `masked_vit` builds one. The tables of
        positions come with the weights.

        Args:
            weights: a state dict, or the path of a checkpoint.
        """
        source = "the authors' weights" if isinstance(weights, dict) else str(weights)
        weights = weights if isinstance(weights, dict) else read_weights(weights)
        load_weights(self, mae_weights(weights), source)
        return self


@provides("06-colormae")
@dataclass(frozen=True)
class MaskedViTConfig:
    """A vision transformer with class token, and its decoder.

    Args:
        img_size, patch_size, in_chans: images and patches, in pixels.
        dim, depth, num_heads, mlp_ratio: of the encoder.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
        norm_pix: see `MaskedAutoencoder`.
        detach_target: see `MaskedAutoencoder`.
        positions: see `MaskedAutoencoder`.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    norm_pix: bool = True
    detach_target: bool = False
    positions: First = "row"


CONFIGS = {
    "vit_base": MaskedViTConfig(),
    "vit_large": MaskedViTConfig(dim=1024, depth=24, num_heads=16),
}


@provides("06-colormae")
def masked_vit(name: str | MaskedViTConfig, mask: MaskGenerator, **overrides: object) -> MaskedAutoencoder:
    """A masked autoencoder as the authors build it, initialised as theirs.

    Args:
        name: "vit_base" or "vit_large" (patches of 16 pixels, 224 a side), or a configuration.
        mask: e.g. ColorMask("green").
        overrides: fields of the configuration to change.

    Returns:
        An objective whose `encoder.backbone` is timm's VisionTransformer without classifier.
    """
    if isinstance(name, str):
        if name not in CONFIGS:
            raise ValueError(unknown("masked autoencoder", name, CONFIGS))
        name = CONFIGS[name]
    fields = {field.name for field in dataclasses.fields(name)}
    for key in overrides:
        if key not in fields:
            raise ValueError(unknown("setting of a masked autoencoder", key, fields))
    config = dataclasses.replace(name, **overrides)  # type: ignore[arg-type]
    vit = VisionTransformer(
        config.img_size,
        config.patch_size,
        config.in_chans,
        num_classes=0,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
    )
    initialise(vit)
    return MaskedAutoencoder(
        vit,
        mask,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        mlp_ratio=config.mlp_ratio,
        norm_pix=config.norm_pix,
        detach_target=config.detach_target,
        positions=config.positions,
    )


def _grid_mask(ratio: float) -> GridMask:
    period = round((1 / (1 - ratio)) ** 0.5)
    if period < 2 or abs(1 - 1 / period**2 - ratio) > 1e-6:
        raise ValueError(f"ratio={ratio}: a grid mask keeps one token of 4, 9, ...; use 0.75 for one of 4")
    return GridMask(period)


# What "mae-NAME" masks, by its ratio.
MASKS: dict[str, Callable[[float], MaskGenerator]] = {
    "random": RandomMask,
    "block": BlockMask,
    "grid": _grid_mask,
    **{color: partial(ColorMask, color) for color in COLORS},
}


def _build(
    make_mask: Callable[[float], MaskGenerator], model: nn.Module, *, ratio: float = 0.75, **options: object
) -> MaskedAutoencoder:
    """With a decoder for a small encoder, of half its width and one block, unless the options say otherwise."""
    encoder = encoder_for(model)
    small = {"decoder_dim": max(8, encoder.dim // 2), "decoder_depth": 1, "decoder_heads": 2}
    return MaskedAutoencoder(encoder, make_mask(ratio), **{**small, **options})  # type: ignore[arg-type]


for _name, _make in MASKS.items():
    objectives.add(f"mae-{_name}", partial(_build, _make))

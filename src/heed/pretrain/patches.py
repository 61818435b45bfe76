"""Images as sequences of patches, and patches as targets.

patchify: (B, C, h p, w p) -> (B, h w, p p C); inside a patch the order is row, column, channel
target = (patch - mean) / sqrt(var + 1e-6), mean and unbiased variance over the patch     (norm_pix)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_EPS = 1e-6


def patchify(images: Float[Tensor, "B C H W"], patch: int) -> Float[Tensor, "B N D"]:
    """Images to patches of patch x patch pixels; the sides must be multiples of it."""
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} pixels are not tiled by patches of {patch} x {patch}")
    cut = images.view(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Float[Tensor, "B N D"], patch: int, grid: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """The inverse of `patchify` for patches on a grid of rows and columns."""
    batch, (rows, columns) = len(patches), grid
    cut = patches.view(batch, rows, columns, patch, patch, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch, columns * patch)


def normalise_patches(patches: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Every patch with mean 0 and deviation 1."""
    mean, deviation = _statistics(patches)
    return (patches - mean) / deviation


def restore_patches(normalised: Float[Tensor, "B N D"], patches: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """The inverse of `normalise_patches`, with the mean and deviation of `patches`."""
    mean, deviation = _statistics(patches)
    return normalised * deviation + mean


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + _EPS).sqrt()


def masked_mean(values: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, ""]:
    """The mean over the masked tokens of the whole batch."""
    return (values * mask).sum() / mask.sum()


def show_masked(patches: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
    """The visible patches alone; NaN where they are masked, for who draws them to choose a colour."""
    return patches.masked_fill(mask[..., None], torch.nan)

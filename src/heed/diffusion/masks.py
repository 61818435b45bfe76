"""Masks of image editors: read from a file, an array, a box or a polygon, merged, grown, and brought to latent cells.

    grow(M, k)[y, x] = max of M[y + i, x + j], i, j in -(k//2) .. k - 1 - k//2    M (H, W) uint8, k > 0
    shrink: the same with min and |k|, k < 0; what lies outside the picture never wins

The anchor at k//2 and the nearest reduction (cell i takes pixel floor(i H / h)) are those of OpenCV, which the authors
of the editors use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the picture; right and bottom are outside it."""

    left: int
    top: int
    right: int
    bottom: int

    def __post_init__(self) -> None:
        if self.left >= self.right or self.top >= self.bottom:
            raise ValueError(f"{self} is empty: left < right and top < bottom are needed")


@dataclass(frozen=True)
class Polygon:
    """A filled polygon: corners (x, y) in pixels of the picture, three or more."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.points) < 3 or any(len(point) != 2 for point in self.points):
            raise ValueError(f"a polygon needs three or more corners (x, y), not {self.points}")


# A path, a picture with one channel, an array (H, W) of bool, uint8 or floats in [0, 1], a box or a polygon.
Mask = str | Path | Image.Image | np.ndarray | Box | Polygon


def parse_mask(text: str) -> Mask:
    """A mask from the command line: a path, "box:LEFT,TOP,RIGHT,BOTTOM" or "polygon:X,Y X,Y X,Y".

    Raises:
        ValueError: a box or polygon that cannot be read.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ("box", "polygon"):
        return Path(text)
    try:
        if kind == "box":
            left, top, right, bottom = (int(x) for x in rest.split(","))
            return Box(left, top, right, bottom)
        corners = [tuple(float(x) for x in pair.split(",")) for pair in rest.split()]
    except ValueError as error:
        raise ValueError(f"{text!r} is no mask; write box:LEFT,TOP,RIGHT,BOTTOM or polygon:X,Y X,Y X,Y") from error
    return Polygon(tuple(corners))  # type: ignore[arg-type]


def read_mask(mask: Mask, size: Size, name: str = "mask") -> UInt8[np.ndarray, "H W"]:
    """The mask as (H, W) uint8: 255 inside, 0 outside, grey where it is soft.

    Args:
        mask: see `Mask`; a file must hold one channel.
        size: height and width of the picture it belongs to.
        name: what it is called in error messages.

    Raises:
        ValueError: several channels, another size than the picture's, or values outside [0, 1].
        FileNotFoundError: no such file.
    """
    if isinstance(mask, Box | Polygon):
        canvas = Image.new("L", (size[1], size[0]))
        draw = ImageDraw.Draw(canvas)
        if isinstance(mask, Box):
            draw.rectangle((mask.left, mask.top, mask.right - 1, mask.bottom - 1), fill=255)
        else:
            draw.polygon([tuple(point) for point in mask.points], fill=255)
        return np.asarray(canvas)
    if isinstance(mask, str | Path):
        if not Path(mask).is_file():
            raise FileNotFoundError(f"{name}: no file at {mask}")
        with Image.open(mask) as file:
            mask = ImageOps.exif_transpose(file)
    if isinstance(mask, Image.Image):
        if mask.mode not in ("1", "L"):
            raise ValueError(f"{name} has the channels {mask.mode}, one is needed: save it in grey or .convert('L')")
        mask = np.asarray(mask)
    return _as_bytes(mask, size, name)


def _as_bytes(mask: Any, size: Size, name: str) -> np.ndarray:
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"{name} must be a path, a picture, an array, a Box or a Polygon, not {type(mask).__name__}")
    if mask.ndim != 2:
        raise ValueError(f"{name} has shape {mask.shape}, one channel (height, width) is needed: take one of them")
    if mask.shape != size:
        raise ValueError(f"{name} is {mask.shape[0]} x {mask.shape[1]}, its picture {size[0]} x {size[1]} pixels")
    if mask.dtype == np.bool_:
        return mask * np.uint8(255)
    if mask.dtype == np.uint8:
        return mask
    if not np.issubdtype(mask.dtype, np.floating) or not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"{name} must be bool, uint8 or floats in [0, 1], not {mask.dtype} up to {mask.max()}")
    return np.rint(mask * 255).astype(np.uint8)


def merge_masks(masks: Sequence[UInt8[np.ndarray, "H W"]]) -> UInt8[np.ndarray, "H W"]:
    """The sum of one or more masks of one size, saturating at 255."""
    return np.minimum(np.sum([mask.astype(np.int64) for mask in masks], 0), 255).astype(np.uint8)


def grow_mask(mask: UInt8[np.ndarray, "H W"], pixels: int) -> UInt8[np.ndarray, "H W"]:
    """Dilated by a square of `pixels`; eroded where pixels < 0; the same mask at 0."""
    side = abs(pixels)
    if side == 0:
        return mask
    sign = 1 if pixels > 0 else -1
    before, after = side // 2, side - 1 - side // 2
    x = sign * torch.from_numpy(mask.astype(np.float32))[None, None]
    x = F.pad(x, (before, after, before, after), value=-torch.inf)
    x = F.max_pool2d(F.max_pool2d(x, (1, side), 1), (side, 1), 1)
    return (sign * x[0, 0]).numpy().astype(np.uint8)


def resize_mask(mask: UInt8[np.ndarray, "H W"], size: Size) -> UInt8[np.ndarray, "h w"]:
    """Bilinear, to another number of pixels."""
    if mask.shape == size:
        return mask
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def reduce_mask(mask: UInt8[np.ndarray, "H W"], size: Size) -> UInt8[np.ndarray, "h w"]:
    """Nearest: cell i takes pixel floor(i H / h)."""
    rows, columns = (np.arange(cells) * side // cells for side, cells in zip(mask.shape, size, strict=True))
    return mask[rows][:, columns]


def latent_mask(mask: UInt8[np.ndarray, "H W"], size: Size, grow: int = 0) -> Float[Tensor, "1 1 h w"]:
    """Grown by `grow` pixels, reduced to `size` latent cells and scaled to [0, 1]."""
    return torch.from_numpy(reduce_mask(grow_mask(mask, grow), size).astype(np.float32) / 255)[None, None]


def binarised(mask: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """1 where the mask is above 0."""
    return (mask > 0).to(mask.dtype)

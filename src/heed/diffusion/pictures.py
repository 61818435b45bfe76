"""Pictures of image editors: reading them, and the exact geometry that moves their pixels (uint8, no filter by itself).

    zoom out: the picture, area-resized to (H s_h, W s_w), pasted in the middle of itself
    pan:      out[y, x] = in[y - K_v, x - K_h]; what comes from outside keeps its old pixel
    resize:   an object about its centroid c: pixel p of the resized picture goes to c - (c s - p)
    flip:     an object about its centroid: moved to the middle, mirrored, moved back

Each also returns the mask of what it left open or moved. The arithmetic (truncations, area weights) is that of
"DesignEdit", AAAI 2025, arXiv 2403.14487, whose code calls OpenCV.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from heed.diffusion.masks import Size

Picture = str | Path | Image.Image | np.ndarray  # a path, a PIL picture, or an array (H, W, 3) of uint8
Flip = Literal["left-right", "up-down", "both"]
FLIPS: tuple[Flip, ...] = ("left-right", "up-down", "both")


def read_picture(picture: Picture, name: str = "image") -> UInt8[np.ndarray, "H W 3"]:
    """The picture as (H, W, 3) uint8; a file is turned upright as its EXIF says, grey ones become RGB.

    Raises:
        ValueError: an array that is not (H, W, 3) uint8, or a picture with transparency.
        FileNotFoundError: no such file.
    """
    if isinstance(picture, str | Path):
        if not Path(picture).is_file():
            raise FileNotFoundError(f"{name}: no file at {picture}")
        with Image.open(picture) as file:
            picture = ImageOps.exif_transpose(file)
    if isinstance(picture, Image.Image):
        if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError(f"{name} has transparent pixels; put it on a background first")
        return np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise TypeError(f"{name} must be a path, a PIL picture or an array, not {type(picture).__name__}")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"{name} must be (height, width, 3) uint8, not {picture.shape} {picture.dtype}")
    return picture


def resize_picture(picture: UInt8[np.ndarray, "H W 3"], size: Size) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear, to another number of pixels."""
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def area_resize(
    picture: UInt8[np.ndarray, "H W ..."], size: Size, steps: tuple[float, float] | None = None
) -> UInt8[np.ndarray, "h w ..."]:
    """Each new pixel averages the area it covers; where an axis grows, OpenCV's linear rule for area resizing.

    Args:
        picture: (H, W) or (H, W, C).
        size: the new height and width.
        steps: old pixels per new one, along rows and columns; None for H / h and W / w.
    """
    steps = steps or (picture.shape[0] / size[0], picture.shape[1] / size[1])
    rule = _cover if min(steps) >= 1 else _blend
    rows, columns = (rule(*axis) for axis in zip(picture.shape, size, steps, strict=False))
    resized = np.einsum("ij,jk...,lk->il...", rows, picture.astype(np.float64), columns, optimize=True)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def _cover(old: int, new: int, step: float) -> np.ndarray:
    """(new, old) share of each old pixel in each new one."""
    start, pixel = np.arange(new)[:, None] * step, np.arange(old)[None]
    overlap = (np.minimum(start + step, pixel + 1) - np.maximum(start, pixel)).clip(0)
    return overlap / overlap.sum(1, keepdims=True)


def _blend(old: int, new: int, step: float) -> np.ndarray:
    """(new, old) weights of two neighbours: a new pixel inside one old pixel copies it, one across a border mixes."""
    at = np.arange(new)
    first = np.floor(at * step).astype(int)
    share = (at + 1) - (first + 1) / step
    share = np.where(share <= 0, 0, share - np.floor(share))
    weights = np.zeros((new, old))
    np.add.at(weights, (at, first.clip(0, old - 1)), 1 - share)
    np.add.at(weights, (at, (first + 1).clip(0, old - 1)), share)
    return weights


def centroid(mask: UInt8[np.ndarray, "H W"]) -> tuple[int, int]:
    """(x, y) of the mask's centre of mass, truncated.

    Raises:
        ValueError: a mask without foreground.
    """
    mass = mask.astype(np.float64)
    total = mass.sum()
    if total == 0:
        raise ValueError("the mask has no foreground, so it has no centre; draw something into it")
    return int(mass.sum(0) @ np.arange(mask.shape[1]) / total), int(mass.sum(1) @ np.arange(mask.shape[0]) / total)


def zoom_out(
    picture: UInt8[np.ndarray, "H W 3"], height_scale: float, width_scale: float
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
    """The picture small in the middle of itself, and 255 around it.

    Raises:
        ValueError: a scale outside (0, 1], or one that leaves no pixel.
    """
    height, width = picture.shape[:2]
    new = int(height * height_scale), int(width * width_scale)
    if not (0 < height_scale <= 1 and 0 < width_scale <= 1 and min(new) > 0):
        raise ValueError(f"zoom_out by ({height_scale}, {width_scale}): both scales must lie in (0, 1]")
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    canvas, mask = picture.copy(), np.full((height, width), 255, np.uint8)
    inside = slice(top, top + new[0]), slice(left, left + new[1])
    canvas[inside], mask[inside] = area_resize(picture, new), 0
    return canvas, mask


def pan(
    picture: UInt8[np.ndarray, "H W 3"], dx: float, dy: float
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
    """The contents moved right by dx of the width and up by dy of the height, and 255 where they left.

    Raises:
        ValueError: |dx| or |dy| >= 1.
    """
    check_fractions("pan", dx, dy)
    canvas, mask = picture.copy(), np.zeros(picture.shape[:2], np.uint8)
    for axis, fraction in ((1, dx), (0, -dy)):
        cells = int(abs(fraction) * picture.shape[axis])
        if not cells:
            continue
        ahead, behind = slice(cells, None), slice(None, -cells)
        new, old, open_ = (ahead, behind, slice(None, cells)) if fraction > 0 else (behind, ahead, slice(-cells, None))
        at = (slice(None),) * axis
        moved = canvas.copy()
        moved[(*at, new)] = canvas[(*at, old)]
        canvas = moved
        mask[(*at, open_)] = 255
    return canvas, mask


def resize_object(
    picture: UInt8[np.ndarray, "H W 3"], mask: UInt8[np.ndarray, "H W"], scale: float
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
    """Picture and mask scaled about the mask's centroid; around the picture the old pixels, around the mask 0.

    Raises:
        ValueError: scale <= 0, one that leaves no pixel, or a mask without foreground.
    """
    if scale == 1:
        return picture, mask
    if not 0 < scale < np.inf:
        raise ValueError(f"scale={scale} must be above 0 and finite")
    size = round(mask.shape[0] * scale), round(mask.shape[1] * scale)
    if min(size) < 1:
        raise ValueError(f"scale={scale} leaves no pixel of {mask.shape[0]} x {mask.shape[1]}; use a larger one")
    places = []
    for side, new, centre in zip(mask.shape, size, reversed(centroid(mask)), strict=True):
        at = centre - (centre * scale - np.arange(new))
        stays = (at >= 0) & (at < side)
        places.append((at[stays].astype(int), np.flatnonzero(stays)))
    (rows, from_rows), (columns, from_columns) = places
    canvas, moved = picture.copy(), np.zeros_like(mask)
    steps = 1 / scale, 1 / scale
    canvas[np.ix_(rows, columns)] = area_resize(picture, size, steps)[np.ix_(from_rows, from_columns)]
    moved[np.ix_(rows, columns)] = area_resize(mask, size, steps)[np.ix_(from_rows, from_columns)]
    return canvas, moved


def flip_object(
    picture: UInt8[np.ndarray, "H W 3"], mask: UInt8[np.ndarray, "H W"], flip: Flip
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
    """Picture and mask mirrored about the mask's centroid; what comes from outside is 0.

    Raises:
        ValueError: an unknown flip, or a mask without foreground.
    """
    if flip not in FLIPS:
        raise ValueError(f"flip={flip!r} must be one of {', '.join(FLIPS)}")
    x, y = centroid(mask)
    down, right = mask.shape[0] // 2 - y, mask.shape[1] // 2 - x
    axes = {"left-right": (1,), "up-down": (0,), "both": (0, 1)}[flip]

    def turned(array: np.ndarray) -> np.ndarray:
        return _translated(np.flip(_translated(array, down, right), axes), -down, -right)

    return turned(picture), turned(mask)


def _translated(array: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved by whole pixels, 0 where nothing comes from."""
    out = np.zeros_like(array)
    new, old = [], []
    for side, by in zip(array.shape, (down, right), strict=False):
        new.append(slice(max(by, 0), side + min(by, 0)))
        old.append(slice(max(-by, 0), side - max(by, 0)))
    out[tuple(new)] = array[tuple(old)]
    return out


def check_fractions(name: str, dx: float, dy: float) -> None:
    """ValueError unless both are fractions of the picture inside (-1, 1)."""
    if not (abs(dx) < 1 and abs(dy) < 1):
        raise ValueError(f"{name}: dx={dx}, dy={dy} are fractions of the width and height and must lie in (-1, 1)")

"""Decoding many pictures of any size into one array."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heed.data.raw import Notes, Split
from heed.errors import MissingExtra

# Pillow's modes for one channel: bits, bytes, and the wider numbers of 16-bit and floating-point TIFF.
_GREY = {"1", "L", "I", "I;16", "I;16B", "I;16L", "F"}
_WIDE = {"I", "I;16", "I;16B", "I;16L", "F"}


@dataclass(frozen=True)
class Picture:
    """A picture not read yet.

    Args:
        name: what messages call it, usually its path.
        label: index of its class.
        open: gives a PIL image; may raise OSError or ValueError.
    """

    name: str
    label: int
    open: Callable[[], Any]


@dataclass(frozen=True)
class Form:
    """The form all pictures of a data set are brought into: side in pixels and PIL mode ("L", "F" or "RGB")."""

    side: int
    mode: str


def common_form(
    pictures: Sequence[Picture], choose_side: Callable[[float], int], notes: Notes
) -> tuple[Form, list[Picture]]:
    """Look at the headers of all pictures: the form that suits them, and those that can be opened.

    Args:
        pictures: all splits together.
        choose_side: side in pixels to use, from the median of the pictures' shorter sides.
        notes: told of the pictures that cannot be opened.

    Raises:
        ValueError: none can be opened.
        MissingExtra: Pillow is not installed.
    """
    sizes, modes, readable = [], set(), []
    for picture in pictures:
        try:
            with _guarded(picture) as image:
                sizes.append(image.size)
                modes.add(image.mode)
        except (OSError, ValueError, SyntaxError) as error:
            notes.leave_out(picture.name, error)
        else:
            readable.append(picture)
    if not readable:
        raise ValueError(f"none of the {len(pictures)} images can be read; the first is {pictures[0].name}")
    side = choose_side(statistics.median(min(size) for size in sizes))
    grey = "F" if modes & _WIDE else "L"
    mode = grey if modes <= _GREY else "RGB"
    if set(sizes) != {(side, side)}:
        low, high = min(sizes), max(sizes)
        found = f"{low[0]} x {low[1]}" if low == high else f"{low[0]} x {low[1]} to {high[0]} x {high[1]}"
        notes.add(f"images of {found} pixels were resized to {side} x {side}")
    return Form(side, mode), readable


def read_pictures(pictures: Sequence[Picture], form: Form, notes: Notes) -> Split:
    """Decode pictures into a `Split`; those that turn out to be corrupt are left out."""
    images, kept = [], []
    for picture in pictures:
        try:
            with _guarded(picture) as image:
                images.append(np.asarray(image.convert(form.mode).resize((form.side, form.side))))
        except (OSError, ValueError, SyntaxError) as error:
            notes.leave_out(picture.name, error)
        else:
            kept.append(picture)
    channels = (3,) if form.mode == "RGB" else ()
    stacked = np.stack(images) if images else np.empty((0, form.side, form.side, *channels), np.uint8)
    return Split(stacked, np.array([p.label for p in kept], dtype=np.int64), [p.name for p in kept])


def _guarded(picture: Picture) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "compare") from error
    try:
        return picture.open()
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error

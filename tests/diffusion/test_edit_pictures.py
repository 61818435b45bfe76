"""Masks and the geometry of pictures, against what they are by definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from heed.diffusion import masks, pictures
from heed.diffusion.masks import Box, Polygon

quick = settings(max_examples=20, deadline=None)
PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
MASK = np.zeros((30, 40), np.uint8)
MASK[8:15, 10:22] = 255


@quick
@given(st.integers(-6, 6), st.integers(0, 2**32 - 1))
def test_growing_is_a_maximum_over_a_square(pixels: int, seed: int) -> None:
    mask = np.random.default_rng(seed).choice(np.uint8([0, 0, 0, 90, 255]), (9, 11))
    side, pick = abs(pixels), np.max if pixels > 0 else np.min
    want = mask.copy()
    if pixels:
        for y, x in np.ndindex(mask.shape):
            top, left = y - side // 2, x - side // 2
            want[y, x] = pick(mask[max(top, 0) : top + side, max(left, 0) : left + side])
    np.testing.assert_array_equal(masks.grow_mask(mask, pixels), want)


@quick
@given(st.integers(1, 30), st.integers(1, 40))
def test_reduction_takes_the_nearest_pixel(rows: int, columns: int) -> None:
    got = masks.reduce_mask(MASK, (rows, columns))
    for i, j in np.ndindex(rows, columns):
        assert got[i, j] == MASK[int(i * 30 / rows + 1e-9), int(j * 40 / columns + 1e-9)]


def test_merging_saturates() -> None:
    merged = masks.merge_masks([np.full((2, 2), 200, np.uint8), np.full((2, 2), 100, np.uint8)])
    assert (merged == 255).all()


def test_every_form_of_a_mask(tmp_path: Path) -> None:
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    corners = ((10, 8), (21, 8), (21, 14), (10, 14))
    forms: list[Any] = [MASK, MASK > 0, MASK / 255, Image.fromarray(MASK), tmp_path / "mask.png", Box(10, 8, 22, 15)]
    for form in [*forms, Polygon(corners), str(tmp_path / "mask.png")]:
        np.testing.assert_array_equal(masks.read_mask(form, (30, 40)), MASK)


def test_masks_from_the_command_line() -> None:
    assert masks.parse_mask("box:1,2,3,4") == Box(1, 2, 3, 4)
    assert masks.parse_mask("polygon:1,2 3,4 5,0") == Polygon(((1, 2), (3, 4), (5, 0)))
    assert masks.parse_mask("folder/mask.png") == Path("folder/mask.png")
    for text in ("box:1,2,3", "polygon:1,x 2,3 4,5", "box:a,b,c,d"):
        with pytest.raises(ValueError, match="is no mask; write box:"):
            masks.parse_mask(text)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((30, 40, 3), np.uint8), r"shape \(30, 40, 3\), one channel"),
        (Image.new("RGB", (40, 30)), "channels RGB, one is needed"),
        (np.zeros((40, 30), np.uint8), "40 x 30, its picture 30 x 40"),
        (np.full((30, 40), 2.0), "floats in"),
        (np.full((30, 40), np.nan), "floats in"),
        (np.zeros((30, 40), np.int64), "must be bool, uint8"),
    ],
)
def test_bad_masks(mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        masks.read_mask(mask, (30, 40))


def test_bad_shapes_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        Box(3, 0, 3, 5)
    with pytest.raises(ValueError, match="three or more corners"):
        Polygon(((0, 0), (1, 1)))
    for read in (lambda path: masks.read_mask(path, (1, 1)), pictures.read_picture):
        with pytest.raises(FileNotFoundError, match="no file at"):
            read(tmp_path / "nowhere.png")
    with pytest.raises(TypeError, match="not list"):
        masks.read_mask([[1]], (1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not list"):
        pictures.read_picture([[1]])  # type: ignore[arg-type]
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="must be .height, width, 3. uint8"):
            pictures.read_picture(array)


def test_pictures_are_read_upright_and_in_colour(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "a.png"), PICTURE)
    assert pictures.read_picture(Image.new("L", (5, 4), 9)).shape == (4, 5, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    Image.fromarray(PICTURE).save(tmp_path / "b.png", exif=turned)
    assert pictures.read_picture(tmp_path / "b.png").shape == (40, 30, 3)
    with pytest.raises(ValueError, match="transparent"):
        pictures.read_picture(Image.new("RGBA", (5, 4), (1, 2, 3, 99)))


@quick
@given(st.floats(-0.99, 0.99), st.floats(-0.99, 0.99))
def test_panning_moves_pixels_and_marks_what_they_leave(dx: float, dy: float) -> None:
    moved, left = pictures.pan(PICTURE, dx, dy)
    right, up = int(dx * 40), int(dy * 30)
    for y, x in np.ndindex(30, 40):
        from_y, from_x = y + up, x - right
        came = 0 <= from_y < 30 and 0 <= from_x < 40
        assert left[y, x] == (0 if came else 255)
        if came:
            assert (moved[y, x] == PICTURE[from_y, from_x]).all()


def test_zooming_out() -> None:
    small, around = pictures.zoom_out(PICTURE, 0.5, 0.75)
    assert (around == 0).sum() == 15 * 30
    np.testing.assert_array_equal(small[around > 0], PICTURE[around > 0])
    same, nothing = pictures.zoom_out(PICTURE, 1, 1)
    np.testing.assert_array_equal(same, PICTURE)
    assert not nothing.any()


def test_area_resizing_keeps_the_mean() -> None:
    small = pictures.area_resize(PICTURE, (11, 13))
    assert abs(small.mean() - PICTURE.mean()) < 0.5
    halved = pictures.area_resize(PICTURE, (15, 20))
    want = PICTURE.reshape(15, 2, 20, 2, 3).mean((1, 3))
    assert abs(halved - want).max() <= 0.5


@quick
@given(st.floats(0.3, 2.5))
def test_resizing_keeps_the_centre_and_scales_the_area(scale: float) -> None:
    _, mask = pictures.resize_object(PICTURE, MASK, scale)
    x, y = pictures.centroid(mask)
    assert abs(x - 15) <= 2
    assert abs(y - 11) <= 2
    if scale < 1.4:  # larger ones leave the picture
        assert (mask > 127).sum() == pytest.approx(84 * scale**2, rel=0.35)


@pytest.mark.parametrize("flip", pictures.FLIPS)
def test_flipping_keeps_the_place(flip: pictures.Flip) -> None:
    image, mask = pictures.flip_object(PICTURE, MASK, flip)
    assert (mask > 0).sum() == (MASK > 0).sum()
    x, y = pictures.centroid(mask)  # truncated before and after, and the middle of an even side lies between pixels
    assert abs(x - 15) <= 2
    assert abs(y - 11) <= 2
    axes = {"left-right": 1, "up-down": 0, "both": (0, 1)}[flip]
    np.testing.assert_array_equal(image[mask > 0].reshape(7, 12, 3), np.flip(PICTURE[8:15, 10:22], axes))


def test_bad_geometry() -> None:
    for dx, dy in ((1, 0), (0, -1.5), (float("nan"), 0)):
        with pytest.raises(ValueError, match="fractions of the width and height"):
            pictures.pan(PICTURE, dx, dy)
    for scales in ((0, 0.5), (0.5, 1.1), (0.001, 0.5)):
        with pytest.raises(ValueError, match="both scales must lie in"):
            pictures.zoom_out(PICTURE, *scales)
    for scale in (0, -1, float("nan"), 0.001):
        with pytest.raises(ValueError, match="scale="):
            pictures.resize_object(PICTURE, MASK, scale)
    with pytest.raises(ValueError, match="no foreground"):
        pictures.flip_object(PICTURE, np.zeros_like(MASK), "both")
    with pytest.raises(ValueError, match="flip='sideways'"):
        pictures.flip_object(PICTURE, MASK, "sideways")  # type: ignore[arg-type]

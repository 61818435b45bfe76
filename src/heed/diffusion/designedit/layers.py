"""From a plan to what the denoising needs: the pictures to invert, the masks at latent resolution, the shifts.

Pictures and masks are brought to one size in pixels first; all geometry but the shift happens there, in the order
resize, flip, grow the mask. The shift happens in the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from heed.catalogue import provides
from heed.diffusion import pictures
from heed.diffusion.designedit.plan import Background, EditPlan, Layer
from heed.diffusion.designedit.settings import DesignEditSettings
from heed.diffusion.masks import Mask, Size, binarised, latent_mask, merge_masks, read_mask, resize_mask


@provides("01-designedit")
@dataclass(frozen=True, eq=False)
class Decomposition:
    """What a plan comes to at one size.

    Args:
        pictures: (H, W, 3) uint8 to invert: the background's, then one per layer.
        remove: (1, 1, h, w) of 0 and 1, what the background row may change.
        refine: the same for the refine mask, or None.
        layers: (1, 1, h, w) masks in [0, 1] before their shift.
        shifts: (dx, dy) of each layer.
        original_size: height and width of the background as it was given.
    """

    pictures: tuple[UInt8[np.ndarray, "H W 3"], ...]
    remove: Float[Tensor, "1 1 h w"]
    refine: Float[Tensor, "1 1 h w"] | None
    layers: tuple[Float[Tensor, "1 1 h w"], ...]
    shifts: tuple[tuple[float, float], ...]
    original_size: Size

    @property
    def reference(self) -> tuple[int, ...]:
        """Which picture each row starts from: source, background and canvas from the first, layer j from 1 + j."""
        return (0, 0, 0, *range(1, len(self.pictures))) if self.layers else (0, 0)

    @property
    def output_row(self) -> int:
        """The row that becomes the result: the canvas, or the background where there is none."""
        return 2 if self.layers else 1


@provides("01-designedit")
def decompose(
    plan: EditPlan, size: Size, latent_size: Size, settings: DesignEditSettings | None = None
) -> Decomposition:
    """Pictures, masks and shifts of a plan.

    Args:
        plan: the instruction.
        size: height and width in pixels that everything is brought to.
        latent_size: height and width of the latents.
        settings: how far masks grow.

    Raises:
        ValueError: a plan without anything to do, a mask that does not fit its picture, a layer without foreground; it
            names the layer.
    """
    settings = settings or DesignEditSettings()

    def cells(mask: np.ndarray, pixels: int) -> Tensor:
        return latent_mask(mask, latent_size, round(pixels * max(size) / 1024))

    whole = pictures.read_picture(plan.background.image, "background")
    picture, remove, grow = _background(plan.background, whole, size, settings)
    if not plan.layers and not (plan.background.remove_masks or plan.background.zoom or plan.background.pan):
        raise ValueError("the plan changes nothing: give a remove_mask, zoom, pan or a layer")
    refine = plan.background.refine_mask
    lifted = [_layer(i, layer, whole, size) for i, layer in enumerate(plan.layers)]
    return Decomposition(
        pictures=(picture, *(image for image, _ in lifted)),
        remove=binarised(cells(remove, grow)),
        refine=None
        if refine is None
        else binarised(cells(_fit(refine, whole, size, "refine_mask"), settings.grow_layer)),
        layers=tuple(cells(mask, settings.grow_layer) for _, mask in lifted),
        shifts=tuple((layer.dx, layer.dy) for layer in plan.layers),
        original_size=(whole.shape[0], whole.shape[1]),
    )


def _fit(mask: Mask, picture: np.ndarray, size: Size, name: str) -> np.ndarray:
    return resize_mask(read_mask(mask, (picture.shape[0], picture.shape[1]), name), size)


def _background(
    background: Background, whole: np.ndarray, size: Size, settings: DesignEditSettings
) -> tuple[np.ndarray, np.ndarray, int]:
    """The background's picture, what it has to make up, and by how many pixels that grows."""
    picture = pictures.resize_picture(whole, size)
    if background.zoom is not None:
        return *pictures.zoom_out(picture, *background.zoom), settings.grow_open
    if background.pan is not None:
        return *pictures.pan(picture, *background.pan), settings.grow_open
    masks = [_fit(mask, whole, size, "remove_mask") for mask in background.remove_masks]
    return picture, merge_masks(masks or [np.zeros(size, np.uint8)]), settings.grow_remove


def _layer(i: int, layer: Layer, whole: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Picture and mask of a layer, resized and flipped."""
    name = f"layer {i}"
    own = whole if layer.image is None else pictures.read_picture(layer.image, name)
    mask = _fit(layer.mask, own, size, f"mask of {name}")
    picture = pictures.resize_picture(own, size)
    if not mask.any():
        raise ValueError(f"the mask of {name} has no foreground; draw its object into it")
    try:
        picture, mask = pictures.resize_object(picture, mask, layer.scale)
        if layer.flip is not None:
            picture, mask = pictures.flip_object(picture, mask, layer.flip)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return picture, mask

"""The editing operations as plans: each puts together a background and layers, and none touches a model.

remove     background repaired under the masks          copy       a layer, the background as it is
move       removed, and pasted elsewhere                swap       two removed, each pasted at the other's centroid
zoom, pan  background repaired around or beside it      compose    layers of any pictures, the lowest first
"""

from __future__ import annotations

from collections.abc import Sequence

from heed.diffusion.designedit.plan import Background, EditPlan, Layer
from heed.diffusion.masks import Mask, read_mask
from heed.diffusion.pictures import Flip, Picture, centroid, read_picture


def remove(image: Picture, masks: Sequence[Mask], refine_mask: Mask | None = None) -> EditPlan:
    return EditPlan(Background(image, tuple(masks), refine_mask))


def move(
    image: Picture,
    mask: Mask,
    dx: float = 0.0,
    dy: float = 0.0,
    scale: float = 1.0,
    flip: Flip | None = None,
    refine_mask: Mask | None = None,
) -> EditPlan:
    return EditPlan(Background(image, mask, refine_mask), (Layer(mask, None, dx, dy, scale, flip),))


def copy(
    image: Picture, mask: Mask, dx: float = 0.0, dy: float = 0.0, scale: float = 1.0, flip: Flip | None = None
) -> EditPlan:
    return EditPlan(Background(image), (Layer(mask, None, dx, dy, scale, flip),))


def swap(image: Picture, first: Mask, second: Mask) -> EditPlan:
    picture = read_picture(image)
    height, width = picture.shape[:2]
    places = []
    for name, mask in (("first", first), ("second", second)):
        try:
            places.append(centroid(read_mask(mask, (height, width), f"{name} mask")))
        except ValueError as error:
            raise ValueError(f"swap, {name} object: {error}") from error
    (x1, y1), (x2, y2) = places
    dx, dy = (x2 - x1) / width, (y1 - y2) / height
    layers = Layer(first, None, dx, dy), Layer(second, None, -dx, -dy)
    return EditPlan(Background(picture, (first, second)), layers)


def zoom_out(image: Picture, height_scale: float, width_scale: float | None = None) -> EditPlan:
    return EditPlan(Background(image, zoom=(height_scale, height_scale if width_scale is None else width_scale)))


def pan(image: Picture, dx: float = 0.0, dy: float = 0.0) -> EditPlan:
    return EditPlan(Background(image, pan=(dx, dy)))


def requested(
    image: Picture,
    masks: Sequence[Mask] = (),
    *,
    remove_it: bool = False,
    move_by: tuple[float, float] | None = None,
    copy_by: tuple[float, float] | None = None,
    swap_them: bool = False,
    resize: float | None = None,
    mirror: Flip | None = None,
    zoom: tuple[float, float] | None = None,
    pan_by: tuple[float, float] | None = None,
    refine_mask: Mask | None = None,
) -> EditPlan:
    """The plan of one operation asked for by flags, as a command line or a form gives them.

    Args:
        image: the picture.
        masks: one per object.
        remove_it, move_by, copy_by, swap_them, zoom, pan_by: the operation, exactly one of them.
        resize, mirror: join a move or a copy; alone they are a move that stays in its place.
        refine_mask: of a removal or a move.

    Raises:
        ValueError: no operation or several, or a number of masks that does not fit it.
    """
    if (resize is not None or mirror is not None) and move_by is None and copy_by is None:
        move_by = (0.0, 0.0)
    asked = {
        "remove": remove_it,
        "move, resize or flip": move_by is not None,
        "copy": copy_by is not None,
        "swap": swap_them,
        "zoom-out": zoom is not None,
        "pan": pan_by is not None,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    if len(names) != 1:
        raise ValueError(f"{' and '.join(names) or 'nothing'} asked for; choose one of {', '.join(asked)}")
    needed = {"remove": range(1, 1000), "swap": range(2, 3), "zoom-out": range(1), "pan": range(1)}.get(
        names[0], range(1, 2)
    )
    if len(masks) not in needed:
        wanted = "one mask or more" if names[0] == "remove" else f"{needed.start} masks"
        raise ValueError(f"{names[0]} takes {wanted}, {len(masks)} given")
    scale = 1.0 if resize is None else resize
    if zoom is not None:
        return zoom_out(image, *zoom)
    if pan_by is not None:
        return pan(image, *pan_by)
    if remove_it:
        return remove(image, masks, refine_mask)
    if swap_them:
        return swap(image, *masks)
    if copy_by is not None:
        return copy(image, masks[0], *copy_by, scale, mirror)
    return move(image, masks[0], *(move_by or (0.0, 0.0)), scale, mirror, refine_mask)

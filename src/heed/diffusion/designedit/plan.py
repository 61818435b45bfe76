"""The instruction: what becomes of the background, and which layers are pasted on it, the lowest first.

    {"background": {"image": "cat.png", "remove_mask": ["cat_mask.png"], "refine_mask": null, "zoom": null, "pan": null},
     "layers": [{"image": null, "mask": {"box": [10, 20, 110, 90]}, "dx": 0.2, "dy": 0, "scale": 1, "flip": null}]}

A person writes it, or a language model. zoom and pan are heed's additions to the authors' format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from heed.catalogue import provides
from heed.diffusion.masks import Box, Mask, Polygon
from heed.diffusion.pictures import FLIPS, Flip, Picture, check_fractions
from heed.errors import unknown


@provides("01-designedit")
@dataclass(frozen=True, eq=False)
class Layer:
    """An object lifted from a picture and pasted on the canvas.

    Args:
        mask: the object, see `heed.diffusion.masks.Mask`; of its picture's size.
        image: the picture it comes from; None for the background's.
        dx: fraction of the width it moves right (left where negative).
        dy: fraction of the height it moves up (down where negative).
        scale: factor of its size, about its centroid.
        flip: "left-right", "up-down", "both" or None, about its centroid.

    Raises:
        ValueError: |dx| or |dy| >= 1, scale <= 0, or an unknown flip.
    """

    mask: Mask
    image: Picture | None = None
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    flip: Flip | None = None

    def __post_init__(self) -> None:
        check_fractions("move", self.dx, self.dy)
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} must be above 0 and finite")
        if self.flip is not None and self.flip not in FLIPS:
            raise ValueError(f"flip={self.flip!r} must be one of {', '.join(FLIPS)}, or None")


@provides("01-designedit")
@dataclass(frozen=True, eq=False)
class Background:
    """The picture that is edited, and where it is repaired.

    Args:
        image: the picture.
        remove_mask: one mask or several, added up: what is removed from it.
        refine_mask: joined to the remove mask in early steps and for the key masking only; suppresses artifacts.
        zoom: (height scale, width scale) in (0, 1]: the picture becomes that small and its surroundings are made up.
        pan: (dx, dy) fractions the contents move right and up; what they leave is made up.

    Raises:
        ValueError: zoom or pan outside their ranges, or more than one of remove_mask, zoom and pan.
    """

    image: Picture
    remove_mask: Mask | tuple[Mask, ...] | None = None
    refine_mask: Mask | None = None
    zoom: tuple[float, float] | None = None
    pan: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.remove_mask, self.zoom, self.pan)) > 1:
            raise ValueError("a background takes one of remove_mask, zoom and pan; run one edit after the other")
        if self.zoom is not None and not all(0 < scale <= 1 for scale in self.zoom):
            raise ValueError(f"zoom={self.zoom}: both scales must lie in (0, 1]")
        if self.pan is not None:
            check_fractions("pan", *self.pan)

    @property
    def remove_masks(self) -> tuple[Mask, ...]:
        if self.remove_mask is None:
            return ()
        return tuple(self.remove_mask) if isinstance(self.remove_mask, tuple | list) else (self.remove_mask,)


@provides("01-designedit")
@dataclass(frozen=True, eq=False)
class EditPlan:
    """One background and any number of layers; their order is the order of occlusion, the last on top.

    Args:
        background: the picture that is edited.
        layers: none for removal, zoom and pan.
    """

    background: Background
    layers: tuple[Layer, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> EditPlan:
        """Read a plan from a JSON file; paths in it are relative to its folder.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no JSON, or what `from_dict` refuses.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no plan at {path}")
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        return cls.from_dict(content, path.parent)

    @classmethod
    def from_dict(cls, content: dict[str, Any], folder: Path = Path()) -> EditPlan:
        """A plan from plain data. Masks are paths, {"box": [left, top, right, bottom]} or {"polygon": [[x, y], ...]}.

        Raises:
            ValueError: a missing or an unknown entry, or values out of range; names the layer.
        """
        given = _entries("plan", content, ("background", "layers"), ("background",))
        background = _entries("background", given["background"], _names(Background), ("image",))
        background["image"] = folder / background["image"]
        for name in ("remove_mask", "refine_mask"):
            background[name] = _masks(name, background.get(name), folder)
        for name in ("zoom", "pan"):
            if background.get(name) is not None:
                background[name] = _pair(name, background[name])
        layers = []
        for i, entry in enumerate(given.get("layers") or ()):
            layer = _entries(f"layer {i}", entry, _names(Layer), ("mask",))
            layer["image"] = None if layer.get("image") is None else folder / layer["image"]
            layer["mask"] = _masks(f"mask of layer {i}", layer["mask"], folder)
            try:
                layers.append(Layer(**layer))
            except (ValueError, TypeError) as error:
                raise ValueError(f"layer {i}: {error}") from error
        return cls(Background(**background), tuple(layers))


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _entries(name: str, content: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be an object with {', '.join(known)}, not {content!r}")
    for key in content:
        if key not in known:
            raise ValueError(unknown(f"entry of {name}", key, known))
    missing = [key for key in needed if content.get(key) is None]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    return dict(content)


def _masks(name: str, value: Any, folder: Path) -> Any:
    if value is None or isinstance(value, str):
        return None if value is None else folder / value
    if isinstance(value, list):
        return tuple(_masks(name, entry, folder) for entry in value)
    if isinstance(value, dict) and set(value) == {"box"}:
        left, top, right, bottom = value["box"]
        return Box(left, top, right, bottom)
    if isinstance(value, dict) and set(value) == {"polygon"}:
        return Polygon(tuple((x, y) for x, y in value["polygon"]))
    raise ValueError(f'{name} must be a path, {{"box": [...]}} or {{"polygon": [...]}}, not {value!r}')


def _pair(name: str, value: Any) -> tuple[float, float]:
    try:
        first, second = map(float, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be two numbers, not {value!r}") from error
    return first, second

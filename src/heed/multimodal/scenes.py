"""Drawn scenes of coloured shapes, with questions and descriptions: data for a vision-language model, made on the spot.

A scene holds two or three shapes in the cells of a 2 x 2 grid, moved and scaled at random, on an uneven ground. Half
of the questions ("Is there a red circle in the image?") are about a shape that is there. Half of the others name a
colour and a form that both occur in the scene, on different shapes, where it has such a pair: answering needs to bind
the two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from heed.errors import MissingExtra

SIDE = 48  # pixels
CELLS = 2  # along an axis
COLOURS = {"red": (214, 55, 46), "green": (46, 150, 76), "blue": (44, 94, 190), "yellow": (236, 190, 40)}
FORMS = ("circle", "square", "triangle")
OBJECTS = tuple(f"{colour} {form}" for colour in COLOURS for form in FORMS)
DESCRIBE = "Describe the image."
_FINER = 4  # drawn so many times larger, then averaged
Ground = Callable[[np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Args:
        name: colour and form, "red circle".
        cell: row and column in the grid.
        centre: x and y in pixels.
        radius: in pixels.
    """

    name: str
    cell: tuple[int, int]
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what it shows.

    Args:
        image: a PIL image, `SIDE` x `SIDE`.
        shapes: in reading order, no two with one name.
    """

    image: Any
    shapes: tuple[Shape, ...]

    @property
    def names(self) -> list[str]:
        return [shape.name for shape in self.shapes]

    def place(self, name: str) -> str:
        """ "top left", of a shape that is there."""
        row, column = next(shape.cell for shape in self.shapes if shape.name == name)
        return f"{('top', 'bottom')[row]} {('left', 'right')[column]}"

    def description(self) -> str:
        """ "a red circle and a blue square." in reading order."""
        return " and ".join(f"a {name}" for name in self.names) + "."


def question(name: str) -> str:
    """The question whether something is in the image."""
    return f"Is there a {name} in the image?"


def where(name: str) -> str:
    """The question where something is, in a like form."""
    return f"Where is the {name} in the image?"


def draw_scene(random: np.random.Generator, ground: Ground | None = None) -> Scene:
    """A random scene.

    Args:
        random: draws.
        ground: gives what is behind the shapes, (SIDE, SIDE, 3) from 0 to 255; None for a pale colour.
    """
    count = int(random.integers(2, 4))
    cells = sorted(random.permutation(CELLS**2)[:count].tolist())
    names = [OBJECTS[i] for i in random.permutation(len(OBJECTS))[:count]]
    side = SIDE / CELLS
    shapes = []
    for cell, name in zip(cells, names, strict=True):
        row, column = divmod(cell, CELLS)
        radius = random.uniform(0.3, 0.42) * side
        x, y = (side * (place + 0.5) + random.uniform(-1, 1) * (side / 2 - radius) for place in (column, row))
        shapes.append(Shape(name, (row, column), (float(x), float(y)), float(radius)))
    return Scene(_paint(shapes, random, ground), tuple(shapes))


def draw_name(scene: Scene, there: bool, random: np.random.Generator, without: Collection[str] = ()) -> str:
    """The name of something to ask for.

    Args:
        scene: what is asked about.
        there: whether it is to be in the scene.
        random: draws.
        without: names that are not to be drawn.

    Raises:
        ValueError: there is no other name.
    """
    present = scene.names
    colours, forms = ({name.split()[i] for name in present} for i in (0, 1))
    pool = [name for name in OBJECTS if (name in present) == there and name not in without]
    if not pool:
        raise ValueError(f"without={sorted(without)} leaves nothing to ask for in a scene of {', '.join(present)}")
    mixed = [name for name in pool if name.split()[0] in colours and name.split()[1] in forms]
    return str(random.choice(mixed if mixed and not there and random.random() < 0.5 else pool))


def _paint(shapes: list[Shape], random: np.random.Generator, ground: Ground | None) -> Any:
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingExtra("pillow", "multimodal") from error
    pale = np.broadcast_to(random.integers(195, 235, 3), (SIDE, SIDE, 3))
    behind = (pale if ground is None else ground(random)).astype(np.uint8)
    image = Image.fromarray(behind).resize((SIDE * _FINER, SIDE * _FINER), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        colour, form = shape.name.split()
        (x, y), r = (np.array(shape.centre) * _FINER).tolist(), shape.radius * _FINER
        if form == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        elif form == "square":
            draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=COLOURS[colour])
        else:
            draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=COLOURS[colour])
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noisy = small + random.normal(0, 6, small.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

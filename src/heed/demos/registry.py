"""What a demo is: a function that computes something small with a system, draws it and returns its figures."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import heed.demos
from heed.catalogue import system
from heed.errors import MissingExtra
from heed.registry import Registry

Figures = dict[str, str | int | float]
# slug -> function(path of the picture to write, a PNG) returning the figures to print
Demo = Callable[[Path], Figures]


def _load() -> None:
    for module in pkgutil.iter_modules(heed.demos.__path__):
        importlib.import_module(f"heed.demos.{module.name}")


demos: Registry[Demo] = Registry("demo", _load)


def run_demo(slug: str, folder: Path) -> tuple[Path, Figures]:
    """Run the demo of a system (slug, short name or number); returns the picture's path and the figures."""
    entry = system(slug)
    if entry.slug not in demos.names():
        raise ValueError(f"{entry.slug} has no demo yet; systems with one: {', '.join(demos.names())}")
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{entry.slug}.png"
    return picture, demos.get(entry.slug)(picture)


def photograph(height: int, width: int) -> np.ndarray:
    """A real photograph (scikit-image's cat), float32 in [0, 1], (height, width, 3)."""
    try:
        from skimage import data, transform
    except ImportError as error:
        raise MissingExtra("scikit-image", "compare") from error
    return np.asarray(transform.resize(data.chelsea(), (height, width), anti_aliasing=True), dtype=np.float32)

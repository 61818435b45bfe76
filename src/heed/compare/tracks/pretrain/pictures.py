"""Pictures for the report of `pretrain`: test images, what each objective saw of them, and what it made of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from heed.compare.results import MethodResult, Results
from heed.compare.tracks.pretrain.training import FINETUNED
from heed.explain.page import png

_HIDDEN = (86, 124, 158)  # a blue that shows on light and dark pages, and that grey pictures do not have


def reconstructions(results: Results, folder: Path) -> dict[str, Any] | None:
    """The images as data URIs, and per method the pictures of its best trial by name; None where there are none."""
    images, shown = [], {}
    for row in results.methods:
        path = folder / "trials" / f"{row.method}-{_best_seed(row)}" / "pictures.safetensors"
        if row.status != "ok" or not path.is_file():
            continue
        pictures = {name: [*map(_picture, stack)] for name, stack in safetensors.torch.load_file(path).items()}
        images = pictures.pop("input")
        shown[row.method] = dict(sorted(pictures.items()))
    return {"images": images, "shown": shown} if shown else None


def _best_seed(row: MethodResult) -> int:
    return int(np.argmax([-1 if value is None else value for value in row.scores[FINETUNED.name].per_seed]))


def _picture(image: Tensor) -> str:
    """(C, H, W) pixels from 0 to 1 as a data URI; what is NaN gets a colour of its own."""
    hidden = image.isnan().any(0).numpy()
    levels = (image.nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    colours = levels.copy() if levels.shape[2] == 3 else levels[..., :1].repeat(3, 2)
    colours[hidden] = _HIDDEN
    return png(colours)

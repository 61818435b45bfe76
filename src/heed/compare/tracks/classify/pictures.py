"""Pictures for the report of `classify`: test images, and what each method's best trial attends to in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from heed.compare.results import MethodResult, Results
from heed.data.images import ImageData
from heed.explain.attention import attention_map
from heed.explain.page import heat, photo
from heed.models import from_pretrained
from heed.vision.backbone import Backbone

_EXACT = 128  # widest features whose attention is computed along every channel


@dataclass(frozen=True)
class _Seen:
    """What one model makes of one image: two pictures of its attention and its answer."""

    whole: str
    place: str
    answer: str
    right: bool


def attention(results: Results, folder: Path) -> dict[str, Any] | None:
    """Six test images, and per method and image what its best trial attends to; None without models or images."""
    samples = folder / "samples.safetensors"
    best = {row.method: _best_seed(row) for row in results.methods if row.status == "ok"}
    paths = {method: folder / "trials" / f"{method}-{seed}" / "model" for method, seed in best.items()}
    paths = {method: path for method, path in paths.items() if path.is_dir()}
    if not samples.is_file() or not paths:
        return None
    tensors = safetensors.torch.load_file(samples)
    images, classes = tensors["images"], results.data.details["classes"]
    pairs = list(zip(images, tensors["labels"].tolist(), strict=True))
    height, width = images.shape[2:]
    query = height // 2, width // 2
    seen = {}
    for method, path in paths.items():
        model = from_pretrained(path)
        if isinstance(model, Backbone):
            seen[method] = [_see(model, image, label, classes, query) for image, label in pairs]
    return {
        "x": f"{(query[1] + 0.5) / width:.1%}",
        "y": f"{(query[0] + 0.5) / height:.1%}",
        "originals": [(photo(image), classes[label]) for image, label in pairs],
        "seen": seen,
    }


def _best_seed(row: MethodResult) -> int:
    return int(np.argmax([-1 if value is None else value for value in row.scores["accuracy"].per_seed]))


def _see(model: Backbone, image: Tensor, label: int, classes: Sequence[str], query: tuple[int, int]) -> _Seen:
    with torch.no_grad():
        answer = int(model(image[None]).argmax())
    options: dict[str, Any] = {}
    if model.num_features > _EXACT:
        options = {"directions": _EXACT // 2, "generator": torch.Generator().manual_seed(0)}
    whole, place = (heat(attention_map(model, image, where, **options)) for where in (None, query))
    return _Seen(whole, place, classes[answer], answer == label)


def normalisation(data: Path) -> dict[str, list[float]] | None:
    """Mean and deviation of the training pixels, rounded to be read; None where the images are not kept."""
    if not data.is_file():
        return None
    mean, std = ImageData.load(data).statistics()
    return {name: [round(value, 4) for value in values.tolist()] for name, values in (("mean", mean), ("std", std))}

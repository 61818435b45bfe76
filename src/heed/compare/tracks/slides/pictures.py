"""Pictures for the report of `slides`: what each method's best trial attends to in test bags, and how concentrated it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from heed.compare.results import MethodResult, Results
from heed.compare.tracks.slides.scores import AUC
from heed.data.bags import Bag, BagData
from heed.explain.page import heat, photo
from heed.models import from_pretrained
from heed.predict.mil.maps import TOPS, cumulative_attention, heatmap, instance_scores
from heed.predict.mil.model import BagModel
from heed.predict.mil.training import predict

_BAGS = 3  # that are shown
_STRONGEST = 10  # instances of them


@dataclass(frozen=True)
class _Instance:
    """An instance as a picture, its share of the attention, and whether it is of the kind that counts."""

    picture: str
    share: float
    counts: bool


@dataclass(frozen=True)
class _Seen:
    """What one model makes of one bag: its answer, and a map or its strongest instances."""

    answer: str
    right: bool
    map: str | None
    strongest: list[_Instance]


def looks(results: Results, file: Path, folder: Path) -> dict[str, Any] | None:
    """What the best trial of each method attends to; None where data or models are not kept."""
    best = {row.method: _best_seed(row) for row in results.methods if row.status == "ok"}
    paths = {method: folder / "trials" / f"{method}-{seed}" / "model" for method, seed in best.items()}
    paths = {method: path for method, path in paths.items() if path.is_dir()}
    if not file.is_file() or not paths:
        return None
    data = BagData.load(file)
    test = data.part("test")
    shown = sorted(test, key=lambda bag: -bag.label)[:_BAGS]
    seen, shares = {}, {}
    for method, path in paths.items():
        model = cast(BagModel, from_pretrained(path))
        seen[method] = [_see(model, bag, data) for bag in shown]
        curves = [cumulative_attention(predict(model, bag).weights[0].mean((0, 1))) for bag in test]
        shares[method] = torch.stack(curves).mean(0).tolist()
    return {
        "bags": [(bag.name, data.classes[bag.label]) for bag in shown],
        "seen": seen,
        "maps": any(view.map for views in seen.values() for view in views),
        "strongest": any(view.strongest for views in seen.values() for view in views),
        "tops": TOPS,
        "shares": shares,
    }


def _best_seed(row: MethodResult) -> int:
    return int(np.argmax([-1 if value is None else value for value in row.scores[AUC.name].per_seed]))


def _see(model: BagModel, bag: Bag, data: BagData) -> _Seen:
    output, instances = predict(model, bag), bag.instances()
    answer = int(output.logits.argmax())
    map_, strongest = None, []
    if instances.coordinates is not None:
        map_ = heat(heatmap(instance_scores(output)[0], instances.coordinates).nan_to_num(0))
    elif data.name == "digits":
        weights = output.weights[0].mean((0, 1))
        side = math.isqrt(data.width)
        for i in weights.argsort(descending=True)[:_STRONGEST].tolist():
            counts = instances.labels is not None and bool(instances.labels[i])
            picture = photo(instances.features[i].view(1, side, side))
            strongest.append(_Instance(picture, float(weights[i]), counts))
    return _Seen(data.classes[answer], answer == bag.label, map_, strongest)

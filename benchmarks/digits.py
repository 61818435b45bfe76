"""Every attention layer and every small vision model on scikit-learn's digits, by `heed compare classify`.

    python benchmarks/digits.py [--epochs 20] [--seeds 2] [--jobs 2] [--run runs/all-digits] [--out FILE]

Layers are put into the small ViT, models are taken whole; all learn at the same budget. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common import report
from heed.compare import ClassifySettings, run
from heed.compare.progress import LiveProgress
from heed.compare.results import MethodResult
from heed.compare.tracks.classify.host import classifies
from heed.layers.registry import layers
from heed.models import models

COLUMNS = ["method", "kind", "accuracy", "spread", "lowest", "parameters", "training images/s", "images/s"]


def methods() -> tuple[str, ...]:
    """All layers, and the small models that classify images of digits."""
    return (*layers.names(), *(name for name in models.names() if name.endswith("_micro") and classifies(name)))


def row(result: MethodResult) -> list[object]:
    score = result.scores["accuracy"]
    found = [value for value in score.per_seed if value is not None]
    kind = "layer" if result.method in layers.names() else "model"
    costs = [result.costs[name] for name in ("parameters", "train", "infer")]
    return [result.method, kind, score.mean, score.spread, min(found, default=None), *costs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--run", default="runs/all-digits", help="folder of the comparison")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)  # what each trial computes with
    settings = ClassifySettings(
        methods=methods(), epochs=given.epochs, seeds=given.seeds, jobs=given.jobs, threads=1, out=given.run
    )
    with LiveProgress(settings.methods, settings.seeds) as progress:
        found = run(settings, on_progress=progress)
    report("Digits, accuracy", COLUMNS, [row(result) for result in found.methods], given.out)


if __name__ == "__main__":
    main()

"""Do the importance metrics mean anything? Pruning curves by metric against random orders, on a ViT trained here.

    python benchmarks/vit_analytics.py [--data FOLDER] [--threads 2] [--out docs/benchmarks/vit_analytics.json]

With --data (MNIST's idx files), a timm ViT of 4 layers x 4 heads learns 28 x 28 digits from the first 8,000 images, 6
epochs, as in the card of the system; without, scikit-learn's 8 x 8 digits. Every metric then orders the heads on the
same held-out images: pruning the least important first should keep the accuracy above every random order, and the most
important first below. A second table measures the pattern autoencoder on planted maps.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common import digits, report
from heed.explain.heads import (
    PatternOptions,
    analyse,
    prepare_maps,
    summarise_patterns,
)
from heed.explain.heads.names import statistics
from heed.explain.heads.profile import Rings

METRICS = ("prob", "jsd", "cls_l2", "loss", "sensitivity")
MARGIN = 0.03


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [0, 1] and labels (n,) of the idx files in a folder."""
    files = {("images" if "image" in path.name else "labels"): path for path in sorted(folder.glob("*idx*"))}
    raw = {name: (gzip.open if path.suffix == ".gz" else open)(path, "rb").read() for name, path in files.items()}
    pixels = np.frombuffer(raw["images"], np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(raw["labels"], np.uint8, offset=8)
    return torch.from_numpy(pixels.copy()).float() / 255, torch.from_numpy(labels.copy()).long()


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int, peak: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            optimiser.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
            schedule.step()


def metrics_against_chance(data: Path | None, out: Path | None) -> None:
    images, labels = digits() if data is None else mnist(data)
    count, patch, epochs, batch = (1280, 2, 30, 32) if data is None else (8000, 4, 6, 64)
    model = VisionTransformer(
        img_size=images.shape[-1], patch_size=patch, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4,
        mlp_ratio=2,
    )  # fmt: skip
    begin = time.perf_counter()
    train(model, images[:count], labels[:count], epochs, batch, 1e-3)
    seconds = time.perf_counter() - begin
    found = analyse(
        model, images[count:], labels[count:], metrics=METRICS, curves=METRICS, random_curves=5, patterns=None
    )
    chance = [curve.area for name, curve in found.curves.items() if name.startswith("random")]
    agreement = found.agreement()
    rows: list[list[object]] = []
    for metric in METRICS:
        least, most = (found.curves[f"{metric}, {way} first"].area for way in ("least", "most"))
        holds = least > max(chance) + MARGIN and most < min(chance) - MARGIN
        alike = 1.0 if metric == "jsd" else agreement.get((metric, "jsd"), agreement.get(("jsd", metric), 0.0))
        rows.append([metric, least, f"{min(chance):.3f} to {max(chance):.3f}", most, "yes" if holds else "no", alike])
    agnostic, distance = found.content_agnostic, found.profile.mean_distance.mean(1)
    report(
        f"Mean accuracy over the pruning curve; the model gets {found.accuracy:.1%} of {found.images} images",
        ["metric", "least first", "random, 5 orders", "most first", f"apart by {MARGIN}", "Spearman with jsd"],
        rows,
        out,
        {
            "data": "digits" if data is None else data.name,
            "training_seconds": seconds,
            "accuracy": found.accuracy,
            "content_agnostic": [float(agnostic.min()), float(agnostic.max())],
            "mean_distance_by_layer": distance.tolist(),
        },
    )


def planted_patterns(out: Path | None) -> None:
    """40 noisy maps each of 8 patterns on a 14 x 14 grid: error of the autoencoder, and labels by the nearest code."""
    rings, generator = Rings((14, 14)), torch.Generator().manual_seed(0)
    down, right, distance = rings.down, rings.right, rings.distance
    keys = torch.rand(196, generator=generator) < 0.05
    places = [
        distance == 0, distance == 1, down == 0, right == 0, (down == 0) & (right == -1), (down == 0) & (right == 1),
        distance >= 0, keys[None] & (distance >= 0),
    ]  # fmt: skip
    maps, labels = [], []
    for label, place in enumerate(places):
        plain = torch.where(place.any(1, keepdim=True), place, distance == 0).float()
        plain = plain / plain.sum(1, keepdim=True)
        for _ in range(40):
            share = 0.3 * torch.rand(1, generator=generator)
            noise = torch.rand(196, 196, generator=generator)
            maps.append((1 - share) * plain + share * noise / noise.sum(1, keepdim=True))
            labels.append(label)
    weights, wanted = torch.stack(maps), torch.tensor(labels)
    begin = time.perf_counter()
    found = summarise_patterns(prepare_maps(weights), wanted, statistics(weights, rings, 0), (14, 14), PatternOptions())
    seconds = time.perf_counter() - begin
    nearest = torch.cdist(found.codes, found.codes).fill_diagonal_(torch.inf).argmin(1)
    right_share = float((wanted[nearest] == wanted).float().mean())
    purity = sum(int(torch.bincount(wanted[found.cluster == c]).max()) for c in range(len(found.names))) / len(wanted)
    report(
        "Pattern autoencoder on 320 planted maps of 8 patterns",
        ["figure", "measured", "wanted"],
        [
            ["reconstruction error over variance", found.error / found.variance, "< 0.05"],
            ["nearest-neighbour accuracy of the codes", right_share, ">= 0.9"],
            ["purity of the clusters", purity, "not claimed"],
            ["seconds", seconds, "not claimed"],
        ],
        None if out is None else out.with_name(f"{out.stem}_patterns.json"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    metrics_against_chance(options.data, options.out)
    planted_patterns(options.out)


if __name__ == "__main__":
    main()

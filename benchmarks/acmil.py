"""ACMIL (card 09): does random masking of the strongest instances fight overfitting, and what do branches cost?

    python benchmarks/acmil.py --mnist DIR [--threads 2] [--repeats 7] [--seeds 4] [--out docs/benchmarks/acmil.json]

Bags of 100 MNIST digits, raw pixels standardised over the whole set; 8 % nines make a bag positive. Digits 0 to 5,999 of
DIR (idx files) are for 160 training bags, the others for 200 test bags that are always the same. AdamW 1e-3, weight decay
1e-5, cosine per epoch, batch 1, 20 epochs, 64 channels; no epoch is chosen. Claimed: masking gains at least 0.02 AUC of
bags and 0.1 AUC of instances over ABMIL, and the diversity loss ends below 0.5. Forward passes are of one bag of 10,000
instances of 384 features, 128 channels.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

import heed
from common import interleaved, report
from heed.data.bag_files import Instances
from heed.data.bags import Bag, pad_bags
from heed.data.idx import idx_images, read_idx
from heed.predict.mil import BagModel, BagRecipe, attention_diversity, evaluate, fit, mask_top_instances

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
SIZE, SHARE, NINE, TRAIN_DIGITS = 100, 0.08, 9, 6000
MODELS = {
    "ABMIL": ("abmil", {}),
    "STKIM": ("acmil_ga", {"n_token": 1}),
    "ACMIL-GA": ("acmil_ga", {}),
}
COSTS = {
    "ABMIL": ("abmil", {}),
    "ACMIL-GA, 5 branches": ("acmil_ga", {}),
    "ACMIL-MHA, 5 branches": ("acmil_mha", {}),
}


def digits(folder: Path) -> tuple[Tensor, Tensor]:
    images = idx_images(folder)[0]
    labels = next(p for p in sorted(folder.iterdir()) if "labels" in p.name)
    x = torch.from_numpy(read_idx(images).reshape(-1, 784).astype(np.float32)) / 255
    return (x - x.mean()) / x.std(), torch.from_numpy(read_idx(labels).astype(np.int64))


def bags(x: Tensor, y: Tensor, count: int, seed: int) -> list[Bag]:
    draw = torch.Generator().manual_seed(seed)
    nines, others = (y == NINE).nonzero()[:, 0], (y != NINE).nonzero()[:, 0]
    made = []
    for i in range(count):
        few = round(SHARE * SIZE) * (i % 2)
        parts = [
            pool[torch.randperm(len(pool), generator=draw)[:n]] for pool, n in ((nines, few), (others, SIZE - few))
        ]
        chosen = torch.cat(parts)[torch.randperm(SIZE, generator=draw)]
        made.append(Bag(str(i), i % 2, Instances(x[chosen], None, (y[chosen] == NINE).long())))
    return made


def overfitting(folder: Path, seeds: int) -> list[list[object]]:
    x, y = digits(folder)
    test = bags(x[TRAIN_DIGITS:], y[TRAIN_DIGITS:], 200, 12345)
    batch = pad_bags(test)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in MODELS}
    for seed in range(seeds):
        train = bags(x[:TRAIN_DIGITS], y[:TRAIN_DIGITS], 160, seed)
        for name, (model_name, settings) in MODELS.items():
            torch.manual_seed(seed)
            model = heed.create_model(model_name, in_features=784, dim=64, **settings)
            assert isinstance(model, BagModel)
            fit(model, train, (), BagRecipe(epochs=20, learning_rate=1e-3), seed=seed)
            scores = evaluate(model, test, instances=True)
            with torch.no_grad():
                weights = model(batch.x).weights
            figures = {"bag AUC": scores.auc, "instance AUC": scores.instance_auc or 0.0}
            figures["diversity loss"] = attention_diversity(weights).item()
            for key, value in figures.items():
                found[name].setdefault(key, []).append(value)
    rows: list[list[object]] = []
    for name in ("STKIM", "ACMIL-GA"):
        for key in ("bag AUC", "instance AUC"):
            base, own = fmean(found["ABMIL"][key]), fmean(found[name][key])
            spread = f"{name}: {key}, mean over {seeds} seeds" + (
                f" (sd {stdev(found['ABMIL'][key]):.3f}, {stdev(found[name][key]):.3f})" if seeds > 1 else ""
            )
            rows.append([spread, "ABMIL", base, own, own / base])
    diversity = fmean(found["ACMIL-GA"]["diversity loss"])
    rows.append(["ACMIL-GA: diversity loss after training", "equal branches", 1.0, diversity, diversity])
    return rows


@torch.inference_mode()
def costs(repeats: int) -> list[list[object]]:
    x = torch.randn(1, 10_000, 384)
    models = {name: heed.create_model(model, **settings).eval() for name, (model, settings) in COSTS.items()}
    seconds = interleaved({name: lambda model=model: model(x) for name, model in models.items()}, repeats)
    base = seconds["ABMIL"] * 1e3
    rows: list[list[object]] = [
        [f"{name}: forward ms, 10,000 instances", "ABMIL", base, seconds[name] * 1e3, seconds[name] * 1e3 / base]
        for name in list(COSTS)[1:]
    ]
    logits = models["ABMIL"](x).attention[0, 0] * 20
    strongest = logits.topk(10).indices
    masked = mask_top_instances(logits, 10, 0.6)
    before, after = (part.softmax(-1).gather(-1, strongest).sum().item() for part in (logits, masked))
    rows.append(["STKIM: share of attention on the ten strongest", "the same logits", before, after, after / before])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="folder with idx files of MNIST's images and labels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = costs(given.repeats)
    torch.set_num_threads(given.threads)
    report(
        "ACMIL, float32; forward passes on one thread", COLUMNS, rows + overfitting(given.mnist, given.seeds), given.out
    )


if __name__ == "__main__":
    main()

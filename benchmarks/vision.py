"""Every architecture of the vision room at work: images per second at its smallest official size, beside timm.

    python benchmarks/vision.py [--threads 2] [--repeats 7] [--only davit,convit] [--out docs/benchmarks/vision.json]

A twin is timm's own implementation of the same network; a neighbour is another network of similar size. Each pair takes
turns in one run: forward, and forward with backward, in batches of 8, in float32 and in bfloat16 autocast, without
stochastic depth. Images are 224 x 224, and 256 x 256 for HaloNet.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import heed
from common import interleaved, report
from heed.models import models

BATCH, SIDE = 8, 224
SIDES = {"halonet": 256, "halonet-h0": 256}  # whose maps must divide into blocks of 8
COLUMNS = ["system", "heed", "beside", "relation", "precision", "pass", "images/s", "beside images/s", "ratio"]
# system: heed's smallest official configuration (or the one timm has), a model of timm, and what that is to it
PAIRS = {
    "davit": ("davit_tiny", "davit_tiny", "twin"),
    "convit": ("convit_tiny", "convit_tiny", "twin"),
    "focalnet": ("focalnet_tiny_srf", "focalnet_tiny_srf", "twin"),
    "halonet": ("halonet26t", "halonet26t", "twin"),
    "halonet-h0": ("halonet_h0", "halonet26t", "neighbour"),
    "nat": ("nat_mini", "swin_tiny_patch4_window7_224", "neighbour"),
    "dinat": ("dinat_mini", "swin_tiny_patch4_window7_224", "neighbour"),
    "litv2": ("litv2_s", "pvt_v2_b2", "neighbour"),
    "van": ("van_b0", "pvt_v2_b0", "neighbour"),
    "soft": ("soft_tiny", "pvt_v2_b1", "neighbour"),
    "illama": ("illama_tiny", "deit_tiny_patch16_224", "neighbour"),
    "ffnet": ("ffnet_1", "convnext_tiny", "neighbour"),
    "tic": ("tic_tiny", "convnext_tiny", "neighbour"),
    "transnext": ("moh_vit_s75", "swin_small_patch4_window7_224", "neighbour"),
    "kdgqa": ("grouped_vit_small", "deit_small_patch16_224", "neighbour"),
    "sparsifiner": ("sparsifiner_small", "deit_small_patch16_224", "neighbour"),
    "ulsam": ("mobilenet_v2_ulsam_13_16", "mobilenetv2_100", "neighbour"),
    "psa": ("psa_resnet50", "resnet50", "neighbour"),
}


def passes(model: nn.Module, images: Tensor, half: bool) -> dict[str, object]:
    def forward() -> object:
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(images)

    def both() -> object:
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(images)
        out.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        return out

    return {"forward": forward, "forward and backward": both}


def rows(system: str, repeats: int) -> list[list[object]]:
    name, other, relation = PAIRS[system]
    torch.manual_seed(0)
    fields = {field.name for field in dataclasses.fields(models.get(name).config)}
    ours = heed.create_model(name, **({"drop_path": 0.0} if "drop_path" in fields else {}))  # timm's default
    theirs = timm.create_model(other)
    images = torch.randn(BATCH, 3, *2 * [SIDES.get(system, SIDE)])
    found: list[list[object]] = []
    for half in (False, True):
        mine, beside = passes(ours, images, half), passes(theirs, images, half)
        for title in mine:
            seconds = interleaved({"heed": mine[title], "timm": beside[title]}, repeats, warmup=1)  # type: ignore[dict-item]
            rate, other_rate = BATCH / seconds["heed"], BATCH / seconds["timm"]
            precision = "bf16" if half else "fp32"
            found.append([system, name, other, relation, precision, title, rate, other_rate, rate / other_rate])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default=",".join(PAIRS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table: list[list[object]] = []
    for system in given.only.split(","):
        table += rows(system, given.repeats)
        print(system, *(f"{row[4]} {row[5]} {row[8]:.2f}" for row in table[-4:]), sep="  ", flush=True)
        gc.collect()
    report("Vision models, batches of 8", COLUMNS, table, given.out)


if __name__ == "__main__":
    main()

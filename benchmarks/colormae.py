"""ColorMAE's claims that need no ImageNet: cost, the shape of its masks, and how hard each colour is to reconstruct.

    python benchmarks/colormae.py [--threads 1] [--repeats 15] [--seeds 2] [--steps 400] [--out docs/benchmarks/colormae.json]

- cost: parameters of ViT-B with its decoder, and time to draw 512 masks of 14 x 14, against random masks;
- shape: mean size of the connected pieces of visible patches (the paper: red > green > white > blue), and where the
  radial spectrum of the masks has its peak and its valley;
- difficulty: masked loss of a tiny autoencoder after a few hundred steps on digits, one pixel per patch (red > green > blue).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import digits, interleaved, report
from heed.pretrain.color import ColorMask, default_bank
from heed.pretrain.mae import MaskedViTConfig, masked_vit
from heed.pretrain.masks import MaskGenerator, RandomMask, piece_size
from heed.pretrain.noise import periodogram

GRID, BATCH = (14, 14), 512
TINY = MaskedViTConfig(
    8, 1, 1, dim=64, depth=2, num_heads=4, decoder_dim=48, decoder_depth=1, decoder_heads=4, norm_pix=False
)
NAMES = ("random", "white", "red", "green", "blue", "purple")
COLUMNS = [
    "mask",
    "ms for 512 masks",
    "M parameters, ViT-B",
    "visible piece",
    "peak cycles/patch",
    "valley cycles/patch",
    "loss (pixel variance 1)",
    "loss, seeds",
]


def spectrum(masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles per patch, and the mean power of the masks there."""
    side = GRID[0]
    power = periodogram((~masks).float().view(-1, *GRID)).square().mean(0)
    offset = torch.arange(side) - side // 2
    radius = (offset[:, None].square() + offset.square()).float().sqrt().round().long()
    inside = (radius > 0) & (radius <= side // 2)
    total = torch.zeros(side).index_add_(0, radius[inside], power[inside])
    count = torch.bincount(radius[inside], minlength=side)[:side]
    present = count > 0
    return (torch.arange(side)[present] / side).numpy(), (total[present] / count[present]).numpy()


def final_loss(mask: MaskGenerator, images: Tensor, steps: int, seed: int) -> float:
    """Mean masked loss over the last tenth of the steps."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = masked_vit(TINY, mask)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.2)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=rng)
        loss = model(images[batch], rng).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-steps // 10 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = torch.Generator().manual_seed(0)
    masks: dict[str, MaskGenerator] = {
        name: RandomMask() if name == "random" else ColorMask(default_bank(name)) for name in NAMES
    }
    times = interleaved(
        {name: lambda mask=mask: mask(BATCH, GRID, generator=rng) for name, mask in masks.items()}, options.repeats
    )
    images, _ = digits()
    images = (images - images.mean()) / images.std()
    rows: list[list[object]] = []
    for name, mask in masks.items():
        with torch.device("meta"):
            size = sum(p.numel() for p in masked_vit("vit_base", mask).parameters())
        drawn = torch.cat([mask(256, GRID, generator=rng) for _ in range(4)])
        frequency, power = spectrum(drawn)
        losses = [final_loss(mask, images, options.steps, seed) for seed in range(options.seeds)]
        rows.append(
            [
                name,
                times[name] * 1e3,
                f"{size / 1e6:.6f}",
                piece_size(drawn, GRID),
                float(frequency[power.argmax()]),
                float(frequency[power.argmin()]),
                f"{np.mean(losses):.4f}",
                " ".join(f"{loss:.4f}" for loss in losses),
            ]
        )
    report(f"ColorMAE's masks, ratio 0.75; losses after {options.steps} steps", COLUMNS, rows, options.out)


if __name__ == "__main__":
    main()

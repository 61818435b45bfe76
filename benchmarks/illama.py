"""iLLaMA (card 07): counts, the cost of the mask after the softmax, collapse, rank, the soft mask and quantisation.

    python benchmarks/illama.py [--threads 1] [--repeats 7] [--seeds 2] [--out docs/benchmarks/illama.json]

Learning is on scikit-learn's digits with `illama_micro`; loss is the mean over the training steps without a soft mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from common import digits, interleaved, options, report
from heed.vision.illama import ROADMAP, ILlama, SoftMask, SoftMaskedAttention, rope_table
from heed.vision.illama_analysis import calibration_error, map_rank, quantised
from heed.vision.illama_training import SoftMaskSchedule, soft_mask_rates

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
PAPER = {
    "tiny": (5.7, 1.3),
    "small": (21.9, 4.6),
    "base": (86.3, 17.6),
    "base_384": (86.3, 55.5),
    "large": (310.2, 62.8),
}
EPOCHS, STEPS = 10, 20


def sizes() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, (parameters, gmacs) in PAPER.items():
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model: ILlama = heed.create_model(f"illama_{name}").eval()  # type: ignore[assignment]
            model(torch.empty(1, 3, model.config.img_size, model.config.img_size))
        # The authors leave the class token and the positions out.
        positions = model.cls_token.numel() + (0 if model.pos_embed is None else model.pos_embed.numel())
        own = (sum(p.numel() for p in model.parameters()) - positions) / 1e6, counter.get_total_flops() / 2e9
        rows.append([f"{name}, 10^6 parameters without positions", "authors", parameters, own[0], parameters / own[0]])
        rows.append([f"{name}, 10^9 multiply-adds", "authors", gmacs, own[1], gmacs / own[1]])
    return rows


def speed(repeats: int) -> list[list[object]]:
    x, rope = torch.randn(8, 197, 384), rope_table(197, 64)
    layers = {mode: SoftMaskedAttention(384, 6, mask_mode=mode) for mode in ("post", "pre")}

    def run(mode: str, mask: SoftMask | None) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return layers[mode](x, mask, rope)

        return call

    calls = {"no mask": run("post", None), "post": run("post", SoftMask(0)), "pre": run("pre", SoftMask(0))}
    seconds = interleaved(calls, repeats)
    base = seconds.pop("no mask")
    return [
        [f"(8, 197, 384), 6 heads, mask {mode} softmax, ms", "no mask", base * 1e3, s * 1e3, s / base]
        for mode, s in seconds.items()
    ]


def train(model: ILlama, seed: int, rates: Tensor | None = None) -> float:
    """Mean training loss of the second half, when every mask is closed."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    learning = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, EPOCHS * STEPS)
    schedule = None if rates is None else SoftMaskSchedule(model, rates)
    losses = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(1280, generator=generator).split(1280 // STEPS):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            learning.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
    return float(np.mean(losses[len(losses) // 2 :]))


def learning(seeds: int) -> list[list[object]]:
    images, labels = (part[1280:] for part in digits())
    loss: dict[str, list[float]] = {"hard": [], "soft": [], "collapsed": []}
    models: dict[str, ILlama] = {}
    for seed in range(seeds):
        for name, found in loss.items():
            torch.manual_seed(seed)
            step = ROADMAP["causal, class token first"] if name == "collapsed" else {}
            model: ILlama = heed.create_model("illama_micro", patch_size=1, **step)  # type: ignore[assignment]
            rates = soft_mask_rates(EPOCHS, STEPS, cutoff_epoch=EPOCHS // 2) if name == "soft" else None
            found.append(train(model, seed, rates))
            models[name] = model.eval()
    hard, soft, collapsed = (float(np.mean(values)) for values in loss.values())
    model = models["soft"]
    with torch.no_grad():
        spread = float((models["collapsed"](images) - models["collapsed"](images[:1])).abs().max())
        logits = model(images)
        with quantised(model):
            rounded = model(images)
        ranks = []
        for rate in (1.0, 0.0):
            model.set_soft_mask(rate)
            ranks.append(map_rank(model.attention_maps(images[:16])).double().mean().item())
    right, near = ((y.argmax(1) == labels).double().mean().item() for y in (logits, rounded))
    error = calibration_error(logits, labels)
    return [
        [f"training loss, soft mask, {seeds} seeds", "causal from the start", hard, soft, soft / hard],
        ["training loss, class token first and causal", "class token last", hard, collapsed, collapsed / hard],
        ["largest difference of logits, class token first and causal", "", "", spread, ""],
        ["mean rank of attention maps, causal", "the same model, mask opened", *ranks, ranks[1] / ranks[0]],
        ["test accuracy, 8-bit weights and activations", "float32", right, near, near / right],
        ["expected calibration error", "", "", error, ""],
    ]


def main() -> None:
    given = options(__doc__, seeds=2)
    rows = sizes() + speed(given.repeats) + learning(given.seeds)
    report("iLLaMA: a LLaMA decoder as image classifier", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

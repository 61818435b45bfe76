"""Key-driven grouped-query attention (card 46): counts, memory, time beside multi-head attention, and up-training.

    python benchmarks/grouped.py [--threads 1] [--repeats 7] [--seeds 3] [--out docs/benchmarks/grouped.json]

Times are of one layer in float32 on 197 tokens of 768 channels, 12 heads, batch 1, beside multi-head attention with the
same engine. Accuracy is on scikit-learn's digits: a small ViT with multi-head attention is trained, converted to half
the key-value heads, and up-trained for one epoch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from common import digits, digits_accuracy, interleaved, options, report
from heed.layers.attention import PatternAttention
from heed.layers.grouped import SCHEMES, grouped_scheme
from heed.vision.grouped_vit import GroupedViT, uptrain

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
# size -> key-value heads, parameters and 10^9 multiply-adds in the authors' code
SIZES = {
    "small": ((6, 22_050_664, 4.599), (3, 20_276_584, 4.250), (1, 19_093_864, 4.018)),
    "base": ((12, 86_567_656, 17.564), (6, 79_480_552, 16.170), (2, 74_755_816, 15.240)),
    "large": ((16, 304_326_632, 61.555), (8, 279_136_232, 56.597), (2, 260_243_432, 52.879)),
}
# scheme, key-value heads, and time over multi-head attention's in the authors' code
TIMES = (("gqa", 6, 0.86), ("kdgqa", 6, 0.89), ("pgqa", 6, 1.20), ("gqa", 3, 0.71), ("kdgqa", 3, 0.72))
HOST = {"depth": 3, "patch_size": 2}
EPOCHS, LEARNING_RATE = 30, 3e-4


def sizes() -> list[list[object]]:
    rows: list[list[object]] = []
    for size, cases in SIZES.items():
        for heads, parameters, gmacs in cases:
            with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
                model = heed.create_model(f"grouped_vit_{size}", num_kv_heads=heads, att_scheme="gqa").eval()
                model(torch.empty(1, 3, 224, 224))
            own = sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9
            name = f"ViT-{size[0].upper()}, {heads} key-value heads"
            rows.append([f"{name}, parameters", "the authors' code", parameters, own[0], parameters / own[0]])
            rows.append([f"{name}, 10^9 multiply-adds", "the authors' code", gmacs, own[1], gmacs / own[1]])
    return rows


def memory() -> list[list[object]]:
    """Bytes of keys and values that one layer holds for 197 tokens, from the tensors themselves."""
    x, found = torch.randn(1, 197, 768), {}
    for heads in (12, 6, 3):
        layer = grouped_scheme("kdgqa")[0](768, 12, heads)
        held: list[Tensor] = []
        for part in (layer.k, layer.v):
            part.register_forward_hook(lambda module, inputs, output, held=held: held.append(output))
        layer(x)
        found[heads] = sum(part.numel() * part.element_size() for part in held)
    base = found.pop(12)
    return [
        [f"keys and values, {heads} of 12 heads, bytes", "12 heads", base, own, own / base]
        for heads, own in found.items()
    ]


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def speed(repeats: int) -> list[list[object]]:
    x = torch.randn(1, 197, 768)
    layers: dict[str, nn.Module] = {"mhsa": PatternAttention(768, 12)}
    for scheme, heads, _ in TIMES:
        kind, settings = grouped_scheme(scheme)
        layers[f"{scheme} {heads}"] = kind(768, 12, heads, **settings)
    seconds = interleaved({name: forward(layer.eval(), x) for name, layer in layers.items()}, 5 * repeats, 5)
    base = seconds["mhsa"] * 1e3
    rows: list[list[object]] = []
    for scheme, heads, authors in TIMES:
        own = seconds[f"{scheme} {heads}"] * 1e3
        claim = f"{scheme}, {heads} key-value heads, ms (authors: {authors})"
        rows.append([claim, "multi-head attention", base, own, own / base])
    return rows


def judged(model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy on the digits for testing."""
    images, labels = (part[1280:] for part in digits())
    with torch.no_grad():
        logits = model.eval()(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def learned(seeds: int) -> list[list[object]]:
    images, labels = digits()
    found: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        trained = heed.create_model("grouped_vit_micro", att_scheme="mhsa", **HOST)
        digits_accuracy(trained, EPOCHS, 3e-3, clip=1.0)
        found.setdefault("mhsa", []).append(judged(trained))
        batches = [(images[i], labels[i]) for i in torch.randperm(1280).split(32)]
        for scheme in SCHEMES:
            for pool in ("mean", "first"):
                torch.manual_seed(seed)
                model: GroupedViT = heed.create_model("grouped_vit_micro", att_scheme=scheme, **HOST)  # type: ignore[assignment]
                model.load_timm(trained.state_dict(), load_head=True, pool=pool)
                before = judged(model)
                uptrain(model, batches, epochs=1, learning_rate=LEARNING_RATE)
                found.setdefault(f"{scheme} {pool}", []).append(before + judged(model))
    mean = {name: np.mean(values, 0).tolist() for name, values in found.items()}
    accuracy = mean["mhsa"][1]
    loss = {pool: mean[f"gqa {pool}"][0] for pool in ("mean", "first")}
    rows: list[list[object]] = [
        [f"{scheme}, digits, accuracy after {when}, {seeds} seeds", "before conversion", accuracy, own, own / accuracy]
        for scheme in SCHEMES
        for when, own in (("conversion", mean[f"{scheme} mean"][1]), ("an epoch more", mean[f"{scheme} mean"][3]))
    ]
    pooled = ["gqa, loss right after mean pooling", "first head of each", loss["first"], loss["mean"]]
    return [*rows, [*pooled, loss["mean"] / loss["first"]]]


def main() -> None:
    given = options(__doc__)
    rows = sizes() + memory() + speed(given.repeats) + learned(given.seeds)
    report("Key-driven grouped-query attention", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

"""SOFT (card 64) against full softmax attention: speed, growth with the map, memory for training, accuracy on digits.

    python benchmarks/soft.py [--threads 1] [--repeats 7] [--out docs/benchmarks/soft.json]

Times are of one attention layer in float32, batch 1; the baseline is qkv, scaled_dot_product_attention and projection.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from common import digits_accuracy, interleaved, options, report
from heed.layers.attention import PatternAttention
from heed.layers.soft import SoftAttention, newton_inverse
from heed.vision.soft import Soft

COLUMNS = ["claim", "baseline", "baseline value", "heed", "ratio"]
# channels, heads, side of the map, ratio, convolution; and heed's time over the baseline's in the authors' code
LAYERS = ((64, 2, 56, 8, 9, 0.64), (64, 2, 112, 16, 9, 0.154), (64, 2, 112, 8, 9, 0.35), (128, 4, 28, 4, 5, 1.2),
          (320, 10, 14, 2, 3, 2.6))  # fmt: skip
SIZES = {"tiny": 13.069056, "small": 38.858462, "medium": 45.812707, "large": 64.700646, "huge": 87.108273}


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def speed(repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for dim, heads, side, ratio, conv, authors in LAYERS:
        x = torch.randn(1, side, side, dim)
        layers = {
            "dense": PatternAttention(dim, heads),
            "SOFT": SoftAttention(dim, heads, ratio, conv),
            "SOFT++": SoftAttention(dim, heads, ratio, conv, normalised=True),
        }
        seconds = interleaved({name: forward(layer, x) for name, layer in layers.items()}, repeats)
        for name in ("SOFT", "SOFT++"):
            own = seconds[name]
            setting = f"{name}, {dim} channels, {side} x {side}, ratio {ratio} (authors: {authors})"
            rows.append(
                [f"{setting}, ms", "softmax attention", seconds["dense"] * 1e3, own * 1e3, own / seconds["dense"]]
            )
    return rows


def growth(repeats: int) -> list[list[object]]:
    """From 56 x 56 to 112 x 112 tokens: four times as many."""
    layers = {"dense": PatternAttention(64, 2), "49 landmarks": SoftAttention(64, 2, 8, 9, num_landmarks=49)}
    layers["ratio 8"] = SoftAttention(64, 2, 8, 9)
    maps = {side: torch.randn(1, side, side, 64) for side in (56, 112)}
    seconds = interleaved(
        {f"{n} {s}": forward(layer, x) for n, layer in layers.items() for s, x in maps.items()}, repeats
    )
    operations = {}
    for name, layer in layers.items():
        for side, x in maps.items():
            with FlopCounterMode(display=False) as counter:
                layer(x)
            operations[f"{name} {side}"] = counter.get_total_flops()
    rows: list[list[object]] = []
    for what, values in (("time", seconds), ("operations", operations)):
        times = {name: values[f"{name} 112"] / values[f"{name} 56"] for name in layers}
        for name in ("49 landmarks", "ratio 8"):
            claim = f"{what} for 4 times the tokens, {name}"
            rows.append([claim, "softmax attention", times["dense"], times[name], times["dense"] / times[name]])
    return rows


def memory() -> list[list[object]]:
    kernel = torch.rand(8, 49, 49).requires_grad_()

    def kept(iterations: int) -> int:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            newton_inverse(kernel, iterations)
        return sum(x.numel() * x.element_size() for x in tensors)

    def recorded(iterations: int) -> int:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            inverse = 1e-3 * kernel
            for _ in range(iterations):
                inverse = 2 * inverse - inverse @ kernel @ inverse
        return sum(x.numel() * x.element_size() for x in tensors)

    return [
        [f"bytes kept for backward, {n} iterations", "recorded iterations", recorded(n), kept(n), recorded(n) / kept(n)]
        for n in (5, 20)
    ]


def sizes() -> list[list[object]]:
    rows: list[list[object]] = []
    for size, authors in SIZES.items():
        with torch.device("meta"):
            model: Soft = heed.create_model(f"soft_{size}")  # type: ignore[assignment]
        ours = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append([f"{size}, 10^6 parameters", "the authors' code", authors, ours, authors / ours])
    return rows


def pseudo_inverse(a: Tensor) -> Tensor:
    identity = torch.eye(a.shape[-1])
    z = a.mT / (a.abs().sum(-1).amax() * a.abs().sum(-2).amax())
    for _ in range(6):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z


class NystromSoftmax(PatternAttention):
    """The linearisation SOFT argues against: softmax attention through averaged landmarks, softmax(q L_k^T)
    pinv(softmax(L_q L_k^T)) softmax(L_q k^T) v, the inverse by their six iterations (Xiong et al., AAAI 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, _ = x.shape
        q, k, v = self.qkv(x).view(batch, rows * columns, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = q * self.scale

        def landmarks(tokens: Tensor) -> Tensor:
            grid = tokens.reshape(-1, rows, columns, self.head_dim).permute(0, 3, 1, 2)
            return F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:2])

        few_q, few_k = landmarks(q), landmarks(k)
        weights = [(a @ b.mT).softmax(-1) for a, b in ((q, few_k), (few_q, few_k), (few_q, k))]
        y = weights[0] @ (pseudo_inverse(weights[1]) @ (weights[2] @ v))
        return self.proj(y.transpose(1, 2).reshape(x.shape))


def accuracy(attention: type[nn.Module] | str, seed: int, epochs: int = 15) -> float:
    """Test accuracy on scikit-learn's digits of a ViT of two blocks on 8 x 8 tokens."""
    torch.manual_seed(seed)
    layer = attention if isinstance(attention, str) else "softmax"
    model = heed.create_model("vit_micro", patch_size=1, depth=2, attention=layer)
    if not isinstance(attention, str):
        for block in model.blocks:  # type: ignore[union-attr]
            block.attn = attention(64, 4)
    return digits_accuracy(model, epochs, 3e-3, clip=1.0)


def learned(seeds: int) -> list[list[object]]:
    kinds = {"softmax attention": "softmax", "Nyström softmax": NystromSoftmax, "SOFT": "soft"}
    mean = {name: float(np.mean([accuracy(kind, seed) for seed in range(seeds)])) for name, kind in kinds.items()}
    own = mean.pop("SOFT")
    return [[f"digits, test accuracy, {seeds} seeds", name, value, own, own / value] for name, value in mean.items()]


def main() -> None:
    given = options(__doc__, seeds=2)
    rows = speed(given.repeats) + growth(given.repeats) + memory() + sizes() + learned(given.seeds)
    report("SOFT: attention without softmax", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

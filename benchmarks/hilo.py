"""HiLo attention against dense, spatial-reduction and local-window attention: time, multiply-adds, memory for training.

    python benchmarks/hilo.py [--threads 1 2] [--repeats 11] [--out docs/benchmarks/hilo.json]

The paper claims 1.4 times the speed of spatial-reduction attention and 1.6 times that of 7x7 windows on a CPU, at
384 channels, 12 heads, 14x14 tokens, batch 16. All layers run PyTorch's scaled_dot_product_attention and take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import interleaved, report
from heed.layers.hilo import HiLoAttention

DIM, HEADS = 384, 12
SHAPES = ((16, 14), (1, 28), (1, 56))  # batch, side
COLUMNS = [
    "tokens",
    "threads",
    "layer",
    "forward ms",
    "HiLo 0.9 is faster by",
    "M multiply-adds",
    "MiB kept for backward",
]


class Dense(nn.Module):
    """Multi-head self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        q, k, v = self.qkv(tokens).view(*tokens.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def flops(self, side: int) -> int:
        return 4 * side**2 * DIM**2 + 2 * side**4 * DIM


class Windows(Dense):
    """Multi-head self-attention inside windows of 7x7, without shift or bias."""

    size = 7

    def forward(self, x: Tensor) -> Tensor:
        batch, side, s = x.shape[0], x.shape[1], self.size
        windows = x.view(batch, side // s, s, side // s, s, DIM).transpose(2, 3)
        y = super().forward(windows.reshape(-1, s, s, DIM)).view(windows.shape)
        return y.transpose(2, 3).reshape(x.shape)

    def flops(self, side: int) -> int:
        return 4 * side**2 * DIM**2 + 2 * side**2 * self.size**2 * DIM


class SpatialReduction(nn.Module):
    """Keys and values from a strided convolution with LayerNorm (PVT, Wang et al., ICCV 2021), reduction 2."""

    ratio = 2

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, DIM)
        self.reduce = nn.Conv2d(DIM, DIM, self.ratio, self.ratio)
        self.norm = nn.LayerNorm(DIM)
        self.kv = nn.Linear(DIM, 2 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q = self.q(x).view(batch, -1, HEADS, DIM // HEADS).transpose(1, 2)
        reduced = self.norm(self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = self.kv(reduced).view(batch, -1, 2, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def flops(self, side: int) -> int:
        keys = (side // self.ratio) ** 2
        return side**2 * DIM**2 * 3 + keys * DIM**2 * 2 + 2 * side**2 * keys * DIM


def kept_for_backward(layer: nn.Module, x: Tensor) -> float:
    """MiB of activations that the forward pass keeps for the backward pass; weights are not counted."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.requires_grad_())
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own) / 2**20


def call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "dense": Dense(),
        "spatial reduction 2": SpatialReduction(),
        "windows 7x7": Windows(),
        "HiLo 0.5": HiLoAttention(DIM, HEADS, qkv_bias=True, window_size=2, alpha=0.5),
        "HiLo 0.9": HiLoAttention(DIM, HEADS, qkv_bias=True, window_size=2, alpha=0.9),
    }
    rows: list[list[object]] = []
    for batch, side in SHAPES:
        x = torch.randn(batch, side, side, DIM, device=options.device)
        for threads in options.threads:
            torch.set_num_threads(threads)
            runs = {name: call(layer.to(options.device).eval(), x) for name, layer in layers.items()}
            times = interleaved(runs, repeats=options.repeats, warmup=3)
            for name, layer in layers.items():
                flops = layer.flops(side, side) if isinstance(layer, HiLoAttention) else layer.flops(side)  # type: ignore[operator]
                memory = kept_for_backward(layer, x.clone())
                faster = times[name] / times["HiLo 0.9"]
                rows.append([f"{batch} x {side}x{side}", threads, name, times[name] * 1e3, faster, flops / 1e6, memory])
    report("HiLo attention, 384 channels, 12 heads, window 2, float32", COLUMNS, rows, options.out)


if __name__ == "__main__":
    main()

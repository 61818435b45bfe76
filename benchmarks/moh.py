"""Mixture-of-Head attention: computing the chosen (token, head) pairs alone against computing all heads.

    python benchmarks/moh.py [--threads 2] [--repeats 9] [--device cpu] [--out docs/benchmarks/moh.json]

The paper says that tokens need 50 to 90 % of the heads; the authors' code computes all heads and multiplies by the gates.
"core" is attention and gates without projections, "layer" the whole of it; both against all heads by PyTorch's
scaled_dot_product_attention. "automatic" is what the layer does when left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from common import interleaved, report
from heed.layers.moh import MoHAttention, attend_gated
from heed.layers.routed_heads import gathering_pays

DIMS, HEADS = (384, 768), 12
ACTIVE = {92: (5, 6), 75: (5, 4), 50: (3, 3)}  # percent of the heads: shared, routed
TOKENS = (256, 512, 1024, 2048, 4096)
COLUMNS = ["channels", "tokens", "active %", "core", "core, training", "layer", "layer, training", "automatic"]


def core(layer: MoHAttention, x: Tensor, gather: bool, train: bool) -> Callable[[], object]:
    """Attention of projected tokens, without or with its backward pass."""
    with torch.no_grad():
        qkv = [part.clone() for part in layer.project(x)]
        routing = layer.router(x)

    def run() -> object:
        with torch.set_grad_enabled(train):
            q, k, v = (part.detach().requires_grad_(train) for part in qkv)
            y = attend_gated(q, k, v, routing, layer.router.active, gather=gather)
            return y.sum().backward() if train else y

    return run


def whole(layer: MoHAttention, x: Tensor, gather: bool, train: bool) -> Callable[[], object]:
    """The layer, without or with its backward pass."""

    def run() -> object:
        layer.gather = gather
        with torch.set_grad_enabled(train):
            y = layer(x.detach().requires_grad_(train))
            return y.sum().backward() if train else y

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[list[object]] = []
    for dim, tokens in product(DIMS, options.tokens):
        x = torch.randn(1, tokens, dim, device=options.device)
        for percent, (shared, routed) in ACTIVE.items():
            layer = MoHAttention(dim, HEADS, shared=shared, routed=routed).to(options.device)
            gains = []
            for build in (core, whole):
                for train in (False, True):
                    runs = {str(gather): build(layer, x, gather, train) for gather in (True, False)}
                    times = interleaved(runs, repeats=options.repeats)
                    gains.append(times["False"] / times["True"])
            chosen = "gathers" if gathering_pays(tokens, HEADS, shared + routed, x.device) else "all heads"
            rows.append([dim, tokens, percent, *gains, chosen])
    title = f"Mixture-of-Head attention, {HEADS} heads, float32: times faster than all heads"
    report(title, COLUMNS, rows, options.out)


if __name__ == "__main__":
    main()

"""The engine against dense attention: every figure is a ratio of medians measured in turns in one run.

python benchmarks/engine.py [--threads 2] [--repeats 7] [--out docs/benchmarks/engine.json] [--only window,...]
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import heed
from common import interleaved, report
from heed.engine.pattern import Pattern
from heed.engine.patterns import Causal, Neighborhood, Selected, Window
from heed.engine.planner import _static_plan, plan_for

COLUMNS = ["case", "baseline ms", "heed ms", "ratio", "must reach", "aim", "plan ms"]


def tensors(batch: int, heads: int, tokens: int, width: int, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, width, generator=generator).requires_grad_(grad) for _ in range(3)]


def forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def both(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    upstream = torch.ones_like(inputs[0])
    return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)


def plan_seconds(pattern: Pattern, tokens: int) -> float:
    """Building a plan from nothing, median of 5."""
    seconds = []
    for _ in range(5):
        _static_plan.forget()
        begin = time.perf_counter()
        plan_for(pattern, tokens, tokens, torch.device("cpu"))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def against_dense(
    name: str,
    pattern: Pattern,
    shape: tuple[int, int, int, int],
    must: float,
    aim: float,
    repeats: int,
    *,
    backward: bool = False,
    causal: bool = False,
) -> list[object]:
    inputs = tensors(*shape, grad=backward)
    measure = both if backward else forward
    tiled = measure(lambda q, k, v: heed.attend(q, k, v, pattern, backend="tiled"), inputs)
    dense = measure(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), inputs)
    planning = plan_seconds(pattern, shape[2]) if pattern.static else math.nan
    seconds = interleaved({"dense": dense, "heed": tiled}, repeats)
    ratio = seconds["dense"] / seconds["heed"]
    return [name, seconds["dense"] * 1e3, seconds["heed"] * 1e3, ratio, must, aim, planning * 1e3]


def random_blocks(heads: int, blocks: int, share: float) -> Selected:
    """Each query block visits a random `share` of the key blocks, per head."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(1, heads, blocks, blocks, generator=generator).argsort(-1)
    return Selected(order[..., : round(share * blocks)], (64, 64))


def growth(repeats: int) -> list[object]:
    """Exponent of time in tokens from 4,096 to 65,536."""
    lengths = (4096, 8192, 16384, 32768, 65536)
    functions = {
        str(n): forward(lambda q, k, v: heed.attend(q, k, v, Window(128), backend="tiled"), tensors(1, 4, n, 64))
        for n in lengths
    }
    seconds = interleaved(functions, repeats)
    x = torch.tensor([math.log(n) for n in lengths])
    y = torch.tensor([math.log(seconds[str(n)]) for n in lengths])
    x, y = x - x.mean(), y - y.mean()
    exponent = float((x * y).sum() / (x * x).sum())
    return ["growth exponent, Window(128), 4,096 to 65,536", math.nan, math.nan, exponent, 1.15, 1.0, math.nan]


def memory() -> list[object]:
    """Peak extra memory over q, k, v and out at 65,536 tokens, in units of their bytes, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True)
    return [
        "peak extra memory / (q, k, v, out), Window(128), 65,536",
        math.nan,
        math.nan,
        float(done.stdout),
        3.0,
        1.0,
        math.nan,
    ]


def measure_memory() -> float:
    inputs = tensors(1, 4, 65536, 64)
    size = 4 * inputs[0].numel() * 4
    with torch.no_grad():
        heed.attend(*(t[:, :, :4096] for t in inputs), Window(128), backend="tiled")  # libraries and their buffers
        plan_for(Window(128), 65536, 65536, torch.device("cpu"))
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        heed.attend(*inputs, Window(128), backend="tiled")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - held - size / 4) / size  # out is one quarter


def against_flex(name: str, pattern: Pattern, shape: tuple[int, int, int, int], repeats: int) -> list[object]:
    inputs = tensors(*shape)
    functions = {
        backend: forward(lambda q, k, v, b=backend: heed.attend(q, k, v, pattern, backend=b), inputs)
        for backend in ("flex", "tiled")
    }
    seconds = interleaved(functions, repeats, warmup=3)
    ratio = seconds["flex"] / seconds["tiled"]
    return [f"{name}, against compiled flex", seconds["flex"] * 1e3, seconds["tiled"] * 1e3, ratio, 0.9, 1.5, math.nan]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", default="", help="comma-separated parts of case names")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(measure_memory())
        return
    r = args.repeats
    line, long = (1, 4, 4096, 64), (1, 4, 16384, 64)
    near, far = Neighborhood((56, 56), 7), Neighborhood((128, 128), 13)
    blocks = random_blocks(4, 256, 0.1)
    cases: dict[str, Callable[[str], list[object]]] = {
        "Window(128), 4,096, forward": lambda c: against_dense(c, Window(128), line, 4, 8, r),
        "Window(128), 4,096, forward + backward": lambda c: against_dense(c, Window(128), line, 4, 8, r, backward=True),
        "Window(256), 16,384, forward": lambda c: against_dense(c, Window(256), long, 12, 20, r),
        "Causal() & Window(256), 16,384, forward": lambda c: against_dense(
            c, Causal() & Window(256), long, 8, 15, r, causal=True
        ),
        "Neighborhood 7x7 on 56x56, forward": lambda c: against_dense(c, near, (2, 2, 3136, 32), 2, 6, r),
        "Neighborhood 7x7 on 56x56, forward + backward": lambda c: against_dense(
            c, near, (2, 2, 3136, 32), 2, 6, r, backward=True
        ),
        "Neighborhood 13x13 on 128x128, forward": lambda c: against_dense(c, far, (1, 4, 16384, 32), 10, 25, r),
        "Selected 10 % of 64x64 blocks, 16,384, forward": lambda c: against_dense(c, blocks, long, 3.5, 7, r),
        "Selected 10 % of 64x64 blocks, 16,384, forward + backward": lambda c: against_dense(
            c, blocks, long, 3, 6, r, backward=True
        ),
        "growth exponent": lambda _: growth(r),
        "peak memory": lambda _: memory(),
        "flex: Window(128), 4,096": lambda _: against_flex("Window(128), 4,096", Window(128), line, r),
        "flex: Causal() & Window(256), 16,384": lambda _: against_flex(
            "Causal() & Window(256), 16,384", Causal() & Window(256), long, r
        ),
        "flex: Neighborhood 7x7 on 56x56": lambda _: against_flex(
            "Neighborhood 7x7 on 56x56", near, (2, 2, 3136, 32), r
        ),
        "flex: Selected 10 %, 16,384": lambda _: against_flex("Selected 10 % of blocks, 16,384", blocks, long, r),
    }
    wanted = [part for part in args.only.split(",") if part]
    rows = [run(name) for name, run in cases.items() if not wanted or any(part in name for part in wanted)]
    report("heed's tiled backend", COLUMNS, rows, args.out)


if __name__ == "__main__":
    main()

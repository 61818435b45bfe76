"""Routing Transformer: work and time against dense attention as texts grow, and what routing heads add to local ones.

    python benchmarks/routing.py [--threads 1] [--repeats 5] [--steps 300] [--text FILE] [--out docs/benchmarks/routing.json]

"work": multiply-adds of one routing head of 64 channels with sqrt(T) clusters of sqrt(T) tokens, as PyTorch's counter finds
them in the matrix products; the paper claims growth with T^1.5. "time": 4 routing heads of 64 channels, causal, float32,
without relative positions, T / w clusters, with k-means, selection and scattering, against scaled_dot_product_attention
with is_causal. The card's figures for the PyTorch package are 1.06, 0.71 and 0.42 of dense time; "with relative" adds
learned positions.

"text": bits per byte of held-out text for small models trained here: local heads only, local and routing heads at nearly
the same parameters (routing adds centroids and tables), and one layer of each against three local layers. The text is
Python's own documentation of its language, `pydoc_data.topics`, or --text. "twice" reads 128 bytes two times, and the
second half is measured: it can be copied from beyond the local window. A full pass tells routing heads a little of what
follows, since later bytes compete for the places in a cluster; "step by step" decodes with caches, where nothing follows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common import interleaved, report
from heed.language.routing import RoutedHeads, RoutingConfig, RoutingSettings, RoutingTransformerLM

HEADS, WIDTH, LENGTH = 4, 64, 256
TIMES = ((2048, 32), (4096, 64), (8192, 80))
MIXED = RoutingConfig(
    dim=128, layers=2, ffn_dim=256, cluster_heads=2, local_heads=2, clusters=8, window=64, block=(16,), max_relative=64,
    length=LENGTH, dropout=0.0, initial_count=1.0, decay=0.99, share_qk=False,
)  # fmt: skip
LOCAL = dataclasses.replace(MIXED, cluster_heads=0, local_heads=4)
MODELS = {
    "local, 2 layers": LOCAL,
    "local and routing, 2 layers": MIXED,
    "the same, queries shared": dataclasses.replace(MIXED, share_qk=True),
    "local, then local and routing": dataclasses.replace(MIXED, skip_first=1),
    "local, 3 layers": dataclasses.replace(LOCAL, layers=3),
}


def heads_of(heads: int, tokens: int, window: int, clusters: int, *, relative: bool = False) -> RoutedHeads:
    settings = RoutingSettings(
        dim=heads * WIDTH, cluster_heads=heads, local_heads=0, clusters=clusters, window=window,
        relative=("cluster",) if relative else (), max_relative=tokens,
    )  # fmt: skip
    return RoutedHeads(settings, heads).eval()


def work(lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)) -> list[list[object]]:
    """Multiply-adds of one head, counted while it runs."""
    rows: list[list[object]] = []
    os.environ["HEED_BACKEND"] = "reference"  # its products are plain ones, which the counter knows
    for tokens in lengths:
        side = math.isqrt(tokens)
        q, k, v = (torch.randn(1, 1, tokens, WIDTH) for _ in range(3))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            heads_of(1, tokens, side, side)(q, k, v)
        found = counter.get_total_flops() / 2
        rows.append([tokens, side, found / 1e6, 2 * tokens**2 * WIDTH / 1e6, 2 * tokens**2 * WIDTH / found])
    del os.environ["HEED_BACKEND"]
    return rows


def times(repeats: int, device: str) -> list[list[object]]:
    """One row per length."""
    rows: list[list[object]] = []
    for tokens, window in TIMES:
        q, k, v = (torch.randn(1, HEADS, tokens, WIDTH, device=device) for _ in range(3))
        plain, placed = (
            heads_of(HEADS, tokens, window, tokens // window, relative=relative).to(device)
            for relative in (False, True)
        )
        runs: dict[str, Callable[[], object]] = {
            "dense": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "routing": lambda q=q, k=k, v=v, heads=plain: heads(q, k, v),
            "relative": lambda q=q, k=k, v=v, heads=placed: heads(q, k, v),
        }
        with torch.inference_mode():
            taken = interleaved(runs, repeats=repeats)
        dense, routing, relative = (taken[name] for name in ("dense", "routing", "relative"))
        rows.append([tokens, window, dense * 1e3, routing * 1e3, routing / dense, relative / dense])
    return rows


def growth(rows: list[list[object]], column: int) -> float:
    """Slope of the logarithm over log tokens, from end to end."""
    (first, start), (last, end) = ((float(row[0]), float(row[column])) for row in (rows[0], rows[-1]))  # type: ignore[arg-type]
    return math.log(end / start) / math.log(last / first)


def batches(data: Tensor, rows: int, twice: bool, generator: torch.Generator) -> Tensor:
    """(rows, LENGTH + 1) bytes from random places; twice: a half and the same again."""
    size = LENGTH // 2 if twice else LENGTH + 1
    first = torch.randint(len(data) - size, (rows, 1), generator=generator)
    found = data[first + torch.arange(size)]
    return torch.cat([found, found, found[:, :1]], 1) if twice else found


def bits(model: RoutingTransformerLM, ids: Tensor) -> Tensor:
    """(rows, LENGTH) bits of every byte after the first."""
    losses = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    return losses / math.log(2)


def stepped(model: RoutingTransformerLM, ids: Tensor) -> Tensor:
    """The same, with every byte's logits from a step that knows the bytes before only."""
    caches = model.caches()
    logits = torch.stack([model.step(column, caches) for column in ids[:, :-1].unbind(1)], 2)
    return F.cross_entropy(logits, ids[:, 1:], reduction="none") / math.log(2)


def learned(data: Tensor, twice: bool, steps: int, seeds: int) -> list[list[object]]:
    """Every model on the same batches."""
    train, test = data.tensor_split([len(data) * 9 // 10])
    rows: list[list[object]] = []
    for name, config in MODELS.items():
        scores, size = [], 0
        honest: list[float] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = RoutingTransformerLM(config)
            size = sum(p.numel() for p in model.parameters())
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(1, steps))
            generator = torch.Generator().manual_seed(seed)
            for _ in range(steps):
                loss = bits(model, batches(train, 8, twice, generator)).mean() + model.auxiliary_loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            held_out = batches(test, 64, twice, torch.Generator().manual_seed(1))
            with torch.no_grad():
                found = bits(model.eval(), held_out)
                honest.append(stepped(model, held_out)[:, LENGTH // 2 :].mean().item())
            scores.append(found[:, LENGTH // 2 :].mean().item())
        spread = (max(honest) - min(honest)) / 2
        rows.append(["twice" if twice else "once", name, size, sum(scores) / seeds, sum(honest) / seeds, spread])
    return rows


def text(path: Path | None) -> Tensor:
    """The bytes of a file (.gz is unpacked), or of Python's documentation of its language."""
    if path is None:
        from pydoc_data.topics import topics

        raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return torch.tensor(list(raw))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    counted = work()
    columns = ["tokens", "clusters = window", "routing M multiply-adds", "dense M", "dense / routing"]
    report("One routing head, width 64", columns, counted, None)
    timed = times(options.repeats, options.device)
    slopes = {
        "work": growth(counted, 2), "dense time": growth(timed, 2), "routing time": growth(timed, 3),
    }  # fmt: skip
    columns = ["tokens", "window", "dense ms", "routing ms", "routing / dense", "with relative / dense"]
    report("4 routing heads, width 64, causal, float32", columns, timed, None)
    print("growth, as a power of the tokens:", {name: round(value, 2) for name, value in slopes.items()})
    data = text(options.text)
    rows = [row for twice in (False, True) for row in learned(data, twice, options.steps, options.seeds)]
    extra = {"work": counted, "time": timed, "growth": slopes, "steps": options.steps, "seeds": options.seeds}
    columns = ["text", "model", "parameters", "bits per byte, full pass", "step by step", "spread of seeds"]
    report(
        f"Small models on {len(data)} bytes, {options.steps} steps of 8 x {LENGTH}", columns, rows, options.out, extra
    )


if __name__ == "__main__":
    main()

"""HiP attention: time against dense causal attention, how it grows, what it keeps, and what a language model loses by it.

    python benchmarks/hip.py [--threads 2] [--repeats 5] [--data FOLDER] [--out docs/benchmarks/hip.json]

"time": 4 heads of 64 channels, batch 1, float32, random; HiP whole, with its search, against scaled_dot_product_attention
with is_causal. "release" is the block size of the authors' first release, "head start" its dense queries at the beginning.
Dense attention is measured up to --dense tokens. "growth" is the slope of log time over log tokens, from end to end.

"kept": the share of dense attention's mass on the keys that 64 heads of width 32 see, and of needles found, among 8,192
smooth keys; a needle is the key that a query points at. "window" has as many keys, all but the sinks the last ones.

"text": perplexity of the second half of 512 characters that are 256 twice, for a model of two layers that is trained here
to read its own past. With --data, the text is tiny-shakespeare in that folder; without it, this file.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heed
from common import interleaved, report
from heed.language.hip import HiP, HiPBudget, dense_start, hip_attention, hip_cost, kept_mass, search_blocks

HEADS, WIDTH = 4, 64
SMALL = {"block_q": 32, "sinks": 4, "dense_layers": (), "dense_queries": 0}
HALF, STEPS = 256, 400


def times(tokens: list[int], dense: int, repeats: int, device: str) -> list[list[object]]:
    """One row per length."""
    rows: list[list[object]] = []
    budget, release = HiPBudget(), HiPBudget(block_q=32)
    for length in tokens:
        q, k, v = (torch.randn(1, HEADS, length, WIDTH, device=device) for _ in range(3))
        start = dense_start(length, length, budget.mask_k)

        runs: dict[str, Callable[[], object]] = {
            "HiP": lambda q=q, k=k, v=v: hip_attention(q, k, v, budget),
            "search": lambda q=q, k=k: search_blocks(q, k, budget),
            "release": lambda q=q, k=k, v=v: hip_attention(q, k, v, release),
            "head start": lambda q=q, k=k, v=v, start=start: hip_attention(q, k, v, budget, dense_queries=start),
        }
        if length <= dense:
            runs["dense"] = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with torch.inference_mode():
            taken = interleaved(runs, repeats=repeats, warmup=1)
        cost = hip_cost(length, budget)
        faster = [taken["dense"] / taken[name] if "dense" in taken else math.nan for name in ("HiP", "release")]
        columns = [taken.get(name, math.nan) * 1e3 for name in ("dense", "HiP", "search", "release", "head start")]
        rows.append([length, *columns, *faster, cost.dense / (cost.search + cost.attention)])
    return rows


def growth(rows: list[list[object]], column: int) -> float:
    """Slope of log milliseconds over log tokens, between the shortest and the longest that were measured."""
    points = [(float(row[0]), float(row[column])) for row in rows if not math.isnan(float(row[column]))]  # type: ignore[arg-type]
    (first, start), (last, end) = points[0], points[-1]
    return math.log(end / start) / math.log(last / first) if last > first else math.nan


def kept() -> list[list[object]]:
    """Mass and needles for keys of growing smoothness."""
    heads, tokens, width, queries = 64, 8192, 32, 64
    budgets = {"HiP": HiPBudget(), "HiP, release": HiPBudget(block_q=32), "window": HiPBudget(mask_k=2, window=638)}
    rows: list[list[object]] = []
    for smooth in (4, 16, 64):
        generator = torch.Generator().manual_seed(smooth)
        noise = torch.randn(heads, tokens + smooth, width, generator=generator).cumsum(1)
        k = ((noise[:, smooth:] - noise[:, :-smooth]) / smooth**0.5)[None]
        needle = torch.randint(1000, tokens - 1000, (heads,), generator=generator)
        at = k[0, torch.arange(heads), needle]
        q = 2 * at[None, :, None] + torch.randn(1, heads, queries, width, generator=generator)
        for name, budget in budgets.items():
            selection = search_blocks(q, k, budget)
            found = (selection.index[0, :, 0] == needle[:, None] // 2 * 2).any(-1).float().mean().item()
            rows.append([smooth // 2, name, kept_mass(q, k, selection).mean().item(), found])
    return rows


def text_rows(folder: Path | None) -> list[list[object]]:
    """Perplexities of one model: as it is, with HiP, and with a window of as many keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = Path(__file__).read_bytes() * 4
    if folder is not None:
        raw = gzip.decompress(next(folder.glob("*.gz")).read_bytes())
    symbols = torch.tensor(list(raw)).unique()
    data = torch.searchsorted(symbols, torch.tensor(list(raw)))
    train, test = data.tensor_split([len(data) * 9 // 10])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, STEPS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        loss = losses(model, twice(train, 8, generator)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    x = twice(test, 32, generator)
    rows: list[list[object]] = []
    with torch.no_grad():
        dense = losses(model, x)[:, HALF:].mean().exp().item()
        rows.append(["dense", 2 * HALF, dense, 1.0])
        for mask_k in (32, 64, 128):
            keys = 4 + mask_k + 32
            for name, method in (
                ("HiP", HiP(mask_k=mask_k, window=32, **SMALL)),  # type: ignore[arg-type]
                ("window", HiP(mask_k=2, window=mask_k + 30, **SMALL)),  # type: ignore[arg-type]
            ):
                with heed.apply(model, method):
                    perplexity = losses(model, x)[:, HALF:].mean().exp().item()
                rows.append([f"{name}, mask_k {mask_k}", keys, perplexity, perplexity / dense])
    return rows


def twice(data: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """(batch, 2 * HALF) pieces of a text, each followed by itself."""
    at = torch.randint(len(data) - HALF, (batch, 1), generator=generator)
    return data[at + torch.arange(HALF)].repeat(1, 2)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    """(B, N - 1) cross-entropy of every next character."""
    logits = model(x).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(len(x), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument(
        "--dense", type=int, default=32768, help="the longest prompt that dense attention is measured on"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--data", type=Path, help="folder with tiny-shakespeare, gzipped")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    columns = ["keys correlate 0.5 at", "keys seen", "mass kept", "needles found"]
    report("HiP attention: what it keeps of 8,192 keys, 672 per query", columns, kept_rows := kept(), None)
    columns_text = ["attention", "keys per query", "perplexity", "times that of dense"]
    report("HiP attention: a text said twice", columns_text, said := text_rows(options.data), None)
    rows = times(sorted(options.tokens), options.dense, options.repeats, options.device)
    names = ["dense ms", "HiP ms", "of it search ms", "release ms", "head start ms"]
    slopes = {name: growth(rows, i) for i, name in enumerate(names, 1)}
    report(
        f"HiP attention, {HEADS} heads of {WIDTH}, float32; growth: "
        + ", ".join(f"{name.removesuffix(' ms')} {slope:.2f}" for name, slope in slopes.items()),
        ["tokens", *names, "HiP faster by", "release faster by", "fewer products by"],
        rows,
        options.out,
        {
            "growth": slopes,
            "kept": [dict(zip(columns, row, strict=True)) for row in kept_rows],
            "text": [dict(zip(columns_text, row, strict=True)) for row in said],
        },
    )


if __name__ == "__main__":
    main()

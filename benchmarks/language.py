"""The language room in one table: sparse prompts, small caches, cheap training, generation; speed, memory and quality.

    python benchmarks/language.py [--threads 2] [--repeats 3] [--quick] [--out docs/benchmarks/language.json]

The parts are those of the systems' own scripts, which measure more: hip.py and seer.py (prompts), zipcache.py and razor.py
(caches), subsampled.py, sinklora.py, selective.py and moh.py (training), block_transformer.py (generation). Ratios are dense
over heed in time, full over compressed in memory, and heed over vanilla in tokens per second; "must reach" and "aim" are
what the project asks of itself. "quality" is `heed compare cache` on the small model that heed trains itself: perplexity
after a prompt, pass keys found, and how many times smaller the cache is.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

import block_transformer
import hip
import razor
import seer
import selective
import sinklora
import subsampled
import zipcache
from common import report
from heed.compare import CacheSettings, run

COLUMNS = ["part", "what", "baseline", "heed", "ratio", "must reach", "aim"]
Row = list[object]
PROMPT = 16_384  # tokens, 4 heads of 64


def prompts(repeats: int, longest: int) -> list[Row]:
    """Milliseconds of sparse attention over a long prompt beside dense causal attention, and how HiP's time grows."""
    lengths = [length for length in (4096, PROMPT, 65_536) if length <= longest]
    measured = hip.times(lengths, PROMPT, repeats, "cpu")
    rows: list[Row] = []
    for tokens, dense, own, *_ in measured:
        if not math.isnan(float(dense)):  # type: ignore[arg-type]
            need = (2.0, 4.0) if tokens == PROMPT else ("", "")
            rows.append(["prompt", f"HiP, {tokens} tokens, search included, ms", dense, own, dense / own, *need])  # type: ignore[operator]
    rows.append(
        ["prompt", f"HiP, exponent of time, {lengths[0]} to {lengths[-1]}", 2.0, hip.growth(measured, 2), "", 1.25, ""]
    )
    for tokens, density, dense, gate, sparse, faster in seer.times([min(PROMPT, longest)], repeats):
        need = (2.5, 5.0) if math.isclose(float(density), 0.1, abs_tol=0.02) else ("", "")  # type: ignore[arg-type]
        what = f"SeerAttention, {tokens} tokens, {density:.0%} of the blocks, gate included, ms"
        rows.append(["prompt", what, dense, gate + sparse, faster, *need])  # type: ignore[operator]
    return rows


def caches() -> list[Row]:
    """Bytes after 4,096 tokens in float16."""
    rows: list[Row] = []
    for what, ratio, _ in zipcache.memory():
        need = (4.9, "") if "ZipCache" in str(what) else ("", "")
        rows.append(["cache", f"{what}, 4096 tokens", 1.0, 1 / ratio, ratio, *need])  # type: ignore[operator]
    for what, heads, saved, _ in razor.memory():
        rows.append(["cache", f"Razor, {what}, {heads:.0%} of the heads, share saved", 0.0, saved, "", "", ""])
    return rows


def training(repeats: int) -> list[Row]:
    """Milliseconds of attention in training, beside dense attention."""
    rows: list[Row] = []
    for backward in (False, True):
        for kind, what, own, share, counted in subsampled.cost(4096, repeats, backward):
            if "dense" not in str(what):
                title = f"subsampled, {what}, {str(kind).removeprefix('cost, ')}, {counted:.1f} times fewer products"
                rows.append(["training", title, own / share, own, 1 / share, "", ""])  # type: ignore[operator]
    for name, pairs, forward, one, both, two in sinklora.costs(repeats):
        if name != "dense":
            for what, own, share in (("forward", forward, one), ("forward and backward", both, two)):
                title = f"{name}, layer of 4096 tokens, {pairs:.2f} of the scores, {what}, ms"
                rows.append(["training", title, own / share, own, 1 / share, "", ""])  # type: ignore[operator]
    for _, what, own, share in selective.cost(repeats):
        if not str(what).startswith("plain"):
            rows.append(["training", f"selective, {what}", own / share, own, 1 / share, "", ""])  # type: ignore[operator]
    return rows


def generation(quick: bool) -> list[Row]:
    """Tokens per second of a Block Transformer beside a vanilla decoder with as many parameters in its layers."""
    rows: list[Row] = []
    lengths, batches = ((128, 2048), (1,)) if quick else ((128, 1024, 2048), (1, 8, 32, 64))
    measured = block_transformer.throughput("5", 256, lengths, batches, torch.device("cpu"))
    for what, v_first, b_first, first, v_new, b_new, new in measured:
        need = ("", 10.0) if "2048 + 128" in str(what) else ("", "")
        if first != "":
            rows.append(["generation", f"Block Transformer, {what}, prompt tokens/s", v_first, b_first, first, "", ""])
        rows.append(["generation", f"Block Transformer, {what}, new tokens/s", v_new, b_new, new, *need])
    return rows


def quality(steps: int | None) -> list[Row]:
    """Every cache and sparse method on the model that heed trains itself."""
    with tempfile.TemporaryDirectory() as folder:
        settings = CacheSettings(out=folder, methods=METHODS, tiny_steps=steps, threads=torch.get_num_threads())
        found = {row.method: row for row in run(settings).methods}
    rows: list[Row] = []
    full = found["full"]
    for name, row in found.items():
        if row.status != "ok":
            raise RuntimeError(f"{name}: {row.error}")
        smaller = full.costs["bytes"] / row.costs["bytes"]  # type: ignore[operator]
        rows.append(
            [
                "quality",
                f"{name}: perplexity; times smaller",
                full.scores["perplexity"].mean,
                row.scores["perplexity"].mean,
                smaller,
                "",
                "",
            ]
        )
        rows.append(
            ["quality", f"{name}: pass keys found", full.scores["found"].mean, row.scores["found"].mean, "", "", ""]
        )
    return rows


METHODS = ("full", "zipcache", "razor", "razor-zipcache", "h2o", "recent", "hip", "seer", "window")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="short prompts, one batch size, a model hardly trained")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rows = prompts(given.repeats, 4096 if given.quick else 65_536)
    rows += caches()
    rows += training(given.repeats)
    rows += generation(given.quick)
    rows += quality(20 if given.quick else None)
    report("The language room", COLUMNS, rows, given.out)


if __name__ == "__main__":
    main()

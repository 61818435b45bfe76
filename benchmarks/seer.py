"""SeerAttention: time against dense causal attention, what the gate costs, and what learned blocks are worth to a small LM.

    python benchmarks/seer.py [--threads 2] [--repeats 5] [--text FILE] [--out docs/benchmarks/seer.json]

"time": 4 heads of 64 channels, batch 1, float32, random. The gate scores blocks of 64, a threshold keeps a share of the
causal ones (so that rows differ in how many they visit), and attention visits those; "faster" counts gate and choice.
Dense is scaled_dot_product_attention with is_causal. "slope" is that of milliseconds over density, as a share of dense:
1 where a block costs what it costs dense attention. "gate": 4,096 tokens, 8 query and 2 key heads of 128, one thread.

"text": a Llama of two layers that is trained here on bytes of text; its gates learn from its attention (blocks of 16, 512
tokens). At half of the causal blocks: perplexity, and recall, the share of the pooled true map on the visited blocks.
"sink + window" visits the first block and the last ones, "pooled q.k" the best by the product of mean queries and keys,
both as many blocks per row as the gate. --text is a file; without it, the topics of Python's help.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import heed
from common import interleaved, report
from heed.data.text import TOPICS, load_text
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, repeat_heads
from heed.language.seer import (
    AttnGate,
    BlockChoice,
    GateDistillation,
    GateSettings,
    SeerAttention,
    SeerGates,
    block_sparse_attention,
    distill,
    pool_blocks,
    pooled_truth,
)
from heed.language.spans import Span
from heed.language.sparse import SpanRule
from heed.language.tiny import as_tokens, tiny_model, train_tiny
from heed.methods import Handle, Method

HEADS, WIDTH, BLOCK = 4, 64, 64
SHARES = (0.5, 0.25, 0.1, 0.05)
SMALL, CONTEXT = 16, 512
Choose = Callable[[AttentionCall, Span], Tensor]


def times(lengths: list[int], repeats: int) -> list[list[object]]:
    """One row per length and share of blocks."""
    rows: list[list[object]] = []
    for tokens in lengths:
        q, k, v = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3))
        gate = AttnGate(HEADS, HEADS, WIDTH, BLOCK, std=0.2)
        tables = rotary(tokens)
        with torch.inference_mode():
            scores = gate(q, k, tables)
            choices = {share: threshold(scores, share) for share in SHARES}
            blocks = {share: choice.of_prompt(scores) for share, choice in choices.items()}
            runs: dict[str, Callable[[], object]] = {
                "dense": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                "gate": lambda q=q, k=k, g=gate, t=tables, c=choices[0.1]: c.of_prompt(g(q, k, t)),
            }
            for share in SHARES:
                runs[str(share)] = lambda q=q, k=k, v=v, b=blocks[share]: block_sparse_attention(q, k, v, b, BLOCK)
            taken = {name: seconds * 1e3 for name, seconds in interleaved(runs, repeats=repeats, warmup=1).items()}
        for share in SHARES:
            kept = density(blocks[share])
            whole = taken[str(share)] + taken["gate"]
            rows.append([tokens, kept, taken["dense"], taken["gate"], taken[str(share)], taken["dense"] / whole])
    return rows


def rotary(tokens: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Tables (1, blocks, width) at the first token of every block."""
    angles = torch.arange(0, tokens, BLOCK)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


def threshold(scores: Tensor, share: float) -> BlockChoice:
    """The threshold that keeps a share of the causal blocks."""
    shares = scores.softmax(-1)
    causal = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    return BlockChoice("threshold", shares[:, :, causal].quantile(1 - share).item(), last_dense=False)


def density(blocks: Tensor) -> float:
    """Of the causal blocks."""
    size = blocks.shape[-1]
    return blocks.sum().item() / (blocks.shape[0] * blocks.shape[1] * size * (size + 1) / 2)


def slope(rows: list[list[Any]], tokens: int) -> float:
    """Least squares of time over density at one length, as a share of dense attention's time."""
    points = torch.tensor([[row[1], row[4] / row[2]] for row in rows if row[0] == tokens], dtype=torch.float64)
    x, y = (points - points.mean(0)).T
    return ((x * y).sum() / x.square().sum()).item()


def overhead(repeats: int) -> tuple[float, float]:
    """Milliseconds of dense attention and of the gate, as the card has it."""
    q, k = torch.randn(1, 8, 4096, 128), torch.randn(1, 2, 4096, 128)
    gate, tables = AttnGate(8, 2, 128), rotary(4096, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        dense = repeat_heads(k, 8)
        taken = interleaved(
            {
                "dense": lambda: F.scaled_dot_product_attention(q, dense, dense, is_causal=True),
                "gate": lambda: gate(q, k, tables),
            },
            repeats=repeats,
            warmup=1,
        )
    torch.set_num_threads(threads)
    return taken["dense"] * 1e3, taken["gate"] * 1e3


class _Chosen(Method):
    """Attention over blocks that a function chooses, and how much of the true map is on them."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose

    def attach(self, host: Any, handle: Handle) -> list[float]:
        recall: list[float] = []
        attach_rule(host, _ChosenRule(self.choose, recall), handle)
        return recall


class _ChosenRule(SpanRule):
    def __init__(self, choose: Choose, recall: list[float]) -> None:
        super().__init__()
        self.choose, self.recall = choose, recall

    def attend(self, call: AttentionCall, span: Span) -> Tensor:
        blocks = self.choose(call, span)
        truth, _ = pooled_truth(call.query, call.key, block=SMALL, scale=call.scale)
        self.recall.append((truth * blocks).sum(-1).mean().item())
        return block_sparse_attention(call.query, call.key, call.value, blocks, SMALL, scale=call.scale)


def sink_and_window(choice: BlockChoice) -> Choose:
    def choose(call: AttentionCall, span: Span) -> Tensor:
        size = -(-call.query.shape[2] // SMALL)
        rows, columns = torch.arange(size)[:, None], torch.arange(size)
        scores = (columns == 0) * 2.0 * size - (rows - columns)
        return choice.of_prompt(causal(scores.expand(*call.query.shape[:2], -1, -1)))

    return choose


def pooled_products(choice: BlockChoice) -> Choose:
    def choose(call: AttentionCall, span: Span) -> Tensor:
        q, k = (pool_blocks(x, ["avg"], SMALL) for x in (call.query, repeat_heads(call.key, call.query.shape[1])))
        return choice.of_prompt(causal(q @ k.mT * call.scale))

    return choose


def causal(scores: Tensor) -> Tensor:
    return scores.float().masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), torch.finfo(torch.float32).min)


def gate_recall(model: Any, gates: SeerGates, choice: BlockChoice, ids: Tensor) -> float:
    """Share of the model's own pooled map on the blocks that the gates choose, while the model is dense."""
    with torch.no_grad(), heed.apply(model, GateDistillation(gates)) as handle:
        handle.state.keep = True
        model(ids)
    scores, truths = handle.state.scores, handle.state.truths
    shares = [(truths[layer] * choice.of_prompt(scores[layer])).sum(-1).mean().item() for layer in scores]
    return sum(shares) / len(shares)


def text_rows(source: str, steps: int, gate_steps: int) -> tuple[list[list[object]], dict[str, object]]:
    """Perplexities and recalls at half density, and what else was measured on the way."""
    data = load_text(source)
    model = tiny_model()
    train_tiny(model, data.train, steps=steps)
    generator = torch.Generator().manual_seed(0)
    learn, test = as_tokens(data.train), as_tokens(data.test)
    unseen = test[: len(test) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:48]
    gates = SeerGates(model, GateSettings(block=SMALL), generator=generator)
    half = BlockChoice("nz_ratio", 0.5, last_dense=False)
    before = gate_recall(model, gates, half, unseen)

    def batches() -> Any:
        while True:
            at = torch.randint(len(learn) - CONTEXT, (4, 1), generator=generator)
            yield learn[at + torch.arange(CONTEXT)]

    begin = time.perf_counter()
    losses = distill(model, gates, batches(), steps=gate_steps, lr=1e-2)
    seconds = time.perf_counter() - begin
    after = gate_recall(model, gates, half, unseen)

    dense = perplexity(model, unseen)
    rows: list[list[object]] = [["dense", 1.0, dense, 1.0, 1.0]]
    with heed.apply(model, SeerAttention(gates, half)) as handle:
        value = perplexity(model, unseen)
        rows.append(["learned gate", handle.state.density().mean().item(), value, value / dense, after])
        kept = []
        for limit in (-1.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32):
            handle.state.choice = BlockChoice("threshold", limit, last_dense=False)
            value = perplexity(model, unseen)
            kept.append({"threshold": limit, "density": handle.state.density().mean().item(), "perplexity": value})
    for name, choose in (("sink + window", sink_and_window(half)), ("pooled q.k", pooled_products(half))):
        with heed.apply(model, _Chosen(choose)) as handle:
            value = perplexity(model, unseen)
            rows.append([name, rows[1][1], value, value / dense, sum(handle.state) / len(handle.state)])
    with heed.apply(model, SeerAttention(SeerGates(model, GateSettings(block=SMALL), generator=generator), half)):
        value = perplexity(model, unseen)
        rows.append(["gate before it learns", rows[1][1], value, value / dense, before])
    extra = {"loss": [losses[0], losses[-1]], "distillation_seconds": seconds, "one gate, any density": kept}
    return rows, extra


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    logits = model(ids, use_cache=False).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--steps", type=int, default=600, help="that the language model is trained")
    parser.add_argument("--gate-steps", type=int, default=300)
    parser.add_argument("--text", default=TOPICS, help="a file of text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    columns = ["attention", "density", "perplexity", "times dense", "recall"]
    said, extra = text_rows(options.text, options.steps, options.gate_steps)
    report(f"SeerAttention: {CONTEXT} bytes of text, blocks of {SMALL}, half of the causal ones", columns, said, None)
    dense, gate = overhead(options.repeats)
    lengths = sorted(options.tokens)
    rows = times(lengths, options.repeats)
    slopes = {tokens: slope(rows, tokens) for tokens in lengths}
    report(
        f"SeerAttention, {HEADS} heads of {WIDTH}, float32; gate over dense attention, one thread: {gate / dense:.3f}; "
        "slope " + ", ".join(f"{tokens}: {value:.2f}" for tokens, value in slopes.items()),
        ["tokens", "density", "dense ms", "gate ms", "sparse ms", "faster by"],
        rows,
        options.out,
        {
            "slopes": slopes,
            "gate over dense, one thread": gate / dense,
            "text": [dict(zip(columns, row, strict=True)) for row in said],
            **extra,
        },
    )


if __name__ == "__main__":
    main()

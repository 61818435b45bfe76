"""SinkLoRA and H2O: what the patterns cost, what fine-tuning with them is worth, and which tokens a small cache should keep.

    python benchmarks/sinklora.py [--threads 1] [--repeats 5] [--text FILE] [--seeds 2] [--out docs/benchmarks/sinklora.json]

"cost": scores per head of S2-Attn and SF-Attn over those of dense causal attention, and the time of a layer, projections
included, of 4,096 tokens and 8 heads of 64 channels in float32. "authors" is LongLoRA's layer without flash attention, which
forms the scores of every group; the card has it at 1.8 of a dense layer, and at 0.73 with fused attention in segments.

"fine-tuning" (with --text): a character model of three layers, trained at 256 characters, gets four times the context by
interpolated positions and LoRA with embeddings and norms, under each pattern, and is evaluated with full attention.
"share" is the part of full attention's improvement over no fine-tuning, on the logarithm of the perplexity.

"H2O" (with --text): how often the next token that a model finds likeliest is the one it finds with the whole cache, while it
reads the second part of a window token by token. "characters" is the model fine-tuned above with full attention, "words" one
over the 2,000 commonest words of the text, trained here. "divergence" is that of the two distributions, in nats.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import heed
from common import interleaved, report
from heed.language.h2o import H2O
from heed.language.perplexity import perplexity_by_length
from heed.language.sinklora import (
    HeadGroups,
    LoRARecipe,
    S2Attention,
    SFAttention,
    extended_config,
    grouped_attention,
    visible_pairs,
)

TOKENS, HEADS, WIDTH = 4096, 8, 64
SHORT, LONG = 256, 1024
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
KINDS = {
    "S2-Attn": HeadGroups(),
    "S2-Attn, rolled": HeadGroups(wrap=True),
    "SF-Attn": HeadGroups(returned=0.5, sinks=4),
}
PATTERNS: dict[str, S2Attention | None] = {
    "full attention": None,
    "SF-Attn": SFAttention(),
    "S2-Attn with sinks": S2Attention(sinks=4),
    "S2-Attn, half returned": S2Attention(returned=0.5),
    "S2-Attn": S2Attention(),
    "S2-Attn, rolled": S2Attention(wrap=True),
}


def costs(repeats: int) -> list[list[object]]:
    x = torch.randn(1, TOKENS, HEADS * WIDTH)
    weights = torch.randn(4, HEADS * WIDTH, HEADS * WIDTH) * 0.04

    def layer(mix: Callable[[Tensor, Tensor, Tensor], Tensor], grad: bool) -> Callable[[], object]:
        def run() -> object:
            own = weights.clone().requires_grad_(grad)
            with nullcontext() if grad else torch.no_grad():
                q, k, v = (F.linear(x, w).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for w in own[:3])
                out = F.linear(mix(q, k, v).transpose(1, 2).flatten(2), own[3])
            return torch.autograd.grad(out.sum(), own) if grad else out

        return run

    mixes: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "dense": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "authors": unfused,
        **{name: lambda q, k, v, groups=groups: grouped_attention(q, k, v, groups) for name, groups in KINDS.items()},
    }
    times = [
        interleaved({name: layer(mix, grad) for name, mix in mixes.items()}, repeats=repeats, warmup=1)
        for grad in (False, True)
    ]
    dense = HEADS * TOKENS * (TOKENS + 1) / 2
    pairs = {name: sum(visible_pairs(groups, HEADS, TOKENS)) / dense for name, groups in KINDS.items()}
    pairs |= {"dense": 1.0, "authors": HEADS * TOKENS * (TOKENS // 4) / dense}  # those that it masks, too
    return [
        [name, pairs[name], *(x for run in times for x in (1e3 * run[name], run[name] / run["dense"]))]
        for name in mixes
    ]


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S2-Attn with rolled heads and all scores of a group at once."""
    size = TOKENS // 4
    still, moved = slice(0, HEADS // 2), slice(HEADS // 2, HEADS)

    def grouped(x: Tensor) -> Tensor:
        x = torch.cat([x[:, still], x[:, moved].roll(-size // 2, 2)], 1)
        return x.unflatten(2, (4, size)).transpose(1, 2).flatten(0, 1)

    q, k, v = grouped(q), grouped(k), grouped(v)
    mask = torch.full((size, size), torch.finfo(q.dtype).min).triu(1)
    weights = (q @ k.transpose(2, 3) / WIDTH**0.5 + mask).softmax(-1, dtype=torch.float32)
    out = (weights @ v).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2, 3)
    return torch.cat([out[:, still], out[:, moved].roll(size // 2, 2)], 1)


def trained(model: Any, ids: Tensor, steps: int, length: int, batch: int, rate: float, seed: int) -> None:
    """Steps of AdamW, one cycle, on windows of the text."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - length, (batch,), generator=generator).tolist()
        window = torch.stack([ids[start : start + length] for start in starts])
        optimiser.zero_grad()
        model(input_ids=window, labels=window, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def read(path: Path, words: bool = False) -> tuple[Tensor, Tensor, int]:
    """Characters or words of a text to train on, those to evaluate on, and how many kinds there are."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    parts: list[Any] = raw.split() if words else list(raw)
    number = {part: i + 1 for i, (part, _) in enumerate(Counter(parts).most_common(2000))}  # 0 for all others
    ids = torch.tensor([number.get(part, 0) for part in parts])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:][: 24 * LONG], len(number) + 1


def fine_tuning(given: argparse.Namespace) -> tuple[list[list[object]], Any, Tensor]:
    """One row per pattern; the model that was fine-tuned with full attention, and the text it is evaluated on."""
    train, test, kinds = read(given.text)
    config = LlamaConfig(vocab_size=kinds, max_position_embeddings=SHORT, **SIZES)
    torch.manual_seed(0)
    start = LlamaForCausalLM(config)
    trained(start, train, given.steps, SHORT, 16, 4e-3, 0)
    longer = LlamaForCausalLM(extended_config(config, LONG))

    def perplexity(model: Any) -> float:
        return perplexity_by_length(model, test, [LONG], stride=LONG // 2, batch=4)[LONG]

    longer.load_state_dict(start.state_dict())
    before, found, best = perplexity(longer), {name: [] for name in PATTERNS}, None
    for seed in range(given.seeds):
        for name, method in PATTERNS.items():
            longer = LlamaForCausalLM(extended_config(config, LONG))
            longer.load_state_dict(start.state_dict())
            torch.manual_seed(seed)
            adapted = LoRARecipe().prepare(longer)
            with nullcontext() if method is None else heed.apply(adapted, method):
                trained(adapted, train, given.tune, LONG, 2, 2e-3, seed + 1)
            found[name].append(perplexity(adapted))
            best = adapted if method is None else best
    short = perplexity_by_length(start, test, [SHORT], stride=SHORT // 2, batch=16)[SHORT]
    rows: list[list[object]] = [
        [f"at {SHORT}, before", short, math.nan, math.nan],
        ["interpolated", before, math.nan, 0.0],
    ]
    gain = math.log(before) - math.log(statistics.mean(found["full attention"]))
    for name, values in found.items():
        mean = statistics.mean(values)
        spread = max(values) - min(values)
        rows.append([name, mean, spread, (math.log(before) - math.log(mean)) / gain])
    assert best is not None  # there is a pattern without a method
    return rows, best.merge_and_unload(), test


def word_model(given: argparse.Namespace) -> tuple[Any, Tensor]:
    train, test, kinds = read(given.text, words=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=kinds, **SIZES))
    trained(model, train, given.steps // 3, 384, 8, 4e-3, 0)
    return model, test


@torch.no_grad()
def agreement(tokens: str, model: Any, test: Tensor, prompt: int, length: int) -> list[list[object]]:
    """One row per cache: perplexity, agreement with the whole cache and divergence from it, and times smaller."""
    windows = test[: len(test) // length * length].view(-1, length)[:16]
    methods: dict[str, H2O | None] = {"whole": None}
    for budget in (0.5, 0.2, 0.1):
        methods[f"H2O, {budget:.0%}"] = H2O(heavy=budget / 2, recent=budget / 2)
        methods[f"recent only, {budget:.0%}"] = H2O(heavy=0, recent=budget)
    rows: list[list[object]] = []
    wanted = None
    for name, method in methods.items():
        handle = None if method is None else heed.apply(model, method)
        cache = None if handle is None else handle.state.cache()
        out = model(windows[:, :prompt], past_key_values=cache, use_cache=True)
        logits = [out.logits[:, -1:]]
        for i in range(prompt, length - 1):
            out = model(windows[:, i : i + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
        ratio = 1.0 if cache is None else cache.report()["ratio"]
        if handle is not None:
            handle.remove()
        found = torch.cat(logits, 1).flatten(0, 1).log_softmax(-1)
        wanted = found if wanted is None else wanted
        loss = F.nll_loss(found, windows[:, prompt:].flatten()).exp().item()
        same = (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()
        far = F.kl_div(found, wanted, log_target=True, reduction="batchmean").item()
        rows.append([f"{tokens}: {name}", loss, same, far, ratio])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--text", type=Path, help="train and measure a small language model on this text")
    parser.add_argument("--steps", type=int, default=500, help=f"of training at {SHORT} characters")
    parser.add_argument("--tune", type=int, default=100, help=f"steps of fine-tuning at {LONG}")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    extra = {}
    if given.text is not None:
        rows, model, test = fine_tuning(given)
        columns = ["fine-tuned with", "perplexity, full attention", "spread of seeds", "share"]
        report(f"SinkLoRA: {SHORT} to {LONG} characters", columns, rows, None)
        extra["fine-tuning"] = [dict(zip(columns, row, strict=True)) for row in rows]
        columns = ["cache", "perplexity", "agreement", "divergence", "times smaller"]
        rows = agreement("characters", model, test, 512, 640) + agreement("words", *word_model(given), 256, 384)
        report("H2O: the next token", columns, rows, None)
        extra["H2O"] = [dict(zip(columns, row, strict=True)) for row in rows]
    columns = ["layer", "scores / dense", "forward ms", "/ dense", "with backward ms", "/ dense, with backward"]
    report(f"SinkLoRA: a layer of {TOKENS} tokens", columns, costs(given.repeats), given.out, extra)


if __name__ == "__main__":
    main()

"""RazorAttention: how small the cache is, what a step of generation costs, and what a language model loses.

    python benchmarks/razor.py [--threads 1] [--repeats 7] [--text FILE] [--steps 800] [--out docs/benchmarks/razor.json]

Memory: bytes of one layer's cache after a prompt of 4,096 tokens in float16 against keys and values of all heads, averaged
over layers with the share of retrieval heads that the paper's ratios (14 % and 1 %) give a model of that shape. The paper's
own window of 4,000 tokens gains nothing at that length, so smaller ones stand beside it; shares of 128k tokens are computed.
Time: attention and cache update of one step of generation, one layer of Llama 3 8B's shape, against transformers' cache and
torch's attention. Quality: a small Llama trained here, first on random symbols that repeat, then also on characters of FILE
(plain or .gz; Python's own documentation without one) in which strings are said twice; perplexity after a compressed prompt,
and how much of a random string told there is repeated. Random heads are as many as the profiled ones, in 5 draws.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import heed
from common import interleaved, report
from heed.hosts.rules import AttentionCall
from heed.language.razor import Razor, RetrievalHeads, profile_heads
from heed.language.zipcache import ZipCache

# Layers, key-value heads, query heads, channels of a head.
SHAPES = {"Llama 3 8B": (32, 8, 32, 128), "Llama 2 7B": (32, 32, 32, 128), "Qwen2.5 7B": (28, 4, 28, 128)}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper, 4,000 tokens or N / 5": {},
    "N / 5": {"window": 1},
    "N / 6": {"window": 1, "divisor": 6},
    "512 or N / 8": {"window": 512, "divisor": 8},
    # Fewer probes, for speed: they do not change the size. At 131,072 tokens the share is that without ZipCache.
    "512 or N / 8, ZipCache": {"window": 512, "divisor": 8, "store": ZipCache(recent=0.01, random=0.0)},
}


def spread(layers: int, kv_heads: int, induction: float = 0.14, echo: float = 0.01) -> RetrievalHeads:
    """As many retrieval heads as the ratios give, spread evenly over the layers."""
    total = layers * kv_heads
    count = round(induction * total) + round(echo * total)
    mask = torch.zeros(total, dtype=torch.bool)
    mask[torch.linspace(0, total - 1, count).long()] = True
    return RetrievalHeads.of(mask.view(layers, kv_heads))


def prompt(shape: tuple[int, ...], tokens: int, dtype: torch.dtype) -> AttentionCall:
    _, kv_heads, heads, width = shape
    q, k, v = (torch.randn(1, n, tokens, width, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    return AttentionCall(nn.Identity(), 0, q, k, v, None, causal=True, scale=width**-0.5)


def filled(razor: Razor, index: int, call: AttentionCall) -> tuple[Any, Any]:
    """A layer's cache after a prompt, and its rule."""
    rule = razor.rule()
    layer = razor.layer(index, rule)
    layer.update(call.key, call.value)
    rule.after(call, call.query.transpose(1, 2))
    return layer, rule


def memory() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, shape in SHAPES.items():
        heads, call = spread(*shape[:2]), prompt(shape, 4096, torch.float16)
        for kind, settings in SETTINGS.items():
            razor = Razor(heads, **settings)
            sizes: dict[int, float] = {}  # layers with as many retrieval heads are of one size
            for index, some in enumerate(heads.layers):
                if len(some) not in sizes:
                    layer, _ = filled(razor, index, call)
                    sizes[len(some)] = layer.nbytes / layer.full_nbytes
            kept = sum(sizes[len(some)] for some in heads.layers) / len(heads.layers)
            rows.append([f"{name}, {kind}", heads.ratio, 1 - kept, 1 - razor.share(128 * 1024)])
    return rows


def steps(repeats: int) -> list[list[object]]:
    """Milliseconds of one step of one layer, Llama 3 8B's shape: taking in a token, and the attention of its query."""
    shape, rows = SHAPES["Llama 3 8B"], []
    _, kv_heads, heads, width = shape
    one, new_k, new_v = (torch.randn(1, n, 1, width) for n in (heads, kv_heads, kv_heads))
    call = AttentionCall(nn.Identity(), 0, one, new_k, new_v, None, causal=False, scale=width**-0.5)
    for tokens in (4096, 16384):
        plain, before = DynamicLayer(), prompt(shape, tokens, torch.float32)
        plain.update(before.key, before.value)

        def full(plain: Any = plain) -> Tensor:
            keys, values = plain.update(new_k, new_v)
            packed = one.view(1, kv_heads, heads // kv_heads, width)  # the heads of a group as queries, the fastest way
            return F.scaled_dot_product_attention(packed, keys, values)

        functions: dict[str, Any] = {"all tokens": full}
        for name, count in (("Razor, no retrieval head", 0), ("Razor, 1 of 8 heads", 1), ("Razor, 2 of 8 heads", 2)):
            razor = Razor(RetrievalHeads((tuple(range(count)),), kv_heads), window=512, divisor=8)
            layer, rule = filled(razor, 0, before)

            def step(layer: Any = layer, rule: Any = rule) -> Tensor:
                layer.update(new_k, new_v)
                return rule.after(call, rule.core(call))

            functions[name] = step
        times = interleaved(functions, repeats=repeats)
        rows += [[f"{tokens:,} tokens, {name}", 1e3 * time, time / times["all tokens"]] for name, time in times.items()]
    return rows


class Text:
    """Characters of a text, and what is made of them.

    Args:
        text: what the model learns from, but for its last tenth.
    """

    def __init__(self, text: str) -> None:
        text = text.lower()
        common = sorted(set(text), key=text.count, reverse=True)[:40]
        self.code = {character: i + 1 for i, character in enumerate(common)}  # 0 is BOS
        ids = torch.tensor([self.code[character] for character in text if character in self.code])
        self.letters = torch.tensor([self.code[x] for x in "abcdefghijklmnopqrstuvwxyz" if x in self.code])
        self.train, self.test = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]

    def random(self, length: int) -> Tensor:
        return self.letters[torch.randint(len(self.letters), (length,))]

    def rows(self, source: Tensor, batch: int, length: int) -> Tensor:
        starts = torch.randint(0, len(source) - length, (batch,)).tolist()
        return torch.stack([source[start : start + length] for start in starts])

    def repeats(self, batch: int, length: int) -> tuple[Tensor, int]:
        """(batch, length) random symbols that repeat with one period, and the period."""
        period = int(torch.randint(length // 8, length // 2 + 1, ()))
        rows = torch.randint(1, len(self.code) + 1, (batch, period))
        return rows.repeat(1, length // period + 1)[:, :length], period

    def passages(self, batch: int, length: int) -> Tensor:
        """(batch, length) of the text, with strings in it that are said twice, most of them random letters."""
        rows = self.rows(self.train, batch, length)
        for row in rows:
            for _ in range(length // 64):
                size = int(torch.randint(12, 25, ()))
                first, second = torch.randint(0, length - size, (2,)).sort().values.tolist()
                if torch.rand(()) < 0.7:
                    row[first : first + size] = self.random(size)
                row[second : second + size] = row[first : first + size].clone()
        return rows

    def told(self, batch: int, length: int, depth: float) -> tuple[Tensor, Tensor]:
        """A text (batch, length) in which a string of 12 random letters is told at `depth`, and the string (batch, 12)."""
        rows, at = self.rows(self.test, batch, length), int(depth * (length - 64))
        secret = torch.stack([self.random(12) for _ in range(batch)])
        rows[:, at : at + 12] = secret
        return rows, secret


def train(text: Text, number: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(text.code) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.98), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, number, pct_start=0.1)
    for step in range(number):
        # Repetition alone first, and short: heads that look things up form late or never from text of this size.
        short = step < number * 0.55
        rows, period = text.repeats(32, 64) if short else text.repeats(4, 512)
        loss = losses(model, rows)[:, period:].mean()
        if not short:
            loss = (loss + losses(model, text.passages(6, 512)).mean()) / 2
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def losses(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """(batch, length - 1), of every next symbol."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


@torch.no_grad()
def quality(model: LlamaForCausalLM, text: Text, razor: Razor | None) -> tuple[float, float, float]:
    """Perplexity of 64 characters after prompts of 448, share of told letters that come back, share of bytes saved.

    The prompt is compressed before the model is asked, so that no question decides what is kept.
    """
    torch.manual_seed(1)

    def answer(prompt: Tensor, more: Tensor) -> tuple[Tensor, float]:
        handle = None if razor is None else heed.apply(model, razor)
        cache: Any = DynamicCache(config=model.config) if handle is None else handle.state.cache()
        first = model(prompt, past_key_values=cache).logits[:, -1:]
        saved = 0.0 if handle is None else 1 - cache.nbytes / cache.full_nbytes
        rest = [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(more.shape[1])]
        if handle is not None:
            handle.remove()
        return torch.cat([first, *rest], 1), saved

    rows = text.rows(text.test, 48, 512)
    logits, saved = answer(rows[:, :448], rows[:, 448:-1])
    perplexity = F.cross_entropy(logits.flatten(0, 1), rows[:, 448:].flatten()).exp().item()
    right = []
    for depth in (0.1, 0.35, 0.6):
        told, secret = text.told(32, 448, depth)
        logits, _ = answer(told, secret)
        right.append((logits[:, 4:-1].argmax(-1) == secret[:, 4:]).float().mean().item())  # 4 letters say which string
    return perplexity, sum(right) / len(right), saved


def language(source: str, number: int) -> tuple[list[list[object]], dict[str, object]]:
    text = Text(source)
    model = train(text, number)
    scores = profile_heads(model, segment=40, repeats=4)
    layers, kv_heads = scores.induction.shape
    best = scores.select(0.14, 0.08)
    size: dict[str, Any] = {"window": 32, "divisor": None, "sinks": 4}
    none, every = (RetrievalHeads.of(torch.full((layers, kv_heads), x)) for x in (False, True))
    rows: list[list[object]] = [["all tokens", *quality(model, text, None)]]
    kinds = {"profiled heads": best, "no heads": none, "all heads": every}
    for name, heads in kinds.items():
        rows.append([f"{name} ({heads.count}), window 32", *quality(model, text, Razor(heads, **size))])
        if heads is not every:
            bare = Razor(heads, **size, compensate=False)
            rows.append([f"{name}, without compensation", *quality(model, text, bare)])
    for compensate in (True, False):
        found = []
        for draw in range(5):
            order = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(draw))
            mask = (order < best.count).view(layers, kv_heads)
            found.append(quality(model, text, Razor(RetrievalHeads.of(mask), **size, compensate=compensate)))
        name = f"random heads ({best.count}), {'window 32' if compensate else 'without compensation'}"
        rows.append([name, *torch.tensor(found).mean(0).tolist()])
    extra = {"induction": scores.induction.tolist(), "echo": scores.echo.tolist(), "retrieval heads": best.layers}
    return rows, extra


def read(path: Path | None) -> str:
    if path is None:
        from pydoc_data.topics import topics

        return "".join(topics[name] for name in sorted(topics))
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--text", type=Path, help="what the small language model is trained on")
    parser.add_argument("--steps", type=int, default=800, help="of its training; 0 leaves quality out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    size, time = memory(), steps(given.repeats)
    columns = ["cache", "retrieval heads", "saved of 4,096 tokens", "saved of 131,072"]
    report("Razor: memory of a prompt in float16", columns, size, None)
    extra: dict[str, object] = {"memory": [dict(zip(columns, row, strict=True)) for row in size]}
    if given.steps:
        rows, heads = language(read(given.text), given.steps)
        columns = ["cache", "perplexity", "told letters that come back", "saved"]
        report("Razor: a small language model, prompts of 448 characters", columns, rows, None)
        extra |= {"quality": [dict(zip(columns, row, strict=True)) for row in rows], "heads": heads}
    report("Razor: a step of generation in one layer", ["cache", "ms", "of all tokens"], time, given.out, extra)


if __name__ == "__main__":
    main()

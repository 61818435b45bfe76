"""ZipCache: how small the cache is, what saliency and quantisation cost, and what they do to a language model.

    python benchmarks/zipcache.py [--threads 1] [--repeats 7] [--text FILE] [--out docs/benchmarks/zipcache.json]

Memory: bytes of one layer's cache after a prompt of 4,096 tokens in float16, against 16 bits for every number; the paper
says 4.98x for C = 4,096 channels, without the lists of regular tokens. Time: 8 heads of 64 channels, 2,048 tokens, float32;
prefill in units of attention over the prompt, decoding in units of attention of one query. "all queries" is saliency from
the full attention map, which the paper's latencies are compared with. Text: perplexity of a small Llama over characters,
trained here on the first nine tenths of FILE (plain or .gz; tiny Shakespeare will do), on later characters that follow a
compressed prompt.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import heed
from common import interleaved, report
from heed.hosts.rules import AttentionCall
from heed.language.caches.layer import CompressedLayer
from heed.language.caches.rule import CacheRule
from heed.language.saliency import Probes, probe_saliency
from heed.language.zipcache import ZipCache, compression_ratio

ACCUMULATED: dict[str, Any] = {"saliency": "accumulated", "recent": 1.0, "random": 0.0}
SHAPES = {"Llama 2 7B": (32, 128), "Llama 3 8B": (8, 128), "Qwen2.5 0.5B": (2, 64)}  # key-value heads, channels of one


def attention(heads: int, width: int, tokens: int, dtype: torch.dtype = torch.float32) -> AttentionCall:
    q, k, v = (torch.randn(1, heads, tokens, width).to(dtype) for _ in range(3))
    return AttentionCall(nn.Identity(), 0, q, k, v, None, causal=True, scale=width**-0.5)


def compress(call: AttentionCall, method: ZipCache) -> Any:
    """The cache layer after the prompt of this call."""
    rule = CacheRule()
    layer: CompressedLayer = method.layer(0, rule)
    layer.update(call.key, call.value)
    rule.after(call, call.value.transpose(1, 2))
    return layer


def memory() -> list[list[object]]:
    rows: list[list[object]] = []
    for name, (heads, width) in SHAPES.items():
        call = attention(heads, width, 4096, torch.float16)
        methods = {
            "ZipCache": ZipCache(recent=0.01, random=0.0),  # probes do not change the size
            "4 bits per channel and token": ZipCache(regular=0.0),
            "4 bits in groups of 32": ZipCache(regular=0.0, keys="group", values="group"),
        }
        for kind, method in methods.items():
            layer = compress(call, method)
            formula = compression_ratio(
                4096, heads * width, regular=method.regular, keys=method.keys, values=method.values
            )
            rows.append([f"{name}, {kind}", layer.full_nbytes / layer.nbytes, formula])
    return rows


def costs(repeats: int) -> list[list[object]]:
    call = attention(8, 64, 2048)
    q, k, v = call.query, call.key, call.value
    layer, one = compress(call, ZipCache()), q[:, :, -1:]
    keys, values = layer.held.keys, layer.held.values
    probes, every = ([Probes(*p).rows(2048, torch.rand(2048))] for p in ((0.05, 0.05), (1.0, 0.0)))
    rows: list[list[object]] = []
    prefill = {
        "attention": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "saliency from 10 % probes": lambda: probe_saliency(call, probes),
        "saliency from all queries": lambda: probe_saliency(call, every),
        "plain 4 bits": lambda: compress(call, ZipCache(regular=0.0)),
        "ZipCache": lambda: compress(call, ZipCache()),
        "ZipCache, all queries": lambda: compress(call, ZipCache(**ACCUMULATED)),
    }
    decode = {
        "attention": lambda: F.scaled_dot_product_attention(one, k, v),
        "unpacking keys and values": lambda: (keys.dequantise(), values.dequantise()),
    }
    for phase, functions in (("prefill", prefill), ("decode", decode)):
        times = interleaved(functions, repeats=repeats)
        unit = times["attention"]
        rows += [[f"{phase}: {name}", 1e3 * time, time / unit] for name, time in times.items()]
    return rows


def train(ids: Tensor, vocabulary: int, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 512, (8,)).tolist()
        batch = torch.stack([ids[start : start + 512] for start in starts])
        optimiser.zero_grad()
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor, method: ZipCache | None) -> tuple[float, float]:
    """Of 64 characters after prompts of 448, and how many times smaller the cache of the prompts was."""
    pieces = ids[: len(ids) // 512 * 512].view(-1, 512)[:64]
    handle = None if method is None else heed.apply(model, method)
    cache = None if handle is None else handle.state.cache()
    out = model(pieces[:, :448], past_key_values=cache)
    ratio = 1.0 if cache is None else cache.report()["ratio"]
    logits = [out.logits[:, -1:], model(pieces[:, 448:-1], past_key_values=out.past_key_values).logits]
    if handle is not None:
        handle.remove()
    loss = F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), pieces[:, 448:].flatten())
    return loss.exp().item(), ratio


def language(path: Path, steps: int) -> list[list[object]]:
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([alphabet[character] for character in text])
    cut = len(ids) * 9 // 10
    model = train(ids[:cut], len(alphabet), steps)
    methods: dict[str, ZipCache | None] = {"no compression": None, "4 bits": ZipCache(regular=0.0)}
    for fraction in (0.4, 0.7):
        for name, settings in (("normalised", {}), ("accumulated", ACCUMULATED)):
            methods[f"{fraction:.0%} in 2 bits, {name}"] = ZipCache(regular=fraction, **settings)
    methods["2 bits"] = ZipCache(regular=0.0, salient_bits=2)
    return [[name, *perplexity(model, ids[cut:], method)] for name, method in methods.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--text", type=Path, help="train and measure a small language model on this text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    size, time = memory(), costs(given.repeats)
    quality = [] if given.text is None else language(given.text, given.steps)
    times_smaller = ["cache", "times smaller", "formula, without lists"]
    report("ZipCache: memory of a prompt of 4,096 tokens", times_smaller, size, None)
    if quality:
        report(
            "ZipCache: perplexity after a compressed prompt", ["cache", "perplexity", "times smaller"], quality, None
        )
    extra = {"memory": [dict(zip(times_smaller, row, strict=True)) for row in size], "quality": quality}
    report("ZipCache: cost, in units of attention", ["step", "ms", "attentions"], time, given.out, extra)


if __name__ == "__main__":
    main()

"""Block Transformer: cache, and tokens per second of generation, against a vanilla decoder with as many parameters in layers.

    python benchmarks/block_transformer.py [--threads 2] [--device cpu] [--size 5] [--steps 400] [--out FILE.json]

Cache: bytes of a sequence, of tensors where the models are small enough to run here, and by the formula. Generation: a
block model and the vanilla one of equal layer parameters (the paper's 3+3 x 256 against 6 x 256), both in float32 with
random weights, greedy, without logits of the prompt, through the same stepping over the library's layers with reserved
memory; so the ratio owes nothing to a slow baseline ("transformers' generate" is there for comparison). Every row measures
a prompt and 16 tokens after it. "2048 + 128" and "128 + 2048" are the paper's prefill-heavy and decode-heavy settings, put
together from these measurements: time per token is taken as linear between contexts. The paper compares models of equal
perplexity and each at its own largest batch on a GPU, 10 to 20 times; here parameters and batch are equal. Learning: bytes
of Python's help, loss of each position in the block against the entropy of single bytes.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

import heed
from common import report
from heed.language.block_transformer import (
    CONFIGS,
    BlockTransformer,
    cache_bytes,
    to_blocks,
    vanilla,
    vanilla_cache_bytes,
)
from heed.language.block_transformer.neox import Stepper

SIZES = {"5": ("block_main_b4_5", "31m"), "19": ("block_main_b4_19", "70m"), "85": ("block_main_b4_85", "160m")}
NEW = 16
PROMPTS, BATCHES = (128, 512, 1024, 2048), (1, 8, 32, 64)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def block_times(model: BlockTransformer, ids: Tensor, new: int) -> tuple[float, float]:
    """Seconds from the prompt to the first block, and per token afterwards."""
    moments: list[float] = []
    hook = model.embedder.register_forward_pre_hook(lambda *_: moments.append(clock(ids.device)))
    model.generate(ids, max_new_tokens=new)
    end = clock(ids.device)
    hook.remove()
    length = model.config.block_length
    return moments[1] - moments[0], (end - moments[1]) / (new - length)


@torch.no_grad()
def vanilla_times(model: GPTNeoXForCausalLM, ids: Tensor, new: int, first: int) -> tuple[float, float]:
    """The same for a vanilla model: seconds to its first `first` tokens, and per token afterwards."""
    begin = clock(ids.device)
    steps = Stepper(model.gpt_neox, ids.shape[1] + new)
    token = model.lm_head(steps(model.gpt_neox.embed_in(ids))[:, -1]).argmax(-1)
    moments = []
    for i in range(1, new):
        if i == first:
            moments.append(clock(ids.device))
        token = model.lm_head(steps(model.gpt_neox.embed_in(token[:, None]))[:, -1]).argmax(-1)
    return moments[0] - begin, (clock(ids.device) - moments[0]) / (new - first)


def throughput(
    size: str, vocabulary: int, prompts: tuple[int, ...], batches: tuple[int, ...], device: torch.device
) -> list[list[object]]:
    names = SIZES[size]
    torch.manual_seed(0)
    block = heed.create_model(names[0], vocab_size=vocabulary, eos_id=None).to(device).eval()
    plain: Any = vanilla(names[1], vocab_size=vocabulary)
    plain = plain.to(device).eval()
    assert isinstance(block, BlockTransformer)
    block_times(block, torch.randint(vocabulary, (2, 64), device=device), NEW)
    vanilla_times(plain, torch.randint(vocabulary, (2, 64), device=device), NEW, 4)
    rows: list[list[object]] = []
    for batch in batches:
        measured = []
        for prompt in prompts:
            ids = torch.randint(vocabulary, (batch, prompt), device=device)
            # Short measurements are repeated; the models take turns, and the fastest turn counts.
            turns = 1 if batch * prompt > 8192 else 3
            times = [(*vanilla_times(plain, ids, NEW, 4), *block_times(block, ids, NEW)) for _ in range(turns)]
            v_first, v_token, b_first, b_token = np.array(times).min(0).tolist()
            measured.append((v_first, v_token, b_first, b_token))
            rows.append([
                f"V {vocabulary}, batch {batch}, prompt {prompt}", batch * prompt / v_first, batch * prompt / b_first,
                v_first / b_first, batch / v_token, batch / b_token, v_token / b_token,
            ])  # fmt: skip
        first, token = (np.array(measured).T[[0, 2]], np.array(measured).T[[1, 3]])
        contexts = np.arange(128, 128 + 2048)
        for name, prompt, new in (("2048 + 128", 2048, 128), ("128 + 2048", 128, 2048)):
            place = list(prompts).index(prompt)
            spent = [
                first[i, place] + np.interp(contexts if new == 2048 else np.full(new, prompt), prompts, token[i]).sum()
                for i in (0, 1)
            ]
            rows.append([
                f"V {vocabulary}, batch {batch}, {name}", "", "", "", batch * new / spent[0], batch * new / spent[1],
                spent[0] / spent[1],
            ])  # fmt: skip
    return rows


def library(size: str, device: torch.device) -> list[list[object]]:
    """transformers' own generate, against the stepping that this benchmark gives the vanilla model."""
    model: Any = vanilla(SIZES[size][1], vocab_size=256)
    model = model.to(device).eval()
    ids = torch.randint(1, 256, (8, 1024), device=device)
    mask, free = torch.ones_like(ids), {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    begin = clock(device)
    model.generate(ids, attention_mask=mask, max_new_tokens=32, **free)
    theirs = clock(device) - begin
    first, token = vanilla_times(model, ids, 32, 4)
    return [
        ["transformers' generate, batch 8, prompt 1024, 32 tokens: times our stepping", theirs / (first + 28 * token)]
    ]


def caches() -> list[list[object]]:
    rows: list[list[object]] = []
    tokens = 512
    for name, plain in SIZES.values():
        if CONFIGS[name].block_width > 512:
            continue
        ids = torch.randint(256, (1, tokens))
        model = heed.create_model(name, vocab_size=256).eval()
        other = vanilla(plain, vocab_size=256).eval()
        assert isinstance(model, BlockTransformer)
        steps, inner = model.block_decoder.stepper(tokens // 4), model.token_decoder.start()
        whole = Stepper(other.gpt_neox, tokens)
        with torch.no_grad():
            whole(other.gpt_neox.embed_in(ids))
            state = steps(model.embedder(to_blocks(ids, None, 4, 0, 0).ids)[:, :, 0])[:, -1:]
            inner.begin(model.token_decoder.expand(state))
            for _ in range(4):
                inner.next(ids[:, 0])
        held = steps.cache.nbytes + inner.nbytes
        rows.append([f"{name}, {tokens} tokens, float32 tensors", whole.cache.nbytes, held, whole.cache.nbytes / held])
        said = vanilla_cache_bytes(len(other.gpt_neox.layers), CONFIGS[name].block_width, tokens, torch.float32)
        if (held, whole.cache.nbytes) != (cache_bytes(CONFIGS[name], tokens, torch.float32).total, said):
            raise RuntimeError(f"the formula says {said}, and the tensors are {held} bytes")
    beside = {"block_main_b4_5": (6, 256), "block_main_b4_300": (24, 1024), "block_main_b4_1.2b": (24, 2048)}
    for name, (layers, width) in beside.items():
        plain_bytes, ours = vanilla_cache_bytes(layers, width, 2048), cache_bytes(CONFIGS[name], 2048).total
        rows.append([f"{name}, 2048 tokens, bfloat16", plain_bytes, ours, plain_bytes / ours])
    return rows


def learning(steps: int) -> list[list[object]]:
    ids = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    cut = len(ids) * 9 // 10
    train, test = ids[:cut], ids[cut:][: 256 * 40].view(-1, 256)
    share = train.bincount(minlength=256).double() / len(train)
    entropy = -(share * share.clamp(min=1e-12).log()).sum().item()
    torch.manual_seed(0)
    sizes = {"embedder_width": 16, "block_width": 64, "token_width": 64, "block_layers": 2, "token_layers": 2}
    model = heed.create_model("block_bytes_b4", **sizes)
    assert isinstance(model, BlockTransformer)
    optimiser = torch.optim.AdamW(model.parameters(), 8e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 8e-3, steps)
    begin = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(train) - 128, (8,)).tolist()
        optimiser.zero_grad()
        model.token_losses(torch.stack([train[s : s + 128] for s in starts]), padding=step % 4).nanmean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        # Every byte in every place of a block, as indented text is not the same in all of them.
        by_place = torch.stack([model.eval().token_losses(test, padding=p)[:, 8 - p : 248 - p] for p in range(4)])
    losses = by_place.unflatten(-1, (-1, 4)).mean((0, 1, 2))
    rows: list[list[object]] = [
        ["entropy of single bytes", entropy],
        [f"loss after {steps} steps", losses.mean().item()],
    ]
    rows += [[f"loss of position {i} in the block", value] for i, value in enumerate(losses.tolist())]
    return [*rows, ["seconds of training", time.perf_counter() - begin]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="5", help="millions of parameters in the layers")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="with 128 and 2048 among them")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--steps", type=int, default=400, help="of training on bytes")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    held = caches()
    columns = ["cache of a sequence", "vanilla bytes", "block bytes", "times smaller"]
    report("Block Transformer: keys and values", columns, held, None)
    learnt = [] if given.steps == 0 else learning(given.steps)
    if learnt:
        report("Block Transformer: bytes of Python's help, nats", ["what", "value"], learnt, None)
    baseline = library(given.size, device)
    report("Baseline", ["what", "ratio"], baseline, None)
    rows = throughput(given.size, 256, tuple(given.prompts), tuple(given.batches), device)
    rows += throughput(given.size, 50304, (128, 2048), tuple(given.batches), device)
    names = ["setting", "vanilla prompt tok/s", "block", "ratio", "vanilla new tok/s", "block new", "ratio new"]
    extra = {
        "size": given.size,
        "cache": [dict(zip(columns, row, strict=True)) for row in held],
        "learning": dict(map(tuple, learnt)),  # type: ignore[arg-type]
        "baseline": dict(map(tuple, baseline)),  # type: ignore[arg-type]
    }
    report("Block Transformer: generation, tokens per second", names, rows, given.out, extra)


if __name__ == "__main__":
    main()

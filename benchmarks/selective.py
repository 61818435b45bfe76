"""Selective self-attention: what temperatures cost, what they do to attention over many keys, and what they help to learn.

    python benchmarks/selective.py [--threads 1] [--seeds 3] [--text FILE] [--out docs/benchmarks/selective.json]

"cost": forward, float32, causal, 12 heads of 64 channels; "explicit" multiplies the N x N scores, as the authors' code does.
"parameters": by default settings, of models built without memory.
"thinning out": how the effective number of keys grows with the length (slope, log-log) for standard normal scores.
"pairs": 32 tokens in 16 pairs of nearly equal embeddings; one of a pair has one successor, the other 16. Cross-entropy of
softmax(tau (E W) E^T) after 1,500 steps of Adam; 1.39 is the least.
"noise": one layer that averages the signals among as many noise tokens, marked by a feature; mean squared error.
"language": a decoder of two layers on characters of --text (a gzip or plain file; without it, Python's help topics).
Held-out loss with and without temperatures from scratch, and of a trained decoder before and after its temperatures alone
are tuned on half as many steps.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import interleaved, report
from heed.language.selective import convert_to_selective, temperature_groups, train_temperatures_only
from heed.layers.attention import PatternAttention
from heed.layers.selective import SelectiveAttention
from heed.layers.temperature import Selective, Temperature, spikiness

Row = list[object]


def cost(repeats: int) -> list[Row]:
    """Milliseconds of attention with ever more parts of the temperatures."""
    rows: list[Row] = []
    for n in (1024, 4096):
        q, k, v = (torch.randn(1, 12, n, 64) for _ in range(3))
        positions, settings = torch.arange(1, n + 1)[None], Selective()
        parts = {"position": ("position",), "position, token": ("position", "token")}
        pairs = {
            name: [Temperature(part, 12, 64, 768, settings) for _ in range(2)]  # type: ignore[arg-type]
            for name, part in parts.items()
        }
        hidden = torch.ones(n, n).triu(1).bool()

        def selective(taus: list[Any], q: Tensor = q, k: Tensor = k, v: Tensor = v, at: Tensor = positions) -> Tensor:
            tau_q, tau_v = (tau(x, at)[..., None] for tau, x in zip(taus, (q, v), strict=True))
            return F.scaled_dot_product_attention(q * tau_q, k, v * tau_v, is_causal=True)

        def explicit(
            q: Tensor = q, k: Tensor = k, v: Tensor = v, at: Tensor = positions, no: Tensor = hidden
        ) -> Tensor:
            factor = 1 + 0.1 * at[0].log()[:, None]
            return (factor * (q @ k.mT) / 8).masked_fill(no, -torch.inf).softmax(-1) @ v

        runs: dict[str, Callable[[], object]] = {
            "plain": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        }
        runs |= {name: lambda taus=taus: selective(taus) for name, taus in pairs.items()}
        runs["explicit"] = explicit
        with torch.inference_mode():
            taken = interleaved(runs, repeats=repeats)
        rows += [["cost", f"{name}, {n} tokens, ms", ms * 1e3, ms / taken["plain"]] for name, ms in taken.items()]
    return rows


def parameters() -> list[Row]:
    """New parameters of named sizes, and their share of the model's own."""
    import transformers as t

    sizes: dict[str, Any] = {
        "gpt2": t.GPT2Config(),
        "pythia-410m": t.GPTNeoXConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
        "llama-3-8b": t.LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256),
    }
    rows: list[Row] = []
    for name, config in sizes.items():
        with torch.device("meta"):
            model = t.AutoModelForCausalLM.from_config(config)
            own = model.num_parameters()
            added = convert_to_selective(model).state.count()
        rows.append(["parameters", f"{name}: added, and over its own", added, added / own])
    return rows


def thinning() -> list[Row]:
    """Slope of the effective number of keys over the length, and over that without a gain."""
    lengths, slopes = (64, 256, 1024, 4096), {}
    for gain in (0.0, 0.05, 0.1, 0.3):
        points = []
        for length in lengths:
            scores = torch.randn(400, length, generator=torch.Generator().manual_seed(0))
            weights = (scores * (1 + gain * math.log(length))).softmax(-1)
            points.append((math.log(length), (spikiness(weights) * length).mean().log().item()))
        slopes[gain] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return [["thinning out", f"slope with g = {gain}", slope, slope / slopes[0.0]] for gain, slope in slopes.items()]


def pairs_of_tokens(seed: int, temperature: bool) -> float:
    """Cross-entropy of the fitted transitions."""
    torch.manual_seed(seed)
    embeddings = torch.randn(16, 8).repeat_interleave(2, 0) + 0.1 * torch.randn(32, 8)
    transitions = torch.zeros(32, 32)
    for token in range(32):
        followers = torch.randperm(32)[: 1 if token % 2 else 16]
        transitions[token, followers] = 1 / len(followers)
    weight = nn.Parameter(torch.randn(8, 8) / 8**0.5)
    tau = Temperature(("token",), 1, 8, 8, Selective(query=("token",), value=(), scratch=True))
    optimiser = torch.optim.Adam([weight, *tau.parameters()], 1e-2)

    def loss() -> Tensor:
        q = embeddings @ weight
        if temperature:
            q = q * tau(q[None, None], None)[0, 0, :, None]
        return F.cross_entropy(q @ embeddings.T, transitions)

    for _ in range(1500):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return loss().item()


def noise(seed: int, temperature: bool) -> float:
    """Mean squared error of the average of the signals."""
    torch.manual_seed(seed)
    settings = Selective(query=(), value=("token",), scratch=True)
    layer = SelectiveAttention(16, 1, settings=settings) if temperature else PatternAttention(16, 1, qkv_bias=False)
    optimiser = torch.optim.Adam(layer.parameters(), 3e-3)
    errors = []
    for step in range(600):
        marked = (torch.arange(32) % 2).expand(64, -1)[:, torch.randperm(32)].float()
        x = torch.randn(64, 32, 15) * (1 + marked[..., None])
        signal = (x * (1 - marked)[..., None]).sum(1, keepdim=True) / 16
        error = F.mse_loss(layer(torch.cat([x, marked[..., None]], -1))[..., :15], signal.expand_as(x))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        if step >= 550:
            errors.append(error.item())
    return statistics.mean(errors)


def characters(path: Path | None) -> Tensor:
    """A text as numbers of its characters."""
    if path is None:
        from pydoc_data.topics import topics

        raw = "\n".join(topics.values()).encode()
    else:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    data = torch.tensor(list(raw))
    return torch.searchsorted(data.unique(), data)


def decoder(symbols: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=symbols,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )


def train(model: nn.Module, groups: Any, data: Tensor, steps: int, seed: int) -> None:
    """AdamW with one cycle on pieces of 256 characters."""
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [group["lr"] for group in optimiser.param_groups], steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(data) - 256, (12, 1), generator=generator)
        x = data[at + torch.arange(256)]
        loss = model(x, labels=x, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def held_out(model: nn.Module, data: Tensor) -> float:
    """Loss per character."""
    pieces = data[: len(data) // 256 * 256].view(-1, 256)[:48]
    return statistics.mean(model(x, labels=x, use_cache=False).loss.item() for x in pieces.split(12))


def language(path: Path | None, seeds: int, steps: int) -> list[Row]:
    """Held-out losses."""
    data = characters(path)
    symbols = int(data.max()) + 1
    learn, test = data.tensor_split([len(data) * 9 // 10])
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        plain = decoder(symbols)
        train(plain, [{"params": plain.parameters(), "lr": 3e-3}], learn, steps, seed)
        found.setdefault("plain, from scratch", []).append(held_out(plain, test))
        torch.manual_seed(seed)
        model = decoder(symbols)
        handle = convert_to_selective(model, Selective(scratch=True))
        train(model, temperature_groups(handle, 3e-3), learn, steps, seed)
        found.setdefault("temperatures, from scratch", []).append(held_out(model, test))
        handle = convert_to_selective(plain)
        found.setdefault("temperatures added to plain, not tuned", []).append(held_out(plain, test))
        train_temperatures_only(handle)
        train(plain, temperature_groups(handle, token_lr=1e-2), learn, steps // 2, seed + 100)
        found.setdefault("temperatures added to plain, tuned alone", []).append(held_out(plain, test))
    means = {name: statistics.mean(losses) for name, losses in found.items()}
    return [["language", f"{name}: loss", loss, loss / means["plain, from scratch"]] for name, loss in means.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of the language models")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = cost(options.repeats) + parameters() + thinning()
    for name, toy in (("pairs", pairs_of_tokens), ("noise", noise)):
        results = {on: statistics.mean(toy(seed, on) for seed in range(options.seeds)) for on in (False, True)}
        kind = "cross-entropy" if toy is pairs_of_tokens else "squared error"
        rows += [
            [name, f"{'token temperature' if on else 'plain'}: {kind}", value, value / results[False]]
            for on, value in results.items()
        ]
    rows += language(options.text, options.seeds, options.steps)
    report("Selective self-attention", ["claim", "measured", "value", "over plain"], rows, options.out)


if __name__ == "__main__":
    main()

"""Subsampled attention: what it saves, what training with it loses or gains, and what averaging its sub-models gives.

    python benchmarks/subsampled.py [--threads 2] [--seeds 3] [--text FILE] [--out docs/benchmarks/subsampled.json]

"cost": one layer, 8 heads of 64 channels, float32, batch 1, a new draw in every call; dense is scaled_dot_product_attention,
causal where the row is. "counted" are dense operations (and bytes of the weights) over those of the draw.
"digits": scikit-learn's digits as 64 pixel tokens, 3 layers of width 48, 300 training images; the last fifth of the steps
is dense. Test accuracy in eval mode, which is dense for all.
"ensemble": as many steps as --ensemble-steps on 1,000 images, the last tenth dense; 16 members with 32 sources.
"language": a decoder of two layers on 1,024 characters of --text (a gzip or plain file; without it, Python's help topics),
trained with blocks of 1/r of the text; held-out loss, dense for all, and the time of a training step.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heed
from common import digits, interleaved, report
from heed.language.self_ensemble import self_ensemble
from heed.language.subsampled import StochasticSubsampling, staged
from heed.layers.subsampling import Subsampling, subsampled_attention, subsampled_cost
from heed.methods import Handle

Row = list[object]


def cost(tokens: int, repeats: int, backward: bool) -> list[Row]:
    """Milliseconds of every rule beside dense attention."""
    q, k, v = (torch.randn(1, 8, tokens, 64, requires_grad=backward) for _ in range(3))

    def timed(run: Callable[[], Tensor]) -> Callable[[], object]:
        return (lambda: run().sum().backward()) if backward else run

    runs: dict[str, Callable[[], object]] = {}
    settings: dict[str, Subsampling] = {}
    for causal in (False, True):
        ending = ", causal" if causal else ""
        runs[f"dense{ending}"] = timed(lambda causal=causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        for mode in ("unbiased", "local"):
            for ratio in (4, 8):
                name = f"{mode}, r = {ratio}{ending}"
                settings[name] = chosen = Subsampling(mode, ratio=ratio)
                runs[name] = timed(
                    lambda chosen=chosen, causal=causal: subsampled_attention(q, k, v, chosen, causal=causal)
                )
    with torch.set_grad_enabled(backward):
        taken = interleaved(runs, repeats=repeats, warmup=1)
    rows: list[Row] = []
    for name, seconds in taken.items():
        base = taken["dense, causal" if "causal" in name else "dense"]
        counted = subsampled_cost(settings[name], tokens, 8, 64).saving if name in settings else 1.0
        kind = "forward and backward" if backward else "forward"
        rows.append([f"cost, {kind}", f"{name}, ms", seconds * 1e3, seconds / base, counted])
    return rows


def fit_digits(seed: int, sources: int, images: int, steps: int, dense: float) -> tuple[nn.Module, Handle]:
    """A vision transformer on pixels, trained with so many of the 64 sources."""
    torch.manual_seed(seed)
    model = heed.create_model("vit_micro", patch_size=1, dim=48, depth=3, num_heads=4).train()
    handle = heed.apply(model, StochasticSubsampling(ratio=64 / sources))
    x, y = digits()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in staged(handle, steps, dense):
        batch = torch.randint(images, (64,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval(), handle


def accuracy(predict: Callable[[Tensor], Tensor]) -> float:
    """On the last 517 digits."""
    x, y = digits()
    with torch.no_grad():
        return (predict(x[1280:]).argmax(1) == y[1280:]).float().mean().item()


def generalisation(seeds: int, steps: int) -> list[Row]:
    """Test accuracies after 300 images."""
    rows: list[Row] = []
    base = 0.0
    for sources in (64, 32, 16):
        found = [accuracy(fit_digits(seed, sources, 300, steps, 0.2)[0]) for seed in range(seeds)]
        base = base or statistics.mean(found)
        named = "dense" if sources == 64 else f"{sources} of 64 sources"
        rows.append(
            ["digits", f"{named}: accuracy", statistics.mean(found), statistics.mean(found) / base, 64 / sources]
        )
    return rows


def ensembles(seeds: int, steps: int) -> list[Row]:
    """Accuracies of dense evaluation, single members and ensembles."""
    rows: list[Row] = []
    for sources in (16, 8):
        found: dict[str, list[float]] = {"dense": [], "one member": [], "16 members": []}
        for seed in range(seeds):
            model, _ = fit_digits(seed, sources, 1000, steps, 0.1)
            found["dense"].append(accuracy(model))
            for name, members in (("one member", 1), ("16 members", 16)):
                torch.manual_seed(seed)
                found[name].append(
                    accuracy(lambda x, n=members, model=model: self_ensemble(model, lambda: model(x), n, ratio=2))
                )
        means = {name: statistics.mean(values) for name, values in found.items()}
        title = f"ensemble, trained with {sources} of 64"
        rows += [[title, f"{name}: accuracy", x, x / means["dense"], 64 / sources] for name, x in means.items()]
    return rows


def language(path: Path | None, seeds: int, steps: int) -> list[Row]:
    """Held-out losses of decoders, and milliseconds of a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if path is None:
        from pydoc_data.topics import topics

        raw = "\n".join(topics.values()).encode()
    else:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    data = torch.tensor(list(raw))
    data = torch.searchsorted(data.unique(), data)
    learn, test = data.tensor_split([len(data) * 9 // 10])
    pieces = test[: len(test) // 1024 * 1024].view(-1, 1024)[:16]
    found: dict[int, list[float]] = {1: [], 4: [], 8: []}
    taken: dict[int, list[float]] = {1: [], 4: [], 8: []}
    for seed in range(seeds):
        for ratio in found:
            torch.manual_seed(seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=int(data.max()) + 1,
                    hidden_size=96,
                    intermediate_size=256,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    tie_word_embeddings=True,
                )
            ).train()
            optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
            handle = heed.apply(model, StochasticSubsampling(ratio=ratio))
            for _ in staged(handle, steps):
                x = learn[torch.randint(len(learn) - 1024, (4, 1)) + torch.arange(1024)]
                begin = time.perf_counter()
                loss = model(x, labels=x, use_cache=False).loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if not handle.state.dense:
                    taken[ratio].append(time.perf_counter() - begin)
                schedule.step()
            model.eval()
            with torch.no_grad():
                losses = [model(x, labels=x, use_cache=False).loss.item() for x in pieces.split(4)]
            found[ratio].append(statistics.mean(losses))
    rows: list[Row] = []
    for kind, values in (("loss", found), ("ms of a step", taken)):
        unit = 1.0 if kind == "loss" else 1e3
        means = {ratio: unit * statistics.median(x) for ratio, x in values.items()}
        rows += [["language", f"r = {ratio}: {kind}", x, x / means[1], float(ratio)] for ratio, x in means.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1500, help="on 300 digits")
    parser.add_argument("--ensemble-steps", type=int, default=640)
    parser.add_argument("--language-steps", type=int, default=400)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = cost(options.tokens, options.repeats, False) + cost(options.tokens, options.repeats, True)
    rows += language(options.text, options.seeds, options.language_steps)
    rows += generalisation(options.seeds, options.steps) + ensembles(options.seeds, options.ensemble_steps)
    report(
        "Stochastically subsampled attention",
        ["claim", "measured", "value", "over dense", "times fewer products"],
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()

"""VAR: what it costs in one attention layer, how many forwards it adds, and whether visual sinks can go.

    python benchmarks/var.py [--threads 1] [--repeats 7] [--seeds 2] [--steps 1500] [--out docs/benchmarks/var.json]

The authors' code costs (eager + VAR) / sdpa = 4.7 at 640 queries and keys, where eager alone costs 3.2, and 6.8 in a
decoding step (32 heads of 128, float32, one thread). The paper says that hiding visual sinks from the text does little
harm and hiding as many other image tokens does; here on the tiny model that heed trains on drawn scenes, `--seeds` times.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import heed
from common import interleaved, report
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.hosts.transformers import heed_attention
from heed.methods import Handle, Method
from heed.multimodal.answering import answer, prepare
from heed.multimodal.host import read_host
from heed.multimodal.removal import RemoveVisualTokens
from heed.multimodal.scenes import draw_name, draw_scene, question
from heed.multimodal.sinks import find_sink_dimensions
from heed.multimodal.tiny import STEPS, tiny_model, tiny_processor, train_tiny
from heed.multimodal.var import VAR
from heed.multimodal.watch import sink_statistics

TOKENS, IMAGE, HEADS, HEAD = 640, slice(35, 611), 32, 128
ASKED = 300


class Eager(Method):
    """Forms the weights and leaves them as they are."""

    class Rule(AttentionRule):
        def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
            return weights

    def attach(self, host: nn.Module, handle: Handle) -> None:
        attach_rule(host, self.Rule(), handle)


def layer_costs(repeats: int) -> list[list[object]]:
    """Times of one attention layer of LLaVA-1.5-7B's size, every head selected."""
    size: dict[str, Any] = {"hidden_size": HEADS * HEAD, "intermediate_size": 64, "num_attention_heads": HEADS}
    tokens = torch.randn(1, TOKENS, HEADS * HEAD)
    tokens[:, [0, 100, 300], 2533] = 4000.0  # sinks: one before the image and two in it
    mask = torch.zeros(1, TOKENS, dtype=torch.bool)
    mask[:, IMAGE] = True
    var = VAR(sink_dimensions=(2533, 1415), rho=1.0, summ=0.0, first_layer=0, image_mask=mask)
    hosts = {}
    for name, method in (("eager", Eager()), ("eager + VAR", var)):
        config = LlamaConfig(**size, num_hidden_layers=1, num_key_value_heads=HEADS, vocab_size=8)
        hosts[name] = LlamaForCausalLM(config).eval()
        heed.apply(hosts[name].model if name == "eager" else hosts[name], method)
    rows: list[list[object]] = []
    with torch.inference_mode():
        for queries in (TOKENS, 1):
            q, k, v = (torch.randn(1, HEADS, n, HEAD) for n in (queries, TOKENS, TOKENS))
            runs: dict[str, Callable[[], object]] = {"sdpa": _sdpa(hosts["eager"], q, k, v)}
            for name, model in hosts.items():
                cache = model(inputs_embeds=tokens, use_cache=True).past_key_values  # the prompt, for VAR to look at
                if queries == 1:
                    model(inputs_embeds=tokens[:, :1], past_key_values=cache)
                runs[name] = _layer(model, q, k, v)
            times = interleaved(runs, repeats)
            rows += [
                [f"{queries} x {TOKENS}", name, seconds * 1e3, seconds / times["sdpa"]]
                for name, seconds in times.items()
            ]
    return rows


def _sdpa(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    layer, causal = model.model.layers[0].self_attn, q.shape[2] > 1
    return lambda: sdpa_attention_forward(layer, q, k, v, None, scaling=HEAD**-0.5, is_causal=causal)


def _layer(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    layer = model.model.layers[0].self_attn
    return lambda: heed_attention(layer, q, k, v, None, scaling=HEAD**-0.5)


class TinyHost:
    """A trained tiny model, questions about scenes it has not seen, and its sinks."""

    def __init__(self, seed: int, steps: int) -> None:
        self.model, self.processor = tiny_model(seed), tiny_processor()
        train_tiny(self.model, self.processor, steps=steps, seed=seed)
        random = np.random.default_rng([seed, 7])
        self.images, self.texts, self.answers = [], [], []
        for i in range(ASKED):
            scene, there = draw_scene(random), i % 2 == 0
            self.images.append(scene.image)
            self.texts.append(question(draw_name(scene, there, random)))
            self.answers.append("yes" if there else "no")
        self.inputs = prepare(self.model, self.processor, self.images, self.texts)
        self.sinks = find_sink_dimensions(self.model, [self.inputs])

    def log_probabilities(self) -> Tensor:
        """Of the answer's first token (N, V)."""
        with torch.inference_mode():
            return F.log_softmax(self.model(**self.inputs).logits[:, -1].float(), -1)

    def right(self, logs: Tensor) -> float:
        ids = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(self.answers))
        return (logs.argmax(-1) == ids).float().mean().item()


def removals(host: TinyHost) -> dict[str, tuple[float, float]]:
    """By what is hidden: how far the answers' distribution moves (KL divergence in nats), and accuracy."""
    plain = host.log_probabilities()
    found = {"nothing": (0.0, host.right(plain))}
    for which in ("sinks", "random"):
        generator = torch.Generator().manual_seed(0)
        removal = RemoveVisualTokens(
            sink_dimensions=host.sinks.dimensions, tau=host.sinks.tau, which=which, generator=generator
        )
        with heed.apply(host.model, removal):
            logs = host.log_probabilities()
        name = "visual sinks" if which == "sinks" else "as many others"
        found[name] = (F.kl_div(logs, plain, log_target=True, reduction="batchmean").item(), host.right(logs))
    return found


def no_extra_step(host: TinyHost) -> tuple[dict[str, float], bool]:
    """Decoder forwards per written token, plain and with VAR; and whether the weights are bit for bit the same after."""
    state, count = copy.deepcopy(host.model.state_dict()), [0]
    hook = read_host(host.model).language.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    found = {}
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    for name in ("plain", "VAR"):
        count[0] = 0
        handle = (
            heed.apply(host.model, VAR(sink_dimensions=host.sinks.dimensions, tau=host.sinks.tau))
            if name == "VAR"
            else None
        )
        answer(host.model, host.processor, host.inputs, **options)
        if handle is not None:
            handle.remove()
        found[name] = count[0] / 12
    hook.remove()
    same = all(torch.equal(value, host.model.state_dict()[key]) for key, value in state.items())
    return found, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    costs = layer_costs(given.repeats)
    extra: dict[str, Any] = {"hidden from the text": [], "decoder forwards per token": [], "weights unchanged": []}
    for seed in range(given.seeds):
        host = TinyHost(seed, given.steps)
        layers = sink_statistics(host.model, host.inputs, host.sinks.dimensions, tau=host.sinks.tau)
        extra["hidden from the text"].append(
            {
                "seed": seed,
                "visual sinks per layer": [round(layer.visual, 2) for layer in layers],
                **{name: {"KL": kl, "accuracy": accuracy} for name, (kl, accuracy) in removals(host).items()},
            }
        )
        forwards, same = no_extra_step(host)
        extra["decoder forwards per token"].append(forwards)
        extra["weights unchanged"].append(same)
    for name, values in extra.items():
        print(name, *values, sep="\n  ")
    report(
        "VAR in one attention layer, 32 heads of 128, float32, every head selected",
        ["queries x keys", "attention", "ms", "times sdpa"],
        costs,
        given.out,
        extra,
    )


if __name__ == "__main__":
    main()

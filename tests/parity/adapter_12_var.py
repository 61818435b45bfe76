"""VAR against the authors' code: its three functions alone, and inside a tiny LLaVA."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

import heed
from heed.checkpoint import load_weights
from heed.multimodal.sinks import find_sinks
from heed.multimodal.var import VAR, redistribute, select_heads


def run(case: Case) -> dict[str, Tensor]:
    return {"core": core, "tiny_llava": tiny_llava}[case.kind](case)


def core(case: Case) -> dict[str, Tensor]:
    c, given = case.config, case.inputs
    layers, length = c["num_layers"], c["seq_len"]
    last = layers - 1 if c["skip_last_layer"] else layers
    sinks = find_sinks(given["hidden_states"], c["sink_dims"], c["tau"])  # (L, 1, T)
    sinks[: c["first_sink_layer"]] = False
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, c["image_start"] : c["image_start"] + c["image_len"]] = True
    after = torch.arange(length) >= c["image_start"] + c["image_len"]

    def steer(layer: int, weights: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        grown = weights.shape[-1] - length
        found, where = (torch.nn.functional.pad(mask, (0, grown)) for mask in (sinks[layer], image))
        acts = (found & where).any() and layer < last
        selected = select_heads(weights, found, where, rho=c["rho"], summ=c["summ"]) & acts
        return redistribute(weights, found, where, selected & queries, p=c["p"]), selected

    prefill = [steer(layer, given["attn_prefill"][layer], after) for layer in range(layers)]
    results = {
        "output.sink_mask": sinks[:, 0],
        "output.head_query_selected": torch.stack([selected[0] for _, selected in prefill]),
        "output.attn_prefill": torch.stack([weights for weights, _ in prefill]),
    }
    for name in (name for name in given if name.startswith("attn_decode")):
        step = name.removeprefix("attn_")
        steered = [steer(layer, given[name][layer], torch.tensor(True)) for layer in range(layers)]
        results[f"output.{name}"] = torch.stack([weights for weights, _ in steered])
        results[f"output.head_selected_{step}"] = torch.stack([selected[0, :, 0] for _, selected in steered])
    return {name: value.float() for name, value in results.items()}


@torch.no_grad()
def tiny_llava(case: Case) -> dict[str, Tensor]:
    c = case.config
    model = LlavaForConditionalGeneration(LlavaConfig(**c["LlavaConfig"])).eval()
    load_weights(model, case.state, case.name)
    inputs = {"input_ids": case.inputs["input_ids"], "pixel_values": case.inputs["pixel_values"]}
    results = {"output.logits_plain": model(**inputs).logits}
    names = {"sink_dimensions": "sink_dims", "first_layer": "first_sink_layer"}
    settings = {
        name: c[names.get(name, name)] for name in ("sink_dimensions", "tau", "rho", "p", "summ", "first_layer")
    }
    steps = case.wanted()["output.logits_decode"].shape[1]
    with heed.apply(model, VAR(**settings, skip_last_layer=c["skip_last_layer"])) as handle:
        seen = model(**inputs, output_attentions=True, use_cache=True)
        results["output.logits_prefill"] = seen.logits
        results["output.attn_prefill"] = torch.stack(seen.attentions)
        none = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        layers = range(c["LlavaConfig"]["text_config"]["num_hidden_layers"])
        results["output.sink_mask"] = torch.cat([handle.state.sinks.get(layer, none) for layer in layers]).float()
        tokens, logits = [seen.logits[:, -1].argmax(-1)], []
        for _ in range(steps):
            seen = model(input_ids=tokens[-1][:, None], past_key_values=seen.past_key_values, use_cache=True)
            logits.append(seen.logits[:, -1])
            tokens.append(logits[-1].argmax(-1))
    return results | {"output.greedy_tokens": torch.stack(tokens, 1), "output.logits_decode": torch.stack(logits, 1)}

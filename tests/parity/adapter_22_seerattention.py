"""SeerAttention against the authors' own: a tiny Llama with prefill gates, and the gate for decoding."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from case import Case
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import heed
from heed.hosts.projections import rotate
from heed.language.seer import (
    BlockChoice,
    CompressedKeys,
    DecodeGate,
    GateDistillation,
    GateSettings,
    SeerAttention,
    SeerGates,
    decode_truth,
    gate_loss,
    load_gates,
    row_maxima,
)

_HOST = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps",
)  # fmt: skip


def run(case: Case) -> dict[str, Tensor]:
    return {"llama_full": llama, "decode_gate": decode_gate}[case.kind](case)


def llama(case: Case) -> dict[str, Tensor]:
    c = case.config
    rope = {"rope_type": "default", "rope_theta": c["rope_theta"]}
    config: Any = LlamaConfig(**{name: c[name] for name in _HOST}, rope_parameters=rope)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: value for name, value in case.state.items() if ".attn_gate." not in name})
    gates = _gates(model, case)
    out = {**_train(model, gates, case), "output.dense.logits": model(case.inputs["eval_ids"].long()).logits}
    choices = {name: BlockChoice(name, c[name], c["seerattn_last_block_dense"]) for name in ("threshold", "nz_ratio")}  # type: ignore[arg-type]
    with torch.no_grad(), heed.apply(model, SeerAttention(gates, keep=True)) as handle:
        for name, choice in choices.items():
            handle.state.choice = choice
            out[f"output.{name}.logits"] = model(case.inputs["eval_ids"].long()).logits
            for layer, (visited,) in handle.state.visited.items():
                out[f"output.{name}.block_mask.{layer}"] = visited.blocks.to(torch.uint8)
                if name == "threshold":
                    out[f"output.{name}.gate_score.{layer}"] = visited.scores.softmax(-1)
    return out


def _gates(model: LlamaForCausalLM, case: Case) -> SeerGates:
    """The case's gates, as a file of theirs."""
    c = case.config
    settings = GateSettings(
        c["seerattn_gate_type"],
        c["seerattn_gate_block_size"],
        c["seerattn_gate_hidden_size"],
        c["seerattn_gate_force_double"],
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "attn_gate_weights.safetensors"
        save_file({name: value for name, value in case.state.items() if ".attn_gate." in name}, path)
        return load_gates(model, path, settings)


def _train(model: LlamaForCausalLM, gates: SeerGates, case: Case) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    model.requires_grad_(False)
    with heed.apply(model, GateDistillation(gates)) as handle:
        handle.state.keep = True
        model(case.inputs["train_ids"].long())
        loss = handle.state.loss()
        loss.backward()
    out["output.train.mask_loss"] = loss.view(1)
    for layer, scores in handle.state.scores.items():
        truth = handle.state.truths[layer]
        skip = truth.shape[2] // 4
        out[f"output.train.gate_log_softmax.{layer}"] = scores.log_softmax(-1)[:, :, skip:]
        out[f"output.train.ground_truth.{layer}"] = truth[:, :, skip:]
        for name, value in gates[layer].named_parameters():
            assert value.grad is not None
            out[f"grad.{gates.names[layer]}.attn_gate.{name}"] = value.grad
    return out


def decode_gate(case: Case) -> dict[str, Tensor]:
    c = case.config
    gate = DecodeGate(
        c["num_q_head"],
        c["num_k_head"],
        c["head_dim"],
        c["block_size"],
        c["gate_hidden_size"],
        f"{c['q_head_pooling_type']}_{c['k_pooling']}",
        c["use_qk_norm"],
    )
    gate.load_state_dict(case.state)
    longest = max(c["lengths"])
    blocks = -(-longest // c["block_size"])
    rows: dict[str, list[Tensor]] = {name: [] for name in ("gate_score", "pooled_attention", "ground_truth")}
    outs, losses = [], []
    # Packed sequences one after the other, each as (1, heads, tokens, width).
    sequences = zip(*(case.inputs[name].split(c["lengths"]) for name in "qkv"), strict=True)
    for q, k, v in ([x.transpose(0, 1)[None] for x in sequence] for sequence in sequences):
        tables = _tables(q.shape[2], c)
        scores = gate(q, k, tables)
        rq, rk = rotate(q, *tables), rotate(k, *tables)
        truth = decode_truth(rq, rk, block=c["block_size"])
        total, elements = gate_loss(scores, truth, int(q.shape[2] * c["loss_slice_ratio"]))
        losses.append(total / (elements // truth.shape[-1] * blocks))  # a mean over the columns of the longest
        out = F.scaled_dot_product_attention(rq, rk, v, is_causal=True, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        maxima = row_maxima(rq, rk, block=c["block_size"])
        for name, x in (("gate_score", scores), ("pooled_attention", maxima), ("ground_truth", truth)):
            rows[name].append(F.pad(x, (0, blocks - x.shape[-1], 0, longest - x.shape[2])))
    loss = torch.stack(losses).mean()
    loss.backward()
    # The rows of shorter sequences hold 0, but for what no row sees; the case has -1e4 where scores are lower.
    late = torch.arange(longest)[:, None] // c["block_size"] <= torch.arange(blocks)
    rows["gate_score"] = [scores.masked_fill(late, -1e4) for scores in rows["gate_score"]]
    return {
        "output.attention": torch.cat(outs),
        "output.loss": loss.view(1),
        **{f"output.{name}": torch.cat(x) for name, x in rows.items()},
        **{f"grad.{name}": value.grad for name, value in gate.named_parameters() if value.grad is not None},
        **_decoded(gate, case),
    }


@torch.no_grad()
def _decoded(gate: DecodeGate, case: Case) -> dict[str, Tensor]:
    """The last tokens of the first sequence, one by one."""
    c = case.config
    tokens, block = c["lengths"][0], c["block_size"]
    q, k = (case.inputs[name][:tokens].transpose(0, 1)[None] for name in "qk")
    cos, sin = _tables(tokens, c)
    begin, blocks = tokens - c["decode_steps"], -(-tokens // block)
    cache = CompressedKeys(gate)
    cache.prefill(k[:, :, :begin], (cos[:, :begin], sin[:, :begin]))
    budget = BlockChoice("token_budget", c["block_budget"] * block)
    threshold = BlockChoice("threshold", c["threshold"])
    masks: dict[str, list[Tensor]] = {"budget": [], "threshold": []}
    for at in range(begin, tokens):
        now = slice(at, at + 1)
        tables = cos[:, now], sin[:, now]
        cache.append(k[:, :, now], tables)
        scores = gate.scores(gate.ask(q[:, :, now], tables), cache.blocks)
        for name, choice in (("budget", budget), ("threshold", threshold)):
            mask = choice.of_token(scores, block)[:, :, 0].float()
            masks[name].append(F.pad(mask, (0, blocks - mask.shape[-1])))
    return {
        "output.k_compressed": cache.blocks.transpose(1, 2),
        **{f"output.decode_mask_{name}": torch.stack(x, 1) for name, x in masks.items()},
    }


def _tables(tokens: int, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rotary tables (1, tokens, head_dim)."""
    width = config["head_dim"]
    angles = torch.arange(tokens)[:, None] * config["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()

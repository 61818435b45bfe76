"""SeerAttention: its gates, what they learn from, what they choose, and attention over that."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from decoders import GREEDY, SIZES, decoder, padded, prompt, steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.engine.patterns import Causal
from heed.language.seer import (
    AttnGate,
    BlockChoice,
    CompressedKeys,
    DecodeGate,
    GateDistillation,
    GateSettings,
    SeerAttention,
    SeerAttentionR,
    SeerGates,
    block_sparse_attention,
    decode_attention,
    decode_truth,
    distill,
    load_gates,
    pool_blocks,
    pooled_truth,
    row_maxima,
    save_gates,
)

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ("max", "min", "avg", "maxmin", "maxavg", "minavg", "maxminavg")
BLOCK_4 = GateSettings(block=4)
DECODE_4 = GateSettings("Qproj_Kmaxminavg", block=4, decode=True)
seeds = st.integers(0, 2**16)
few = settings(max_examples=12, deadline=None)


def qkv(queries: int, keys: int, seed: int = 0, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, four query heads, two key-value heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, queries, width), (2, 2, keys, width), (2, 2, keys, 6)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def tables(tokens: int, width: int = 8) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


def weights(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, Q, K) causal attention, formed."""
    scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~Causal(k.shape[2] - q.shape[2]).mask(q.shape[2], k.shape[2]), -torch.inf).softmax(-1)


# ---------------------------------------------------------------------------------------------------------- the gate


@few
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 8), st.sampled_from(KINDS))
def test_pooling_counts_the_tokens_that_are_there(tokens: int, block: int, lead: int, names: str) -> None:
    lead %= block
    kinds = [name for name in ("max", "min", "avg") if name in names]
    x = torch.randn(2, 3, tokens, 4)
    pooled = pool_blocks(x, kinds, block, lead)
    wide = F.pad(x, (0, 0, lead, -(lead + tokens) % block), value=math.nan).unflatten(2, (-1, block))
    there = ~wide.isnan()
    wanted = {
        "max": wide.masked_fill(~there, -torch.inf).amax(3),
        "min": wide.masked_fill(~there, torch.inf).amin(3),
        "avg": wide.nansum(3) / there.sum(3),
    }
    torch.testing.assert_close(pooled, torch.cat([wanted[kind] for kind in kinds], -1))


@pytest.mark.parametrize("queries", KINDS)
@pytest.mark.parametrize("keys", KINDS)
def test_every_combination_of_poolings_learns(queries: str, keys: str) -> None:
    gate = AttnGate(4, 2, 8, block=4, kind=f"Q{queries}_K{keys}")
    assert gate.two_maps == (queries not in ("max", "min", "avg"))
    q, k, _ = qkv(14, 14)
    scores = gate(q, k, tuple(x[:, ::4] for x in tables(14)))
    scores.log_softmax(-1).diagonal(0, 2, 3).sum().backward()
    assert scores.shape == (2, 4, 4, 4)
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in gate.parameters())


@pytest.mark.parametrize(("width", "double"), [(8, False), (8, True), (12, False)])
@pytest.mark.parametrize("offset", [8, 6])
def test_the_last_queries_have_the_scores_they_have_among_all(width: int, double: bool, offset: int) -> None:
    gate = AttnGate(4, 2, 8, block=4, width=width, force_double=double)
    q, k, _ = qkv(18, 18)
    places = tuple(x[:, ::4] for x in tables(18))
    whole, part = gate(q, k, places), gate(q[:, :, offset:], k, places)
    same = 2 if offset % 4 else 0  # a block that lacks its first tokens is pooled without them
    assert part.shape[2] == 5 - offset // 4
    torch.testing.assert_close(part[:, :, same:], whole[:, :, offset // 4 + same :])


def test_permuting_heads_permutes_the_choice() -> None:
    gate = AttnGate(4, 4, 8, block=4)
    q, k = torch.randn(1, 4, 30, 8), torch.randn(1, 4, 30, 8)
    order = torch.tensor([2, 0, 3, 1])
    turned = AttnGate(4, 4, 8, block=4)
    turned.mask_linear_k.weight.data = gate.mask_linear_k.weight.data[order]
    choice = BlockChoice("threshold", 0.15)
    blocks = choice.of_prompt(gate(q, k))
    assert torch.equal(choice.of_prompt(turned(q[:, order], k[:, order])), blocks[:, order])


def test_parameters_of_released_gates() -> None:
    with torch.device("meta"):
        llama, qwen, reasoning = AttnGate(32, 8, 128), AttnGate(28, 4, 128), DecodeGate(32, 8, 128)

    def count(gate: torch.nn.Module) -> int:
        return sum(value.numel() for value in gate.parameters())

    assert (32 * count(llama), 28 * count(qwen), 36 * count(reasoning)) == (50_331_648, 38_535_168, 33_030_144)


# ------------------------------------------------------------------------------------------------------- the choice


@few
@given(seeds, st.floats(-0.1, 0.5), st.floats(-0.1, 0.5), st.integers(1, 6))
def test_a_lower_threshold_visits_more(seed: int, a: float, b: float, rows: int) -> None:
    scores = torch.randn(1, 2, rows, 6, generator=torch.Generator().manual_seed(seed)) * 2
    scores = scores.masked_fill(torch.ones(rows, 6).triu(7 - rows).bool(), torch.finfo(torch.float32).min)
    low, high = (BlockChoice("threshold", x, last_dense=False).of_prompt(scores) for x in sorted((a, b)))
    own = torch.eye(6)[6 - rows :].bool()  # visited where nothing else is
    assert (high <= low | own).all()
    assert low.any(-1).all()
    assert not low.triu(7 - rows).any()


@few
@given(st.floats(0.01, 1.0), st.integers(1, 40))
def test_a_ratio_is_one_of_the_triangle(ratio: float, blocks: int) -> None:
    number = max(1, int((1 - math.sqrt(1 - ratio)) * blocks))
    future = torch.ones(blocks, blocks).triu(1).bool()
    scores = torch.randn(1, 1, blocks, blocks).masked_fill(future, torch.finfo(torch.float32).min)
    chosen = BlockChoice("nz_ratio", ratio, last_dense=False).of_prompt(scores)
    assert (chosen.sum(-1)[0, 0] == torch.arange(1, blocks + 1).clamp(max=number)).all()


def test_a_row_that_visits_nothing_visits_its_own_block() -> None:
    scores = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    chosen = BlockChoice("threshold", 0.3).of_prompt(scores)[0, 0]
    assert chosen[:4].tolist() == [
        [True, False, False, False, False, False],
        [True, True, False, False, False, False],
        [True, True, True, False, False, False],
        [False, False, False, True, False, False],
    ]
    assert chosen[4:].sum() == 5 + 6  # the last two are dense


# ----------------------------------------------------------------------------------------- attention over the choice


@few
@given(st.integers(1, 30), st.integers(0, 20), st.integers(1, 9), st.floats(0, 1), seeds)
def test_sparse_attention_is_attention_under_the_mask(q: int, before: int, block: int, share: float, seed: int) -> None:
    tensors = qkv(q, q + before, seed)
    for x in tensors:
        x.requires_grad_()
    columns = -(-(q + before) // block)
    rows = columns - before // block
    blocks = torch.rand(2, 4, rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    blocks[0, 0, -1, 0] = True
    results = []
    for backend in (None, "reference"):
        out = block_sparse_attention(*tensors, blocks, block, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), tensors, allow_unused=True)
        results.append([out, *(torch.zeros(1) if g is None else g for g in grads)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted if wanted.shape == ours.shape else torch.zeros_like(ours), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(block_sparse_attention(*tensors, blocks, block), results[1][0], **CLOSE)


@pytest.mark.parametrize("choice", [BlockChoice("threshold", -1e-3), BlockChoice("nz_ratio", 1.0)])
def test_everything_chosen_is_dense_attention(choice: BlockChoice) -> None:
    q, k, v = qkv(37, 37)
    blocks = choice.of_prompt(AttnGate(4, 2, 8, block=8)(q, k))
    out = block_sparse_attention(q, k, v, blocks, 8)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), **CLOSE)


# --------------------------------------------------------------------------------------------------------- the truth


@few
@given(st.integers(1, 30), st.integers(0, 20), st.integers(1, 9), seeds)
def test_the_true_map_is_the_formed_one_pooled(q: int, before: int, block: int, seed: int) -> None:
    queries, k, v = qkv(q, q + before, seed)
    full = weights(queries, k)
    truth, out = pooled_truth(queries, k, v, block=block)
    torch.testing.assert_close(out, full @ v.repeat_interleave(2, 1), **CLOSE)
    wide = F.pad(full, (0, -(q + before) % block, before % block, -(q + before) % block))
    tiles = wide.unflatten(3, (-1, block)).unflatten(2, (-1, block)).amax((3, 5))
    torch.testing.assert_close(truth, tiles / tiles.sum(-1, keepdim=True))
    torch.testing.assert_close(truth.sum(-1), torch.ones(truth.shape[:3]))
    assert not truth.triu(truth.shape[3] - truth.shape[2] + 1).any()


def test_the_true_map_in_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(30, 37)
    wanted = pooled_truth(q, k, v, block=4), row_maxima(q, k, block=4)
    monkeypatch.setattr("heed.language.seer.truth._SCORES", 1)
    got = pooled_truth(q, k, v, block=4), row_maxima(q, k, block=4)
    torch.testing.assert_close(got, wanted)


# --------------------------------------------------------------------------------------------------- in a decoder


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def neox() -> Any:
    torch.manual_seed(0)
    config = t.GPTNeoXConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return t.GPTNeoXForCausalLM(config).eval()


def yarn() -> Any:
    torch.manual_seed(0)
    rope: Any = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, rope_parameters=rope)).eval()


@pytest.mark.usefixtures("_no_grad")
@pytest.mark.parametrize("build", [neox, yarn])
def test_rotations_in_part_and_scaled(build: Any) -> None:
    """Prompts in parts turn cached keys back, so they show whether the tables are right."""
    model, ids = build(), prompt(2, 40)
    plain = model(ids).logits
    choice = BlockChoice("threshold", 0.2, last_dense=False)
    with heed.apply(model, SeerAttention(BLOCK_4, choice, std=1.0)):
        whole = model(ids).logits
        cache = t.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(16, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert not torch.allclose(whole, plain, atol=1e-3)


@pytest.mark.usefixtures("_no_grad")
def test_parts_that_end_within_a_block() -> None:
    model, ids = decoder("llama"), prompt(2, 40)
    plain = model(ids).logits
    with heed.apply(model, SeerAttention(BLOCK_4, BlockChoice("threshold", -1.0))):
        cache = t.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(7, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), plain, **CLOSE)


@pytest.mark.usefixtures("_no_grad")
def test_density_is_reported_and_changed_at_run_time() -> None:
    model, inputs = decoder("qwen3"), padded(prompt(2, 40), [0, 8])
    with heed.apply(model, SeerAttention(BLOCK_4, std=1.0, keep=True)) as handle:
        with pytest.raises(RuntimeError, match="no prompt"):
            handle.state.density()
        densities = []
        for value in (-1.0, 0.02, 0.1, 0.3, 0.999):
            handle.state.choice = BlockChoice("threshold", value, last_dense=False)
            model(**inputs)
            densities.append(handle.state.density())
        assert densities[0].shape == (2, 4)
        assert (densities[0] == 1).all()
        assert all((a >= b).all() and a.mean() > b.mean() for a, b in itertools.pairwise(densities))
        visited = handle.state.visited[1]
        assert sorted(x.blocks.shape for x in visited) == [(1, 4, 8, 8), (1, 4, 10, 10)]
        model.generate(prompt(1, 20), **GREEDY)
        assert handle.state.visited[0][0].blocks.shape == (1, 4, 5, 5)  # of the prompt, not of what was decoded
        lines = handle.state.report().splitlines()
    assert lines[0].startswith("density ")
    assert len(lines) == 3


def _trained(texts: int = 30, tokens: int = 64) -> tuple[Any, list[Tensor]]:
    """A decoder whose attention has something to be found: larger weights than fresh ones."""
    model = decoder("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(12)
        layer.self_attn.k_proj.weight.data.mul_(12)
    generator = torch.Generator().manual_seed(1)
    return model, [torch.randint(3, 37, (4, tokens), generator=generator) for _ in range(texts)]


@pytest.mark.parametrize("settings", [BLOCK_4, DECODE_4], ids=["prompts", "decoding"])
def test_gates_learn_and_the_model_does_not(settings: GateSettings) -> None:
    model, batches = _trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = SeerGates(model, settings, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    losses = distill(model, gates, batches, steps=30, lr=1e-2, warmup=3, after=lambda step, loss: seen.append(step))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert seen == list(range(30))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    with pytest.raises(ValueError, match="30 batches are fewer than steps=31"):
        distill(model, gates, batches, steps=31)


def _recall(model: Any, gates: SeerGates, ids: Tensor) -> float:
    """Share of the true map on the blocks that the gates choose at half density."""
    with torch.no_grad(), heed.apply(model, GateDistillation(gates)) as handle:
        handle.state.keep = True
        model(ids)
    choice = BlockChoice("nz_ratio", 0.5, last_dense=False)
    pairs = [(choice.of_prompt(handle.state.scores[i]), handle.state.truths[i]) for i in handle.state.scores]
    return torch.stack([(truth * blocks).sum(-1).mean() for blocks, truth in pairs]).mean().item()


def test_recall_of_the_true_map_rises() -> None:
    model, batches = _trained()
    gates = SeerGates(model, BLOCK_4, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 37, (4, 64), generator=torch.Generator().manual_seed(9))
    before = _recall(model, gates, ids)
    distill(model, gates, batches, steps=30, lr=1e-2, warmup=3)
    assert _recall(model, gates, ids) > before + 0.02


@pytest.mark.parametrize("settings", [BLOCK_4, DECODE_4], ids=["prompts", "decoding"])
def test_padding_has_no_part_in_the_loss(settings: GateSettings) -> None:
    model, ids = decoder("llama"), prompt(2, 40)
    gates = SeerGates(model, settings, generator=torch.Generator().manual_seed(0), std=1.0)
    with heed.apply(model, GateDistillation(gates)) as handle:
        with pytest.raises(RuntimeError, match="was not called"):
            handle.state.loss()
        model(**padded(ids, [8, 8]))
        together = handle.state.losses()
        model(ids[:, 8:])
        alone = handle.state.losses()
    torch.testing.assert_close(together, alone, **CLOSE)


def test_the_loss_is_the_mean_over_all_elements() -> None:
    model, ids = decoder("llama"), prompt(2, 40)
    gates = SeerGates(model, BLOCK_4, generator=torch.Generator().manual_seed(0), std=1.0)
    with heed.apply(model, GateDistillation(gates)) as handle:
        handle.state.keep = True
        plain = model(ids).logits
        losses = handle.state.losses()
    torch.testing.assert_close(plain, model(ids).logits, **CLOSE)
    for layer, loss in losses.items():
        scores, truth = handle.state.scores[layer][:, :, 2:], handle.state.truths[layer][:, :, 2:]
        wanted = F.kl_div(scores.log_softmax(-1), truth, reduction="none").mean()
        torch.testing.assert_close(loss, wanted)


def test_model_and_gates_learn_together() -> None:
    """The model's own loss does not reach the gates; theirs reaches both, while the model is not frozen."""
    model, ids = yarn().train(), prompt(2, 40)
    gates = SeerGates(model, BLOCK_4)
    with heed.apply(model, GateDistillation(gates)) as handle:
        loss = model(ids, labels=ids, use_cache=False).loss
        (own,) = torch.autograd.grad(loss, [model.model.layers[0].self_attn.q_proj.weight], retain_graph=True)
        assert own.abs().sum() > 0
        unused = torch.autograd.grad(loss, list(gates.parameters()), retain_graph=True, allow_unused=True)
        assert all(grad is None for grad in unused)
        (loss + 10 * handle.state.loss()).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in gates.parameters())
    assert all(value.grad is not None for value in model.parameters())


# ------------------------------------------------------------------------------------------------- SeerAttention-R


@pytest.mark.parametrize("kind", ["Qproj", "Qavgproj", "Qavg", "Qorig"])
@pytest.mark.parametrize("norm", [False, True])
def test_compressed_keys_grow_as_the_gate_pools(kind: str, norm: bool) -> None:
    gate = DecodeGate(4, 2, 8, block=4, kind=f"{kind}_Kmaxminavg", qk_norm=norm)
    q, k, _ = qkv(22, 22)
    cos, sin = tables(22)
    whole = gate(q, k, (cos, sin))
    cache = CompressedKeys(gate, first_token=True)
    with torch.no_grad():
        cache.prefill(k[:, :, :6], (cos[:, :6], sin[:, :6]))
        for at in range(6, 22):
            now = cos[:, at : at + 1], sin[:, at : at + 1]
            cache.append(k[:, :, at : at + 1], now)
            scores = gate.scores(gate.ask(q[:, :, at : at + 1], now), cache.blocks)
            past = at // 4
            torch.testing.assert_close(scores[..., :past], whole[:, :, at : at + 1, :past], **CLOSE)
            if at % 4 < 3:
                assert not cache.blocks[:, :, past].any()
    assert (cache.tokens, cache.tail.shape[2], cache.blocks.shape[2]) == (22, 2, 6)
    assert (whole[:, :, 5, 1:] == -1e20).all()


def test_decode_truth_rows_sum_to_one() -> None:
    q, k, _ = qkv(13, 22)
    truth = decode_truth(q, k, block=4)
    torch.testing.assert_close(truth.sum(-1), torch.ones(2, 2, 13))
    assert not decode_truth(k[:, :, :4].repeat(1, 2, 1, 1), k[:, :, :4], block=4).any()


def test_decode_attention_is_attention_under_the_mask() -> None:
    q, k, v = qkv(1, 22)
    blocks = torch.rand(2, 2, 1, 6) < 0.4
    blocks[..., -1] = True
    seen = blocks.repeat_interleave(4, -1)[..., :22].repeat_interleave(2, 1)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(decode_attention(q, k, v, blocks, 4), wanted, **CLOSE)


@pytest.mark.usefixtures("_no_grad")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_decoding_with_room_for_all_is_the_model_itself(name: str) -> None:
    model, inputs = decoder(name), padded(prompt(), [0, 5])
    inputs.pop("position_ids")
    ways = [GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "prefill_chunk_size": 9}]
    plain = [model.generate(**inputs, **way) for way in ways]
    with heed.apply(model, SeerAttentionR(DECODE_4, BlockChoice("token_budget", 4096))):
        assert all(
            torch.equal(model.generate(**inputs, **way), wanted) for way, wanted in zip(ways, plain, strict=True)
        )
    with heed.apply(model, SeerAttentionR(DECODE_4, BlockChoice("threshold", -1.0))):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain[0])


def _steps(model: Any, inputs: dict[str, Tensor], new: Tensor, cache: Any = None) -> Tensor:
    cache = t.DynamicCache(config=model.config) if cache is None else cache
    return steps(model, cache, inputs, new)


@pytest.mark.usefixtures("_no_grad")
@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_decoding_of_a_padded_batch_is_the_loop_over_its_rows(name: str, oracle: bool) -> None:
    model, ids, new = decoder(name), prompt(3, 40), prompt(3, 9)
    plain = _steps(model, {"input_ids": ids}, new)
    with heed.apply(model, SeerAttentionR(DECODE_4, BlockChoice("token_budget", 8), oracle=oracle, std=1.0)):
        ours = _steps(model, {"input_ids": ids}, new)
        assert torch.allclose(ours[:, 0], plain[:, 0], **CLOSE)
        assert not torch.allclose(ours[:, 1:], plain[:, 1:], atol=1e-4)
        together = _steps(model, padded(ids, [0, 3, 17]), new)
        for row, some in enumerate((0, 3, 17)):
            one = slice(row, row + 1)
            alone = _steps(model, {"input_ids": ids[one, some:]}, new[one])
            torch.testing.assert_close(together[one], alone, **CLOSE)
        static = t.StaticCache(config=model.config, max_cache_len=64)
        torch.testing.assert_close(_steps(model, {"input_ids": ids}, new, static), ours, **CLOSE)
        beams = {**GREEDY, "num_beams": 3}
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams))


@pytest.mark.usefixtures("_no_grad")
def test_compressed_keys_are_made_again_where_the_cache_is_another() -> None:
    """A cache that heed did not see growing: its keys are turned back, and blocks rotate as their first token."""
    model, ids, new = decoder("llama"), prompt(2, 40), prompt(2, 3)
    method = SeerAttentionR(DECODE_4, BlockChoice("token_budget", 8), first_token=True, std=1.0)
    with heed.apply(model, method):
        wanted = _steps(model, {"input_ids": ids}, new)[:, 1:]
    cache = t.DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with heed.apply(model, method) as handle:
        got = torch.cat([model(one, past_key_values=cache).logits for one in new.split(1, 1)], 1)
        assert handle.state.blocks[0].shape == (2, 2, 1, 11)
        assert (handle.state.blocks[0].sum(-1) <= 3).all()
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.usefixtures("_no_grad")
def test_the_oracle_keeps_more_than_fresh_gates() -> None:
    q, k, _ = qkv(1, 64, width=8)
    maxima = row_maxima(3 * q, k, block=4).unflatten(1, (2, 2)).amax(2)
    gate = DecodeGate(4, 2, 8, block=4)
    fresh = gate(3 * q, k)
    choice = BlockChoice("token_budget", 16)
    best, chance = ((maxima * choice.of_token(x, 4)).sum() for x in (maxima.log(), fresh))
    assert best >= chance


# --------------------------------------------------------------------------------------------------- saved gates


@pytest.mark.parametrize("settings", [GateSettings(block=4, width=12), DECODE_4], ids=["prompts", "decoding"])
def test_gates_are_saved_and_loaded_alone(settings: GateSettings, tmp_path: Path) -> None:
    model = decoder("qwen3")
    gates = SeerGates(model, settings)
    save_gates(gates, tmp_path / "gates.safetensors")
    loaded = load_gates(model, tmp_path / "gates.safetensors")
    assert loaded.settings == settings
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in gates.state_dict().items())
    inner = load_gates(model.model, tmp_path / "gates.safetensors")  # whose layers have other names
    assert list(inner.names.values()) == ["layers.0.self_attn", "layers.1.self_attn"]


def authors(gates: SeerGates, folder: Path, **config: object) -> Path:
    """What the authors release."""
    state = {
        f"model.layers.{number}.self_attn.attn_gate.{name}": value
        for number in gates.names
        for name, value in gates[number].state_dict().items()
    }
    torch.save(state, folder / "attn_gate_weights.pth")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_authors_files(tmp_path: Path) -> None:
    model = decoder("llama")
    gates = SeerGates(model, GateSettings("Qmaxavg_Kmin", block=16, width=8))
    folder = authors(gates, tmp_path, seerattn_gate_type="Qmaxavg_Kmin", seerattn_gate_block_size=16)
    loaded = load_gates(model, folder)
    assert loaded.settings == gates.settings
    assert torch.equal(loaded[1].mask_linear_k.weight, gates[1].mask_linear_k.weight)  # type: ignore[union-attr]

    reasoning = SeerGates(model, GateSettings("Qavgproj_Kmaxminavg", width=8, decode=True, qk_norm=True))
    assert load_gates(model, authors(reasoning, tmp_path)).settings == reasoning.settings

    nameless = SeerGates(model, GateSettings("Qavg_Kmaxminavg", decode=True))
    with pytest.raises(ValueError, match="does not say what its gates make of queries"):
        load_gates(model, authors(nameless, tmp_path))
    assert load_gates(model, tmp_path, nameless.settings)[0].queries == "avg"  # type: ignore[union-attr]


def test_gates_of_another_model(tmp_path: Path) -> None:
    model = decoder("llama")
    path = tmp_path / "gates.safetensors"
    save_gates(SeerGates(model, BLOCK_4), path)
    other = t.LlamaForCausalLM(t.LlamaConfig(**{**SIZES, "num_attention_heads": 8}))
    with pytest.raises(ValueError, match=r"in layer 0 the gate has the shapes .*\(4, 24, 8\).* needs .*\(8, 24, 8\)"):
        load_gates(other, path)
    short = t.LlamaForCausalLM(t.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="a gate for layer 1"):
        load_gates(short, path)
    with pytest.raises(ValueError, match=r"layer 0 .*\(4, 2\) do not fit a model with \(8, 2\)"):
        heed.apply(other, SeerAttention(SeerGates(model, BLOCK_4)))
    with pytest.raises(ValueError, match="gates for decoding, and gates for prompts are needed"):
        heed.apply(model, SeerAttention(SeerGates(model, DECODE_4)))
    with pytest.raises(ValueError, match="gates for prompts, and gates for decoding are needed"):
        heed.apply(model, SeerAttentionR(SeerGates(model, BLOCK_4)))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no gate's weight"):
        load_gates(model, tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError):
        load_gates(model, tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttnGate(4, 2, 8, kind="Qmean_Kmax"), "unknown gate type"),
        (lambda: AttnGate(4, 2, 8, kind="Qavg_Kmaxmax"), "names a pooling twice"),
        (lambda: AttnGate(4, 2, 8, kind="Qproj_Kmax"), "is for decoding"),
        (lambda: DecodeGate(4, 2, 8, kind="Qmax_Kmax"), "unknown gate type for decoding"),
        (lambda: AttnGate(4, 3, 8), "not a multiple"),
        (lambda: DecodeGate(4, 3, 8), "not a multiple"),
        (lambda: DecodeGate(4, 2, 8, width=16, kind="Qavg_Kmax"), "must be head_dim"),
        (lambda: AttnGate(4, 2, 8, block=0), "block=0 must be an integer >= 1"),
        (lambda: GateSettings(block=True), "block=True must be an integer"),
        (lambda: GateSettings(width=2.5), "width=2.5 must be an integer"),  # type: ignore[arg-type]
        (lambda: GateSettings(qk_norm=True), "for the gates of decoding"),
        (lambda: GateSettings("Qproj_Kmax", decode=True, force_double=True), "for the gates of prompts"),
        (lambda: BlockChoice("best", 1), "unknown method 'best'"),  # type: ignore[arg-type]
        (lambda: BlockChoice("threshold", 1.0), "threshold=1.0 must be below 1"),
        (lambda: BlockChoice("threshold", math.nan), "must be below 1"),
        (lambda: BlockChoice("nz_ratio", 0.0), "nz_ratio=0.0 must be above 0"),
        (lambda: BlockChoice("nz_ratio", 1.5), "at most 1"),
        (lambda: BlockChoice("token_budget", 0), "whole number of tokens"),
        (lambda: BlockChoice("token_budget", 64).of_prompt(torch.zeros(1, 1, 2, 2)), "is for decoding"),
        (lambda: BlockChoice("nz_ratio", 0.5).of_token(torch.zeros(1, 1, 1, 2), 4), "is for prompts"),
        (lambda: AttnGate(4, 2, 8)(*qkv(0, 0)[:2]), "at least one"),
        (lambda: DecodeGate(4, 2, 8)(*qkv(5, 4)[:2]), "must be the last tokens"),
        (lambda: pooled_truth(*qkv(0, 0)[:2]), "at least one"),
        (lambda: block_sparse_attention(*qkv(5, 4), torch.ones(2, 4, 1, 1).bool()), "must be the last tokens"),
        (lambda: block_sparse_attention(*qkv(5, 5), torch.ones(2, 4, 2, 2).bool(), 4, backend="cuda"), "backend"),
        (lambda: block_sparse_attention(*qkv(5, 5), torch.ones(2, 4, 1, 2).bool(), 4), "does not fit"),
        (lambda: AttnGate(4, 2, 8, width=4)(*qkv(5, 5)[:2], tables(1)), "narrower than the host's rotary table"),
        (lambda: AttnGate(4, 2, 8, block=4)(*qkv(5, 5)[:2], tables(5)), "one row for the start of each block"),
        (lambda: SeerGates(decoder("llama"), GateSettings(width=4)), "narrower than the host's rotary table, 8"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rotation_of_neighbouring_channels_is_refused() -> None:
    model = t.CohereForCausalLM(t.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}))
    with (
        heed.apply(model, SeerAttention(BLOCK_4)),
        pytest.raises(ValueError, match="pairs of neighbouring channels"),
        torch.no_grad(),
    ):
        model(prompt())


def test_a_prompt_shorter_than_a_block_and_training_on_it() -> None:
    model, ids = decoder("llama"), prompt(2, 3)
    gates = SeerGates(model)
    with torch.no_grad(), heed.apply(model, SeerAttention(gates)):
        sparse = model(ids).logits
    torch.testing.assert_close(sparse, model(ids).logits, **CLOSE)
    with heed.apply(model, GateDistillation(gates)) as handle:
        model(ids)
    assert handle.state.loss().isfinite()

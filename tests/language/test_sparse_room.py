"""What every method that makes attention sparse must do in a decoder, driven through transformers; one line per method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as t
from decoders import DECODERS, GREEDY, SIZES, decoder, padded, prompt, steps
from torch import Tensor, nn

import heed
from heed.engine.patterns import Strided, Window
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.hip import HiP
from heed.language.patterned import Patterned
from heed.language.seer import BlockChoice, GateSettings, SeerAttention, SeerAttentionR
from heed.methods import Handle, Method

_HIP: dict[str, Any] = {"block_q": 4, "window": 4, "sinks": 2, "dense_layers": (), "dense_queries": 0}
# Each so small that a prompt of 23 tokens is sparse.
SPARSE: dict[str, Method] = {
    "hip": HiP(mask_k=8, refresh=3, **_HIP),
    "hip_groups": HiP(mask_k=8, block_k=1, group=2, scale_window=True, refresh=1, **_HIP),
    "patterned": Patterned(Window(5) | Strided(8)),
    "seer": SeerAttention(GateSettings(block=4), BlockChoice("threshold", 0.22, last_dense=False), std=1.0),
}
# And so large that nothing is left out.
FAITHFUL: dict[str, Method] = {
    "hip": HiP(mask_k=64, **_HIP),
    "patterned": Patterned(Window(64)),
    "seer": SeerAttention(GateSettings(block=4), BlockChoice("threshold", -1.0)),
    "seer_r": SeerAttentionR(GateSettings("Qproj_Kmaxminavg", 4, decode=True), BlockChoice("token_budget", 64)),
}
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}

sparse = pytest.mark.parametrize("method", SPARSE.values(), ids=list(SPARSE))
faithful = pytest.mark.parametrize("method", FAITHFUL.values(), ids=list(FAITHFUL))
decoders = pytest.mark.parametrize("name", DECODERS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def cache_of(model: Any) -> t.DynamicCache:
    return t.DynamicCache(config=model.config)


@sparse
@decoders
def test_it_changes_the_model_and_afterwards_not(name: str, method: Method) -> None:
    model, ids = decoder(name), prompt()
    plain, generated = model(ids).logits, model.generate(ids, **GREEDY)
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    with heed.apply(model, method):
        changed = model(ids).logits
        assert changed.isfinite().all()
        assert not torch.allclose(changed[:, -1], plain[:, -1], atol=1e-6)
        torch.testing.assert_close(changed[:, :4], plain[:, :4], **CLOSE)  # the first tokens see all there is
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(ids, **GREEDY), generated)
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes


@faithful
@decoders
def test_with_room_for_all_keys_it_is_the_model_itself(name: str, method: Method) -> None:
    model, inputs = decoder(name), padded(prompt(), [0, 5])
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    inputs.pop("position_ids")
    ways = [GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "prefill_chunk_size": 9}, {**GREEDY, "do_sample": True}]

    def texts() -> list[Tensor]:
        return [(torch.manual_seed(3), model.generate(**inputs, **way))[1] for way in ways]

    plain = texts()
    with heed.apply(model, method):
        positions = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        ours = model(**inputs, **positions).logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(ours, logits, **CLOSE)
        for wanted, got in zip(plain, texts(), strict=True):
            assert torch.equal(got, wanted)


@sparse
@decoders
def test_a_padded_batch_is_the_loop_over_its_rows(name: str, method: Method) -> None:
    model, ids, new = decoder(name), prompt(3, 40), prompt(3, 9)
    padding = [0, 3, 17]
    with heed.apply(model, method):
        together = steps(model, cache_of(model), padded(ids, padding), new)
        for row, some in enumerate(padding):
            one = slice(row, row + 1)
            alone = steps(model, cache_of(model), {"input_ids": ids[one, some:]}, new[one])
            torch.testing.assert_close(together[one], alone, **CLOSE)


@sparse
def test_padding_on_the_right(method: Method) -> None:
    model, ids = decoder("llama"), prompt(2, 40)
    keep = (torch.arange(40) < torch.tensor([40, 29])[:, None]).long()
    with heed.apply(model, method):
        together = model(ids, attention_mask=keep).logits
        torch.testing.assert_close(together[1:, :29], model(ids[1:, :29]).logits, **CLOSE)
        torch.testing.assert_close(together[:1], model(ids[:1]).logits, **CLOSE)


@sparse
@decoders
def test_a_prompt_in_parts(name: str, method: Method) -> None:
    """Parts that end where query blocks end see what the whole prompt sees."""
    model, ids = decoder(name), prompt(2, 40)
    with heed.apply(model, method):
        whole = model(ids).logits
        cache = cache_of(model)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(16, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@sparse
def test_several_prompts_one_after_another(method: Method) -> None:
    model, new = decoder("llama"), prompt(2, 7)
    with heed.apply(model, method):
        first = steps(model, cache_of(model), {"input_ids": prompt()}, new)
        steps(model, cache_of(model), {"input_ids": prompt(2, 30)}, new)
        assert torch.equal(steps(model, cache_of(model), {"input_ids": prompt()}, new), first)


@sparse
def test_generation_is_repeatable_and_beams_are_beams(method: Method) -> None:
    model, ids = decoder("llama"), prompt()
    with heed.apply(model, method):
        for way in (GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "do_sample": True, "num_return_sequences": 2}):
            first, second = ((torch.manual_seed(3), model.generate(ids, **way))[1] for _ in range(2))
            assert torch.equal(first, second)


@sparse
def test_a_static_cache(method: Method) -> None:
    model, ids, new = decoder("llama"), prompt(), prompt(2, 6)
    with heed.apply(model, method):
        wanted = steps(model, cache_of(model), {"input_ids": ids}, new)
        static = t.StaticCache(config=model.config, max_cache_len=48)
        torch.testing.assert_close(steps(model, static, {"input_ids": ids}, new), wanted, **CLOSE)


@sparse
def test_training_goes_through_it(method: Method) -> None:
    model, ids = decoder("llama").train(), prompt()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    with heed.apply(model, method), torch.enable_grad():
        for _ in range(5):
            loss = model(ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@sparse
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: Method, dtype: torch.dtype) -> None:
    model = decoder("llama").to(dtype)
    with heed.apply(model, method):
        assert steps(model, cache_of(model), {"input_ids": prompt()}, prompt(2, 5)).isfinite().all()


@sparse
def test_layers_with_a_window_are_left_alone(method: Method) -> None:
    gemma = decoder("gemma3")
    with heed.apply(gemma, method):
        ruled = [bool(getattr(layer.self_attn, "_heed_rules", None)) for layer in gemma.model.layers]
    assert ruled == [False, True]
    mistral = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=4))
    with pytest.raises(ValueError, match="2 have a sliding window of their own"):
        heed.apply(mistral, method)
    assert mistral.config._attn_implementation != "heed"


@sparse
def test_hosts_that_are_no_decoders(method: Method) -> None:
    vit = t.ViTModel(t.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(TypeError, match="not causal"):
        heed.apply(vit, method)
    with pytest.raises(TypeError, match="no model of transformers"):
        heed.apply(nn.Linear(2, 2), method)


@sparse
def test_masks_that_are_more_than_causality_and_padding(method: Method) -> None:
    model, ids = decoder("llama"), prompt()
    packed = torch.ones(23, 23, dtype=torch.bool).tril()
    packed[10:, :10] = False  # two documents in one row
    causal = torch.zeros(23, 23).masked_fill(torch.ones(23, 23).triu(1).bool(), torch.finfo(torch.float32).min)
    with heed.apply(model, method):
        with pytest.raises(NotImplementedError, match="more than causality and padding"):
            model(ids, attention_mask=packed.expand(2, 1, -1, -1))
        with pytest.raises(NotImplementedError, match="adds a bias"):
            model(ids, attention_mask=(causal - torch.ones(23, 23).tril(-1)).expand(2, 1, -1, -1))
        additive = model(ids, attention_mask=causal.expand(2, 1, -1, -1)).logits
        torch.testing.assert_close(additive, model(ids).logits, **CLOSE)


class _Half(AttentionRule):
    """Halves the outputs of the heads."""

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        return out / 2


class _Watch(AttentionRule):
    """Sees the weights."""

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return weights


class _Probe(Method):
    def __init__(self, rule: AttentionRule) -> None:
        self.rule = rule

    def attach(self, host: Any, handle: Handle) -> None:
        attach_rule(host, self.rule, handle)


@sparse
def test_stacking(method: Method) -> None:
    model, ids = decoder("llama"), prompt()
    with heed.apply(model, method):
        alone = model(ids).logits
        with heed.apply(model, _Probe(_Half())):
            assert not torch.allclose(model(ids).logits, alone)
        with pytest.raises(ValueError, match="never forms the attention weights"):
            heed.apply(model, _Probe(_Watch()))
        with pytest.raises(ValueError, match="each compute"):
            heed.apply(model, method)
        assert torch.equal(model(ids).logits, alone)


@pytest.mark.parametrize("name", ["hip", "patterned", "seer"])
def test_a_compiled_model(name: str) -> None:
    """Graphs break where a method looks at values; the numbers are the same."""
    method = SPARSE[name]
    model, ids = decoder("llama"), prompt()
    with heed.apply(model, method):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **CLOSE)

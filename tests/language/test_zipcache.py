"""ZipCache's own claims: what is stored, how much, when, and in which precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as t
from decoders import GREEDY, SIZES, decoder, padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.hosts.rules import AttentionCall
from heed.language.caches.rule import CacheRule
from heed.language.moh import convert_to_moh
from heed.language.quantise import quantise
from heed.language.zipcache import MixedStore, Precision, ZipCache, compression_ratio

PRECISION = Precision(4, 2, "channel")


def cached(settings_: ZipCache, prompt_: tuple[Tensor, Tensor, Tensor]) -> Any:
    """One layer's cache after a prompt of queries, keys and values."""
    rule = CacheRule()
    layer = settings_.layer(0, rule)
    q, k, v = prompt_
    layer.update(k, v)
    rule.after(AttentionCall(torch.nn.Identity(), 0, q, k, v, None, True, q.shape[-1] ** -0.5), q.transpose(1, 2))
    return layer


def states(tokens: int, heads: int = 2, width: int = 8, batch: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(batch, heads, tokens, width, generator=generator).to(dtype) for _ in range(3))


def test_the_formula_of_the_paper() -> None:
    assert compression_ratio(4096, 4096) == pytest.approx(4.979, abs=5e-4)
    four = {"regular": 0.0, "salient_bits": 4}
    assert compression_ratio(4096, 4096, **four, keys="group", values="group") == pytest.approx(3.2)
    separable = compression_ratio(4096, 4096, **four, keys="channel-separable", values="channel-separable")
    assert separable == pytest.approx(3.99, abs=5e-3)
    assert compression_ratio(4096, 4096, heads=32) < compression_ratio(4096, 4096)


def test_at_4096_tokens_the_cache_is_4_9_times_smaller_and_the_formula_true() -> None:
    """One layer of the shape of Llama 3 8B: 8 key-value heads of 128 channels, float16."""
    q, k, v = states(4096, heads=8, width=128, dtype=torch.float16)
    rule = CacheRule()
    layer = ZipCache(recent=0.01, random=0.0).layer(0, rule)  # fewer probes, for speed: they do not change the size
    layer.update(k, v)
    rule.after(AttentionCall(torch.nn.Identity(), 0, q, k, v, None, True, 0.1), q.transpose(1, 2))
    assert layer.full_nbytes == 4096 * 2 * 8 * 128 * 2
    ratio = layer.full_nbytes / layer.nbytes
    assert ratio > 4.9
    assert ratio == pytest.approx(compression_ratio(4096, 1024, heads=8), rel=1e-3)
    parts = layer.parts()
    assert (parts["codes"] + parts["parameters"]) == pytest.approx(
        layer.full_nbytes / compression_ratio(4096, 1024), rel=0.02
    )
    assert parts["lists"] == int(0.4 * 4096) * 8 * 2
    assert parts["tail"] == 0


@settings(max_examples=12)
@given(st.integers(1, 24), st.sampled_from([0.0, 0.3, 0.4, 1.0]), st.sampled_from([0, 5]), st.integers(0, 9))
def test_tokens_come_back_to_their_places(tokens: int, regular: float, padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 3, tokens + padding, 8)
    keep = torch.ones(2, tokens + padding, dtype=torch.bool)
    keep[1, :padding] = False
    number = int(regular * tokens)
    ids = torch.rand(2, 3, tokens).topk(number).indices + padding
    store = MixedStore.of(x, ids.to(torch.int16), Precision(8, 8, "channel-separable"), keep if padding else None)
    found = store.dequantise()
    torch.testing.assert_close(found[0], x[0], atol=0.05, rtol=0)
    torch.testing.assert_close(found[1, :, padding:], x[1, :, padding:], atol=0.05, rtol=0)
    assert (found[1, :, :padding] == 0).all()


def test_salient_and_regular_tokens_differ_in_precision() -> None:
    x = torch.randn(1, 2, 50, 8)
    ids = torch.arange(20).expand(1, 2, 20)
    loss = (MixedStore.of(x, ids, PRECISION).dequantise() - x).abs().mean((0, 1, 3))
    assert loss[20:].mean() < loss[:20].mean() / 2


def test_all_tokens_salient_is_plain_quantisation() -> None:
    x = torch.randn(2, 2, 9, 8)
    none = torch.empty(2, 2, 0, dtype=torch.long)
    for per in ("channel", "token", "channel-separable"):
        store = MixedStore.of(x, none, Precision(4, 2, per))
        plain = quantise(x.transpose(1, 2).flatten(2), 4, per).dequantise()
        assert torch.equal(store.dequantise().transpose(1, 2).flatten(2), plain)


def test_the_order_of_tokens_does_not_matter_for_keys() -> None:
    x = torch.randn(1, 2, 12, 8)
    ids = torch.tensor([[[3, 1, 7], [0, 2, 9]]])
    order = torch.randperm(12)
    moved = MixedStore.of(x[:, :, order], order.argsort()[ids], PRECISION)
    assert torch.equal(moved.dequantise(), MixedStore.of(x, ids, PRECISION).dequantise()[:, :, order])


def test_the_tail_is_exact_until_the_gap_is_full() -> None:
    model, ids, new = decoder("llama"), prompt(1), prompt(1, 5)
    with torch.no_grad(), heed.apply(model, ZipCache(gap=4)) as handle:
        cache = handle.state.cache()
        model(ids, past_key_values=cache)
        layer = cache.layers[1]
        for i in range(3):
            before = layer.held
            model(new[:, i : i + 1], past_key_values=cache)
            assert layer.held.keys is before.keys
            assert layer.held.tail_keys.shape[2] == i + 1
            assert torch.equal(layer.held.tail_keys[:, :, :i], before.tail_keys)
        cache.crop(-2)
        assert torch.equal(layer.held.tail_values, before.tail_values[:, :, :1])
        assert cache.get_seq_length() == 24
        with pytest.raises(NotImplementedError, match="cannot take back 2 tokens"):
            cache.crop(-2)
        old = layer.held.keys.ids
        model(new[:, :3], past_key_values=cache)
        assert layer.held.tail_keys.shape[2] == 0
        assert torch.equal(layer.held.keys.ids[..., : old.shape[-1]], old)  # once regular, always
        assert layer.held.keys.ids.shape[-1] == int(0.4 * 23) + int(0.4 * 4)


def test_all_queries_of_a_later_prompt_take_part_and_short_ones_wait() -> None:
    model = decoder("llama")
    with torch.no_grad(), heed.apply(model, ZipCache(gap=10)) as handle:
        cache = handle.state.cache()
        for length, tail in ((23, 0), (6, 6), (5, 0), (40, 0)):
            model(prompt(1, length), past_key_values=cache)
            assert cache.layers[0].held.tail_keys.shape[2] == tail
        assert cache.layers[0].held.keys.ids.shape[-1] == 9 + 4 + 16


def test_each_sequence_is_its_own_unless_parameters_are_shared() -> None:
    three = states(30, batch=3)
    alone = tuple(x[:1] for x in three)
    for shared, same in ((False, True), (True, False)):
        method = ZipCache(shared_parameters=shared)
        together, one = cached(method, three), cached(method, alone)
        assert torch.equal(together.held.keys.dequantise()[:1], one.held.keys.dequantise()) == same
    first, second = (cached(ZipCache(shared_parameters=shared), alone) for shared in (False, True))
    assert torch.equal(first.held.values.dequantise(), second.held.values.dequantise())


def test_shared_parameters_survive_beams() -> None:
    model, ids = decoder("llama"), prompt(3)
    order = torch.tensor([1, 1, 0])
    with torch.no_grad(), heed.apply(model, ZipCache(gap=4, shared_parameters=True)) as handle:
        cache = handle.state.cache()
        model(ids, past_key_values=cache)
        before = cache.layers[0].held.values.dequantise()
        cache.reorder_cache(order)
        assert torch.equal(cache.layers[0].held.values.dequantise(), before[order])
        assert model.generate(ids, num_beams=2, **GREEDY).shape == (3, 34)


def test_probes_are_drawn_by_the_seed() -> None:
    prompts = states(60)
    first, again, other = (cached(ZipCache(seed=seed, random=0.3), prompts) for seed in (1, 1, 2))
    assert torch.equal(first.held.keys.ids, again.held.keys.ids)
    assert not torch.equal(first.held.keys.ids, other.held.keys.ids)
    given = ZipCache(random_rows=torch.tensor([[4, 9]]))
    assert given.probe_rows(60, 0, 0).tolist() == [57, 58, 59, 4, 9]
    assert len(given.probe_rows(60, 0, 1)) == 3 + 3


def test_values_can_have_their_own_bits_and_fraction() -> None:
    model, ids = decoder("llama"), prompt(1, 20)
    method = ZipCache(gap=5, value_regular=0.8, value_salient_bits=8, value_regular_bits=4)
    with torch.no_grad(), heed.apply(model, method) as handle:
        cache = handle.state.cache()
        model(ids, past_key_values=cache)
        held = cache.layers[0].held
        assert held.keys.ids is held.values.ids  # in the prompt the keys' fraction holds for both
        assert (held.values.salient.bits, held.values.regular.bits, held.keys.regular.bits) == (8, 4, 2)
        for i in range(5):
            model(ids[:, i : i + 1], past_key_values=cache)
        held = cache.layers[0].held
        assert (held.keys.ids.shape[-1], held.values.ids.shape[-1]) == (8 + 2, 8 + 4)


def test_plain_quantisation_needs_no_apply() -> None:
    model, ids = decoder("llama"), prompt()
    plain = ZipCache(regular=0.0, salient_bits=8, gap=3)
    cache = plain.cache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))
    assert cache.nbytes < cache.full_nbytes
    with pytest.raises(ValueError, match="looks at the model's queries.*handle.state.cache()"):
        ZipCache().cache(model.config)


@torch.no_grad()
def test_more_bits_are_closer_to_the_model() -> None:
    model, ids, new = decoder("llama"), prompt(2, 60), prompt(2, 9)
    wanted = model(torch.cat([ids, new], 1)).logits[:, 60:]
    losses = []
    for low, high in ((2, 2), (2, 4), (4, 4), (8, 8)):
        with heed.apply(model, ZipCache(gap=4, salient_bits=high, regular_bits=low)) as handle:
            cache = handle.state.cache()
            model(ids, past_key_values=cache)
            found = [model(new[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
        losses.append((torch.cat(found, 1) - wanted).square().mean().item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 1000


@torch.no_grad()
def test_it_goes_with_other_methods() -> None:
    model, inputs = decoder("llama"), padded(prompt(), [0, 4])
    with convert_to_moh(model):
        alone = model(**inputs).logits
        with heed.apply(model, ZipCache()) as handle:
            cache = handle.state.cache()
            torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, alone, rtol=1e-4, atol=1e-5)
            assert cache.nbytes < cache.full_nbytes


def test_a_width_that_does_not_fill_bytes() -> None:
    config = t.LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "head_dim": 6})
    model = t.LlamaForCausalLM(config).eval()
    with heed.apply(model, ZipCache()), pytest.raises(ValueError, match="6 channels of 2 bits do not fill whole bytes"):
        model(prompt())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("salient_bits", 3, "salient_bits=3 cannot be packed"),
        ("regular_bits", 1, "regular_bits=1 cannot be packed"),
        ("value_regular_bits", 16, "value_regular_bits=16 cannot be packed"),
        ("regular", 1.2, "regular=1.2 must be a fraction"),
        ("regular", math.nan, "regular=nan must be a fraction"),
        ("value_regular", -0.1, "value_regular=-0.1 must be a fraction"),
        ("gap", 0, "gap=0 must be 1 or more"),
        ("group", 0, "group=0 must be 1 or more"),
        ("recent", 2.0, "recent=2.0 must be a fraction"),
        ("random", -1.0, "random=-1.0 must be a fraction"),
        ("keys", "chanel", "did you mean 'channel'"),
        ("values", "rows", "unknown quantisation 'rows'"),
        ("saliency", "normalized", "did you mean 'normalised'"),
    ],
)
def test_bad_settings(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZipCache(**{name: value})  # type: ignore[arg-type]


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="tokens=0 and channels=8 must be positive"):
        compression_ratio(0, 8)
    with pytest.raises(ValueError, match=r"regular=1.5 must be a fraction"):
        compression_ratio(8, 8, regular=1.5)

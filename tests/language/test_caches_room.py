"""What every compressing cache of the language room must do, driven through transformers; one line per cache."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as t
from decoders import DECODERS, GREEDY, SIZES, decoder, padded, prompt, steps
from some_heads import some_heads
from torch import Tensor, nn

import heed
from heed.language.caches.layer import CompressedCache, CompressedLayer, cache_nbytes
from heed.language.caches.method import CacheMethod
from heed.language.caches.storage import storage_nbytes
from heed.language.h2o import H2O
from heed.language.razor import Razor
from heed.language.zipcache import ZipCache

# Each as it is used, with short gaps so that a few steps reach everything it does.
CACHES: dict[str, CacheMethod] = {
    "zipcache": ZipCache(gap=4),
    "zipcache_groups": ZipCache(gap=4, keys="group", values="token", group=8, saliency="accumulated"),
    "h2o": H2O(heavy=0.25, recent=0.25),
    "h2o_counts": H2O(heavy=5, recent=4),
    "razor": Razor(some_heads, window=1, divisor=20, sinks=1),
    "razor_rolling": Razor(some_heads, window=1, divisor=None, policy="rolling", interval=3),
    "razor_zip": Razor(some_heads, window=2, divisor=20, sinks=1, store=ZipCache(gap=4)),
}
# And so that it loses next to nothing: generation is then that of the model itself.
FAITHFUL: dict[str, CacheMethod] = {
    "zipcache": ZipCache(gap=4, salient_bits=8, regular_bits=8),
    "h2o": H2O(heavy=60, recent=4),
    "razor": Razor(some_heads),
    "razor_zip": Razor(some_heads, store=ZipCache(gap=4, salient_bits=8, regular_bits=8)),
}
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}

caches = pytest.mark.parametrize("method", CACHES.values(), ids=list(CACHES))
faithful = pytest.mark.parametrize("method", FAITHFUL.values(), ids=list(FAITHFUL))
decoders = pytest.mark.parametrize("name", DECODERS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".* leaves 1 of 2 layers")
        yield


@caches
@decoders
def test_the_prompt_is_the_models_own_and_afterwards_so_is_the_model(name: str, method: CacheMethod) -> None:
    model, ids = decoder(name), prompt()
    plain, generated = model(ids).logits, model.generate(ids, **GREEDY)
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    with heed.apply(model, method) as handle:
        cache = handle.state.cache()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, plain, **CLOSE)
        assert 0 < cache.nbytes < cache.full_nbytes
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(ids, **GREEDY), generated)
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes


@faithful
@decoders
def test_generation_is_the_models_own_when_next_to_nothing_is_lost(name: str, method: CacheMethod) -> None:
    model, inputs = decoder(name), padded(prompt(), [0, 5])
    inputs.pop("position_ids")
    ways = [GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "prefill_chunk_size": 9}]
    plain = [model.generate(**inputs, **way) for way in ways]
    with heed.apply(model, method) as handle:
        for way, wanted in zip(ways, plain, strict=True):
            cache = handle.state.cache()
            assert torch.equal(model.generate(**inputs, **way, past_key_values=cache), wanted)
            assert cache.get_seq_length() == 23 + 10
            assert torch.equal(model.generate(**inputs, **way), wanted)  # a cache that generate makes


@caches
def test_sampling_is_repeatable(method: CacheMethod) -> None:
    model, ids = decoder("llama"), prompt()
    with heed.apply(model, method):
        first, second = (
            (torch.manual_seed(3), model.generate(ids, **{**GREEDY, "do_sample": True}))[1] for _ in range(2)
        )
    assert torch.equal(first, second)


@caches
@decoders
def test_a_padded_batch_is_the_loop_over_its_rows(name: str, method: CacheMethod) -> None:
    model, ids, new = decoder(name), prompt(3, 40), prompt(3, 9)
    padding = [0, 3, 17]
    with heed.apply(model, method) as handle:
        together = steps(model, handle.state.cache(), padded(ids, padding), new)
        for row, some in enumerate(padding):
            one = slice(row, row + 1)
            alone = steps(model, handle.state.cache(), {"input_ids": ids[one, some:]}, new[one])
            torch.testing.assert_close(together[one], alone, **CLOSE)


@caches
def test_beams_are_reordered_with_what_is_packed(method: CacheMethod) -> None:
    model, ids, new = decoder("llama"), prompt(3), prompt(3, 6)
    order = torch.tensor([2, 0, 0])
    with heed.apply(model, method) as handle:
        swapped, given = handle.state.cache(), handle.state.cache()
        for cache, rows in ((swapped, slice(None)), (given, order)):
            steps(model, cache, {"input_ids": ids[rows]}, new[rows, :5])
        size = swapped.nbytes
        swapped.reorder_cache(order)
        assert swapped.nbytes == size == given.nbytes
        wanted = steps(model, given, {"input_ids": new[order, 5:]}, new[order])
        torch.testing.assert_close(steps(model, swapped, {"input_ids": new[order, 5:]}, new[order]), wanted, **CLOSE)


@caches
def test_rows_are_repeated_and_selected(method: CacheMethod) -> None:
    model, ids, new = decoder("llama"), prompt(2), prompt(4, 6)
    rows = torch.tensor([0, 0, 1, 1])
    with heed.apply(model, method) as handle:
        repeated, given = handle.state.cache(), handle.state.cache()
        steps(model, repeated, {"input_ids": ids}, new[:2, :0])
        steps(model, given, {"input_ids": ids[rows]}, new[:, :0])
        repeated.batch_repeat_interleave(2)
        wanted = steps(model, given, {"input_ids": new[:, :1]}, new)
        torch.testing.assert_close(steps(model, repeated, {"input_ids": new[:, :1]}, new), wanted, **CLOSE)
        for cache in (repeated, given):
            cache.batch_select_indices(torch.tensor([False, True, True, False]))
        wanted = steps(model, given, {"input_ids": new[:2, :1]}, new[:2])
        torch.testing.assert_close(steps(model, repeated, {"input_ids": new[:2, :1]}, new[:2]), wanted, **CLOSE)


@caches
def test_several_prompts_one_after_another(method: CacheMethod) -> None:
    model, new = decoder("llama"), prompt(2, 6)
    with heed.apply(model, method) as handle:
        cache = handle.state.cache()
        first = steps(model, cache, {"input_ids": prompt()}, new)
        cache.reset()
        assert (cache.nbytes, cache.get_seq_length(), cache.report()["ratio"]) == (0, 0, 1.0)
        steps(model, cache, {"input_ids": prompt(1, 30)}, new[:1])  # of another size
        cache.reset()
        assert torch.equal(steps(model, cache, {"input_ids": prompt()}, new), first)
        more = model(prompt(2, 7), past_key_values=cache).logits  # a second question to the same text
        assert more.isfinite().all()
        assert cache.get_seq_length() == 23 + 6 + 7


@caches
def test_the_bytes_are_those_of_the_memory(method: CacheMethod) -> None:
    """All tensors that are alive after a prompt and some steps, and were not before, are the cache's."""

    def alive() -> list[Tensor]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is Tensor]

    model, inputs, new = decoder("llama"), padded(prompt(2, 64), [0, 9]), prompt(2, 6)
    with heed.apply(model, method) as handle:
        for number in (0, 2, 4, 6):
            cache = handle.state.cache()
            before = alive()
            known = {tensor.untyped_storage().data_ptr() for tensor in before}
            steps(model, cache, inputs, new[:, :number])
            ours = [tensor for tensor in alive() if tensor.untyped_storage().data_ptr() not in known]
            assert storage_nbytes(ours) == cache.nbytes == cache_nbytes(cache)
            parts = cache.report()
            kinds = sum(size for kind, size in parts.items() if kind not in ("total", "full", "ratio"))
            assert kinds == parts["total"] == cache.nbytes
            assert (
                parts["full"] == 2 * 2 * (64 + number) * 2 * 2 * 8 * 4
            )  # layers, batch, tokens, k and v, heads, float32
            del before, ours


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the GPU's allocator")
@caches
def test_the_bytes_are_those_of_the_gpus_allocator(method: CacheMethod) -> None:
    model, ids = decoder("llama").cuda(), prompt(2, 200).cuda()
    with heed.apply(model, method) as handle:
        model.generate(ids, **GREEDY)
        cache = handle.state.cache()
        gc.collect()
        before = torch.cuda.memory_allocated()
        steps(model, cache, {"input_ids": ids}, ids[:, :5])
        gc.collect()
        used = torch.cuda.memory_allocated() - before
        tensors = 2 * 20  # at most, in two layers; the allocator rounds each up to 512 bytes
        assert cache.nbytes <= used <= cache.nbytes + 512 * tensors


@caches
def test_a_cache_belongs_to_a_batch_a_model_and_the_time_its_method_is_applied(method: CacheMethod) -> None:
    model, other, ids = decoder("llama"), decoder("qwen3"), prompt()
    with heed.apply(model, method) as handle:
        cache = handle.state.cache()
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 sequences and is given 3"):
            model(prompt(3), past_key_values=cache)
        with pytest.raises(ValueError, match="a model has one cache"):
            heed.apply(model, method)
        stray = handle.state.cache()
        other(ids, past_key_values=stray)
        with pytest.raises(ValueError, match="has not seen the attention of its last step"):
            other(ids, past_key_values=stray)
        with heed.apply(other, method), pytest.raises(ValueError, match="cannot take over"):
            other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="no longer applied"):
        model(ids, past_key_values=cache)


@caches
def test_other_caches(method: CacheMethod) -> None:
    model, ids = decoder("llama"), prompt()
    used = t.DynamicCache(config=model.config)
    model(ids, past_key_values=used)
    with heed.apply(model, method):
        with pytest.raises(ValueError, match="cannot take over DynamicCache.*with 23 tokens"):
            model(ids, past_key_values=used)
        with pytest.raises(ValueError, match="leave past_key_values and cache_implementation out"):
            model.generate(ids, cache_implementation="static", **GREEDY)
        for empty in (t.DynamicCache(), t.DynamicCache(config=model.config)):  # takes part as it is
            model(ids, past_key_values=empty)
            assert isinstance(empty.layers[1], CompressedLayer)
            assert cache_nbytes(empty) < cache_nbytes(used)
        assert isinstance(model(ids).past_key_values, CompressedCache)
        assert isinstance(model.model(ids, None).past_key_values, t.DynamicCache)  # the part alone is as ever
        assert model(ids, use_cache=False).past_key_values is None


@caches
def test_what_cannot_be_taken_back(method: CacheMethod) -> None:
    model, ids = decoder("llama"), prompt()
    with heed.apply(model, method) as handle:
        cache = handle.state.cache()
        model(ids, past_key_values=cache)
        cache.crop(0)
        with pytest.raises(NotImplementedError, match="assisted generation"):
            cache.crop(-3)
        with pytest.raises(ValueError, match=r"crop\(5\): give minus the number"):
            cache.crop(5)
        assert cache.get_seq_length() == 23
        assert not cache.is_croppable
        assert not cache.is_compileable


@caches
def test_lengths_and_masks(method: CacheMethod) -> None:
    model, ids = decoder("llama"), prompt()
    with heed.apply(model, method) as handle:
        cache = handle.state.cache()
        assert (cache.get_seq_length(), cache.get_max_length(), cache.is_initialized) == (0, -1, False)
        model(ids, past_key_values=cache)
        length, offset = cache.get_mask_sizes(3, 0)
        assert (cache.get_seq_length(), length + offset, cache.is_initialized) == (23, 26, True)


@caches
def test_sliding_windows_are_left_alone_and_said_so(method: CacheMethod) -> None:
    model = decoder("gemma3")
    with pytest.warns(UserWarning, match="leaves 1 of 2 layers as they are.*: 0"):
        handle = heed.apply(model, method)
    with handle:
        cache = handle.state.cache()
        model.generate(prompt(), past_key_values=cache, **GREEDY)
        assert type(cache.layers[0]).__name__ == "DynamicSlidingWindowLayer"
        assert cache.report()["other layers"] > 0
    mistral = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=4))
    with pytest.raises(ValueError, match="all 2 layers of this model keep a sliding window"):
        heed.apply(mistral, method)
    assert mistral.config._attn_implementation != "heed"


@caches
def test_models_without_a_cache_of_this_kind(method: CacheMethod) -> None:
    vit = t.ViTModel(t.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(TypeError, match="ViTModel takes no past_key_values"):
        heed.apply(vit, method)
    with pytest.raises(TypeError, match="Linear takes no past_key_values"):
        heed.apply(nn.Linear(2, 2), method)
    config = t.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="has an encoder"):
        heed.apply(t.T5ForConditionalGeneration(config), method)


@caches
def test_training_goes_on_as_without(method: CacheMethod) -> None:
    model, ids = decoder("llama"), prompt()

    def gradient() -> Tensor:
        model.zero_grad()
        with torch.enable_grad():
            model(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    plain = gradient()
    with heed.apply(model, method):
        torch.testing.assert_close(gradient(), plain, **CLOSE)  # with a cache
        model.train()
        torch.testing.assert_close(gradient(), plain, **CLOSE)


@caches
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: CacheMethod, dtype: torch.dtype) -> None:
    model, ids = decoder("llama").to(dtype), prompt()
    with heed.apply(model, method) as handle:
        cache = handle.state.cache()
        logits = steps(model, cache, {"input_ids": ids}, prompt(2, 9))
        assert logits.isfinite().all()
        assert cache.full_nbytes == 2 * 2 * 32 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("name", ["zipcache", "h2o", "razor"])
def test_a_compiled_model(name: str) -> None:
    """Graphs break where a method looks at values; the numbers are the same."""
    method = CACHES[name]
    model, ids = decoder("llama"), prompt()
    with heed.apply(model, method):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **CLOSE)

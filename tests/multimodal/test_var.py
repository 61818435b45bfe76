"""VAR: its invariants, its settings, what it refuses, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from hosts_for_tests import IMAGE, make_host
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import heed
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.methods import Handle, Method
from heed.multimodal.host import read_host
from heed.multimodal.removal import RemoveVisualTokens
from heed.multimodal.sinks import find_sink_dimensions, find_sinks, known_dimensions, sink_score
from heed.multimodal.var import VAR, redistribute, select_heads, visual_sink_share
from heed.multimodal.watch import WatchAttention, middle_layers, sink_statistics

FEW = settings(max_examples=15)
SEEDS = st.integers(0, 10**6)
TAU, SETTINGS = 1.6, {"tau": 1.6, "rho": 0.9, "summ": 0.02}


def scene(seed: int, keys: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (2, 3, 5, K), sinks (2, K) and image tokens (2, K)."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, 5, keys, generator=random).mul(2).softmax(-1)
    return weights, torch.rand(2, keys, generator=random) < 0.3, torch.rand(2, keys, generator=random) < 0.6


@FEW
@given(SEEDS, st.floats(0, 1))
def test_rows_keep_their_sums_and_stay_probabilities(seed: int, p: float) -> None:
    weights, sinks, image = scene(seed)
    changed = redistribute(weights, sinks, image, torch.ones(2, 3, 5, dtype=torch.bool), p=p)
    torch.testing.assert_close(changed.sum(-1), weights.sum(-1), atol=1e-6, rtol=0)
    assert (changed >= 0).all()


@FEW
@given(SEEDS, st.floats(0, 0.95))
def test_who_gives_who_gets_and_who_is_left_alone(seed: int, p: float) -> None:
    weights, sinks, image = scene(seed)
    sinks[:, 0], image[:, 1], sinks[:, 1] = True, True, False  # someone to give, someone to get
    selected = select_heads(weights, sinks, image)
    changed = redistribute(weights, sinks, image, selected, p=p)
    assert torch.equal(changed[~selected], weights[~selected])
    for row, head, query in selected.nonzero().tolist():
        ratio = changed[row, head, query] / weights[row, head, query]
        others = image[row] & ~sinks[row]
        torch.testing.assert_close(ratio[sinks[row]], torch.full_like(ratio[sinks[row]], p), atol=1e-5, rtol=1e-5)
        assert (ratio[~image[row] & ~sinks[row]] == 1).all()
        torch.testing.assert_close(ratio[others], ratio[others][:1].expand(int(others.sum())), atol=1e-5, rtol=1e-5)
        assert ratio[others][0] > 1


@FEW
@given(SEEDS)
def test_p_of_1_and_impossible_thresholds_change_nothing(seed: int) -> None:
    weights, sinks, image = scene(seed)
    everything = torch.ones(2, 3, 5, dtype=torch.bool)
    assert torch.equal(redistribute(weights, sinks, image, everything, p=1.0), weights)
    assert torch.equal(redistribute(weights, torch.zeros_like(sinks), image, everything), weights)
    assert not select_heads(weights, sinks, image, rho=-0.1).any()
    assert not select_heads(weights, sinks, image, summ=1.1).any()


@FEW
@given(SEEDS, st.floats(0.01, 100))
def test_the_score_does_not_see_the_length_of_a_token(seed: int, scale: float) -> None:
    hidden = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(seed)) + 0.1
    torch.testing.assert_close(sink_score(hidden * scale, (3, 5)), sink_score(hidden, (3, 5)), atol=1e-2, rtol=1e-2)
    assert (sink_score(hidden, (3, 5)) <= 4).all()


def test_all_image_tokens_sinks_leaves_the_row() -> None:
    weights, _, image = scene(0)
    everything = torch.ones(2, 3, 5, dtype=torch.bool)
    changed = redistribute(weights, image.clone(), image, everything)
    assert torch.equal(changed, weights)
    assert (visual_sink_share(weights, image, image) > 0.99).all()


def test_half_precision_stays_in_it() -> None:
    weights, sinks, image = scene(1)
    selected = select_heads(weights.half(), sinks, image)
    changed = redistribute(weights.half(), sinks, image, selected)
    assert changed.dtype == torch.float16
    torch.testing.assert_close(changed.float(), redistribute(weights, sinks, image, selected), atol=2e-3, rtol=1e-2)


@torch.no_grad()
def test_p_of_1_in_a_host_is_the_host() -> None:
    model, batch, _ = make_host("llava")
    plain = model(**batch).logits
    for var in (VAR(sink_dimensions=(5, 11), tau=TAU, p=1.0), VAR(sink_dimensions=(5, 11), tau=TAU, rho=0.0, summ=1.0)):
        with heed.apply(model, var):
            torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_last_layer_can_be_left_alone_and_the_paper_s_p_is_the_other_part() -> None:
    model, batch, _ = make_host("llava")
    dims = find_sink_dimensions(model, [batch], tau=TAU).dimensions

    def run(**options: object) -> tuple[Tensor, set[int]]:
        with heed.apply(model, VAR(sink_dimensions=dims, **{**SETTINGS, **options})) as handle:
            return model(**batch).logits, set(handle.state.selected)

    assert run()[1] == {2, 3}
    assert run(skip_last_layer=True)[1] == {2}
    assert torch.equal(run(p=0.25)[0], run(moved_fraction=0.75)[0])
    assert not torch.equal(run(p=0.25)[0], run(moved_fraction=0.25)[0])


@torch.no_grad()
def test_no_forward_is_added_and_generated_tokens_are_no_sinks() -> None:
    model, batch, _ = make_host("llava")
    dims, count = find_sink_dimensions(model, [batch], tau=TAU).dimensions, []
    hook = read_host(model).language.register_forward_pre_hook(lambda *_: count.append(1))
    with heed.apply(model, VAR(sink_dimensions=dims, **SETTINGS)) as handle:
        model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    hook.remove()
    assert len(count) == 5
    prompt = batch["input_ids"].shape[1]
    assert all(sinks.shape == (2, prompt) for sinks in handle.state.sinks.values())
    assert not (handle.state.sinks[2] & (batch["attention_mask"] == 0)).any()


@torch.no_grad()
def test_the_next_turn_of_a_talk_goes_on_from_the_first() -> None:
    model, _, alone = make_host("llava")
    hook = read_host(model).layers[1].register_forward_hook(_plant_first)
    with heed.apply(model, VAR(sink_dimensions=(7,), tau=1.8)) as handle:
        cache = model(**alone(0), use_cache=True).past_key_values
        first = handle.state.sinks[2].clone()
        for word in (9, 11):
            cache = model(torch.tensor([[word]]), past_key_values=cache).past_key_values
        model(torch.tensor([[5, 1, 8, 4]]), past_key_values=cache)
        sinks, prompt = handle.state.sinks[2], handle.state.prompt
    hook.remove()
    length = first.shape[1]
    assert first[0].nonzero()[:, 0].tolist() == [0, 3]
    assert torch.equal(sinks[:, :length], first)
    assert sinks[0].nonzero()[:, 0].tolist() == [0, 3, length + 2]  # the turn's own first token, none generated
    assert prompt.image.shape == sinks.shape == (1, length + 6)
    assert prompt.text.all()


def _plant_first(_: nn.Module, args: object, out: Tensor) -> Tensor:
    out = out.clone()
    out[:, [0, 3] if out.shape[1] > 4 else [0], 7] = 400.0
    return out


@torch.no_grad()
def test_a_function_and_a_mask_say_where_the_image_is() -> None:
    """A language model alone, fed what LLaVA feeds it, is steered as LLaVA is."""
    model, batch, _ = make_host("llava")
    language, seen = read_host(model).language, {}
    dims = find_sink_dimensions(model, [batch], tau=TAU).dimensions
    hook = language.register_forward_pre_hook(lambda _, a, kwargs: seen.update(kwargs), with_kwargs=True)
    with heed.apply(model, VAR(sink_dimensions=dims, **SETTINGS)):
        steered = model(**batch).logits
    hook.remove()
    alone = LlamaForCausalLM(model.config.text_config).eval()
    alone.model, alone.lm_head = language, model.lm_head
    fed = {"inputs_embeds": seen["inputs_embeds"], "attention_mask": batch["attention_mask"]}
    with heed.apply(alone, VAR(sink_dimensions=dims, image_mask=batch["input_ids"] == IMAGE, **SETTINGS)):
        torch.testing.assert_close(alone(**fed).logits, steered, atol=1e-5, rtol=1e-5)
    with heed.apply(model, VAR(sink_dimensions=dims, image_mask=lambda ids: ids == IMAGE, **SETTINGS)):
        torch.testing.assert_close(model(**batch).logits, steered, atol=1e-5, rtol=1e-5)
    with heed.apply(alone, VAR(sink_dimensions=dims, **SETTINGS)):
        with pytest.raises(ValueError, match="does not know its token ids; pass `image_mask`"):
            alone(**fed)
        with pytest.raises(ValueError, match="does not say which ids are image tokens; pass `image_mask`"):
            alone(batch["input_ids"])
    wrong = VAR(sink_dimensions=dims, image_mask=lambda ids: ids[:, :2] == IMAGE, **SETTINGS)
    with heed.apply(alone, wrong), pytest.raises(ValueError, match=r"image_mask gave \(2, 2\)"):
        alone(batch["input_ids"])
    three = VAR(sink_dimensions=dims, image_mask=torch.ones(3, 40, dtype=torch.bool), **SETTINGS)
    with heed.apply(alone, three), pytest.raises(ValueError, match="does not fit a forward of 2 rows"):
        alone(**fed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 1.2}, r"rho=1.2 must be in \[0, 1\]"),
        ({"p": -0.1}, "p=-0.1 must be in"),
        ({"summ": 2.0}, "summ=2.0 must be in"),
        ({"moved_fraction": 1.5}, "moved_fraction=1.5 must be in"),
        ({"p": 0.6, "moved_fraction": 0.4}, "given together"),
        ({"tau": 0.0}, "tau=0.0 must be above 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAR(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_dimensions": (5, 32)}, "sink dimension 32 is outside the hidden size 32"),
        ({"sink_dimensions": (5, 5)}, "of hidden size 32 name one twice"),
        ({"sink_dimensions": ()}, "find_sink_dimensions proposes some"),
        ({"sink_dimensions": (5,), "tau": 20.0}, "no token can ever be a sink"),
        ({}, "sink dimensions of LlavaForConditionalGeneration with hidden size 32 are not known"),
    ],
)
def test_settings_that_do_not_fit_the_host(options: dict[str, object], message: str) -> None:
    model, batch, _ = make_host("llava")
    plain = model(**batch).logits
    with pytest.raises(ValueError, match=message):
        heed.apply(model, VAR(**{"tau": 2.0, **options}))
    assert torch.equal(model(**batch).logits, plain)


def test_presets_differ_in_rho() -> None:
    assert [VAR.preset(task).rho for task in ("vqa", "hallucination", "vision-centric")] == [0.2, 0.5, 0.1]
    assert VAR.preset("vqa", tau=3.0).tau == 3.0
    with pytest.raises(ValueError, match="unknown preset 'vqs'; did you mean 'vqa'"):
        VAR.preset("vqs")


def test_hosts_that_cannot_be_steered() -> None:
    var = VAR(sink_dimensions=(1,), tau=2.0)
    with pytest.raises(TypeError, match="Linear is not a model of transformers"):
        heed.apply(nn.Linear(2, 2), var)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(TypeError, match="encoder-decoder for text"):
        heed.apply(t5, var)


def test_attention_that_forms_no_weights_is_refused() -> None:
    class Own(AttentionRule):
        def core(self, call: AttentionCall) -> Tensor:
            return call.query.transpose(1, 2)

    class Method1(Method):
        def attach(self, host: nn.Module, handle: Handle) -> None:
            attach_rule(host, Own(), handle)

    model, batch, _ = make_host("llava")
    var = VAR(sink_dimensions=(5, 11), tau=TAU)
    with (
        heed.apply(read_host(model).language, Method1()),
        pytest.raises(ValueError, match="never forms the attention weights that VARRule needs"),
    ):
        heed.apply(model, var)
    with heed.apply(model, var):
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="the host's attention was set to 'sdpa'"):
            model(**batch)


def test_the_authors_dimensions_are_for_llama_2_only() -> None:
    def host(**changes: int) -> tuple[int, ...] | None:
        size = {
            "hidden_size": 4096,
            "intermediate_size": 8,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 9,
        }
        with torch.device("meta"):
            return known_dimensions(read_host(LlamaForCausalLM(LlamaConfig(**{**size, **changes}))))

    assert host() == (2533, 1415)
    assert host(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40) == (2100, 4743)
    assert host(num_key_value_heads=8) is None  # Llama 3


def test_the_finder_finds_what_was_planted() -> None:
    model, batch, _ = make_host("llava")
    hook = read_host(model).layers[1].register_forward_hook(_plant)
    found = find_sink_dimensions(model, [batch], count=1)
    hook.remove()
    assert found.dimensions == (7,)
    assert found.tau == pytest.approx(0.3125 * 32**0.5)
    assert found.scores[0][0] == 7
    with pytest.raises(ValueError, match="no prompt is given"):
        find_sink_dimensions(model, [])
    with pytest.raises(ValueError, match="has only 4 decoder layers"):
        find_sink_dimensions(model, [batch], first_layer=9)


def _plant(_: nn.Module, args: object, out: Tensor) -> Tensor:
    out = out.clone()
    out[:, [3, 12], 7] = 400.0
    return out


@torch.no_grad()
def test_statistics_and_attention_add_up() -> None:
    model, _, alone = make_host("llava")
    hook = read_host(model).layers[1].register_forward_hook(_plant)
    found = sink_statistics(model, alone(0), (7,), tau=1.8)
    hook.remove()
    assert [entry.layer for entry in found] == [2, 3]
    assert (found[0].visual, found[0].text) == (2, 0)  # positions 3 and 12 lie in the image
    assert len(found[0].non_sink_ratio) == 4
    assert 0 < found[0].on_visual + found[0].on_others <= 1
    with heed.apply(model, WatchAttention()) as handle:
        model.generate(**alone(0), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    seen = handle.state.on_image((2, 3))
    assert seen.shape == (3, 16)
    assert ((seen > 0) & (seen < 1)).all()
    assert middle_layers(32) == [10, 11, 12]
    assert middle_layers(4) == [2, 3]


@torch.no_grad()
def test_as_many_random_tokens_are_hidden_as_there_are_sinks() -> None:
    model, batch, _ = make_host("llava")
    hook = read_host(model).layers[1].register_forward_hook(_plant)
    masks = {}
    for which in ("sinks", "random"):
        removal = RemoveVisualTokens(
            sink_dimensions=(7,), tau=1.8, which=which, generator=torch.Generator().manual_seed(0)
        )
        with heed.apply(model, removal) as handle, heed.apply(model, WatchAttention()) as watch:
            model(**batch)
        masks[which] = handle.state.hidden[2]
        weights = watch.state.steps[0][2]
        assert (weights[handle.state.hidden[2][:, None].expand_as(weights)] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))
    hook.remove()
    assert torch.equal(masks["sinks"].sum(1), masks["random"].sum(1))
    assert not (masks["sinks"] & masks["random"]).any()
    assert (masks["random"] <= (batch["input_ids"] == IMAGE)).all()
    with pytest.raises(ValueError, match="did you mean 'sinks'"):
        RemoveVisualTokens(which="sink")  # type: ignore[arg-type]


def test_a_token_is_a_sink_above_tau_only() -> None:
    hidden = torch.zeros(1, 2, 4)
    hidden[0, 0, 1], hidden[0, 1] = 3.0, 1.0
    assert find_sinks(hidden, (1,), 1.5).tolist() == [[True, False]]
    assert sink_score(hidden, (1,))[0, 0].item() == pytest.approx(2.0, abs=1e-5)  # sqrt(4): all of it on one dimension

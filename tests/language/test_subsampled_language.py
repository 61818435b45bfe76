"""Subsampled training of hosts of three libraries, dense evaluation, stages, self-ensembles and reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as t
from decoders import DECODERS, GREEDY, SIZES, decoder, padded, prompt
from torch import Tensor, nn

import heed
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.self_ensemble import average_members, self_ensemble
from heed.language.subsampled import StochasticSubsampling, source_distances, staged, subsampling_report
from heed.layers.egt import EGT, EGTConfig
from heed.layers.subsampled import Blocks, Sources
from heed.layers.subsampling import SubsampledAttention, Subsampling
from heed.methods import Handle, Method

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
_VIT: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def logits(name: str) -> tuple[Any, Callable[[Any], Tensor]]:
    """A host in eval mode, always with the same weights, and how it is run."""
    if name in DECODERS:
        return decoder(name), lambda model: model(prompt(), use_cache=False).logits
    torch.manual_seed(0)
    vit: dict[str, Callable[[], Any]] = {
        "hf_vit": lambda: t.ViTForImageClassification(t.ViTConfig(**_VIT, image_size=16, patch_size=4)),
        "timm_vit": lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4
        ),
        "heed_vit": lambda: heed.create_model("vit_micro", img_size=16, patch_size=1, in_chans=3, depth=2),
    }
    return vit[name]().eval(), lambda model: getattr(out := model(images()), "logits", out)


HOSTS = [*DECODERS, "hf_vit", "timm_vit", "heed_vit"]
hosts = pytest.mark.parametrize("name", HOSTS)


class Watch(AttentionRule):
    """Sees the weights."""

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return weights


class Probe(Method):
    def __init__(self, rule: AttentionRule) -> None:
        self.rule = rule

    def attach(self, host: nn.Module, handle: Handle) -> None:
        attach_rule(host, self.rule, handle)


@torch.no_grad()
@hosts
def test_train_mode_draws_and_eval_mode_is_the_host(name: str) -> None:
    model, run = logits(name)
    plain, attributes = run(model), {id(m): set(vars(m)) for m in model.modules()}
    with heed.apply(model, StochasticSubsampling()) as handle:
        torch.testing.assert_close(run(model), plain, **CLOSE)
        model.train()
        first = run(model)
        assert not torch.allclose(first, plain, atol=1e-4)
        assert not torch.allclose(run(model), first, atol=1e-4)
        handle.state.dense = True
        no_draw = run(model)
        model.eval()
        if name != "gpt2":  # which has dropout
            torch.testing.assert_close(no_draw, plain, **CLOSE)
    assert torch.equal(run(model), plain)
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes


@torch.no_grad()
@hosts
def test_a_ratio_of_one_is_the_host_in_train_mode(name: str) -> None:
    model, run = logits(name)
    plain = run(model)
    for layer in model.modules():
        layer.training = "Attention" in type(layer).__name__ and name != "gpt2"
    for mode in ("unbiased", "local"):
        with heed.apply(model, StochasticSubsampling(Subsampling(mode, ratio=1))):
            torch.testing.assert_close(run(model), plain, **CLOSE)


def test_no_mask_of_all_pairs_is_formed_for_a_plain_layer_of_heed() -> None:
    model, run = logits("heed_vit")
    masks: list[object] = []

    class Look(AttentionRule):
        def before(self, call: AttentionCall) -> AttentionCall:
            masks.append(call.mask)
            return call

    with torch.no_grad(), heed.apply(model, Probe(Look())), heed.apply(model, StochasticSubsampling()):
        run(model)
    assert masks == [None, None]


@hosts
def test_it_trains(name: str) -> None:
    model, run = logits(name)
    model.train()
    target = torch.randint(0, run(model).shape[-1], run(model).shape[:-1])
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    with heed.apply(model, StochasticSubsampling(seed=0)) as handle:
        for _ in staged(handle, 12, dense=0.25):
            loss = nn.functional.cross_entropy(run(model).flatten(0, -2), target.flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_stages() -> None:
    model, run = logits("timm_vit")
    with heed.apply(model.train(), StochasticSubsampling()) as handle:
        seen = []
        for step in staged(handle, 10, dense=0.2):
            seen.append((step, handle.state.dense))
        assert seen == [(i, i >= 8) for i in range(10)]
        assert not handle.state.dense
        next(steps := staged(handle, 1, dense=1.0))
        torch.testing.assert_close(run(model), run(model))
        steps.close()  # type: ignore[attr-defined]
        assert not handle.state.dense
        with pytest.raises(ValueError, match="steps=0"):
            staged(handle, 0)
        with pytest.raises(ValueError, match="dense=2"):
            staged(handle, 4, dense=2)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_causality_and_padding_under_a_seed(name: str) -> None:
    model, inputs = decoder(name), padded(prompt(2, 24), [0, 9])
    for mode in ("unbiased", "local", "connection", "source_dropout"):
        with heed.apply(model, StochasticSubsampling(Subsampling(mode), seed=3)) as handle:
            state = handle.state
            state.always = True

            def run(**changed: Tensor) -> Tensor:
                state.generator.manual_seed(3)  # noqa: B023
                return model(**(inputs | changed), use_cache=False).logits

            wanted = run()
            assert wanted[inputs["attention_mask"].bool()].isfinite().all()
            ids = inputs["input_ids"].clone()
            ids[:, 16:] = 5
            torch.testing.assert_close(run(input_ids=ids)[:, :16], wanted[:, :16], **CLOSE)
            ids = inputs["input_ids"].clone()
            ids[1, :9] = 7  # what is in the padding
            torch.testing.assert_close(run(input_ids=ids)[1, 9:], wanted[1, 9:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_the_hosts(name: str) -> None:
    model, inputs = decoder(name), padded(prompt(), [0, 5])
    inputs.pop("position_ids")
    ways = [GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "prefill_chunk_size": 9}, {**GREEDY, "do_sample": True}]

    def texts() -> list[Tensor]:
        return [(torch.manual_seed(3), model.generate(**inputs, **way))[1] for way in ways]

    plain = texts()
    with heed.apply(model, StochasticSubsampling()):
        for wanted, got in zip(plain, texts(), strict=True):
            assert torch.equal(got, wanted)


def test_tokens_beside_a_cache_are_dense() -> None:
    model, ids = decoder("llama").train(), prompt()
    with torch.no_grad(), heed.apply(model, StochasticSubsampling()) as handle:
        cache = t.DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        handle.state.last.clear()
        model(ids[:, :4], past_key_values=cache)
        assert not handle.state.last


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_finds_the_same_draws(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = decoder("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with heed.apply(model, StochasticSubsampling()):
            torch.manual_seed(1)
            model(prompt(), labels=prompt(), use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)


def test_prefix_tokens_and_defaults_come_from_the_host() -> None:
    for name, prefix, mode in (
        ("timm_vit", 1, "unbiased"),
        ("hf_vit", 1, "unbiased"),
        ("heed_vit", 0, "unbiased"),
        ("llama", 0, "local"),
    ):
        model, run = logits(name)
        with torch.no_grad(), heed.apply(model.train(), StochasticSubsampling(ratios=(2, 8), seed=1)) as handle:
            run(model)
            assert [(s.mode, s.prefix, s.ratio) for s in handle.state.settings] == [
                (mode, prefix, 2),
                (mode, prefix, 8),
            ]
            drawn = handle.state.last[1].draw
        if isinstance(drawn, Sources):
            assert drawn.index[0, :prefix].tolist() == list(range(prefix))
            assert drawn.index.shape[1] == prefix + (256 if name == "heed_vit" else 16) // 8
        else:
            assert drawn.window == 23 // 8


def test_layers_with_a_window_and_some_layers() -> None:
    model = decoder("gemma3").train()
    with torch.no_grad(), heed.apply(model, StochasticSubsampling()) as handle:
        model(prompt(), use_cache=False)
        assert set(handle.state.last) == {1}
    model = decoder("llama").train()
    with torch.no_grad(), heed.apply(model, StochasticSubsampling(layers=(0,))) as handle:
        model(prompt(), use_cache=False)
        assert set(handle.state.last) == {0}


def test_reports() -> None:
    model, run = logits("timm_vit")
    with torch.no_grad(), heed.apply(model.train(), StochasticSubsampling(ratios=(4, 8))) as handle:
        run(model)
        first, second = subsampling_report(handle)
    assert first.fraction == pytest.approx(5 / 17)
    assert second.fraction == pytest.approx(3 / 17)
    assert first.cost.saving == pytest.approx(17 / 5)
    assert first.distances.sum() == 17 * 5
    model, run = logits("llama")
    with torch.no_grad(), heed.apply(model.train(), StochasticSubsampling(Subsampling("unbiased"))) as handle:
        run(model)
        report = subsampling_report(handle)[0]
    assert 0.2 < report.fraction < 0.5
    assert report.distances[0] == 23  # every target sees itself
    assert source_distances(Blocks(torch.arange(12)[None], 4), 12).tolist() == [12, 18, 12, 6, *[0] * 8]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "timm_vit", "heed_vit"])
def test_an_ensemble_is_the_mean_of_its_members(name: str) -> None:
    model, run = logits(name)
    plain = run(model)
    with heed.apply(model, StochasticSubsampling(ratio=2)) as handle:
        members: list[Tensor] = []
        mean = self_ensemble(model, lambda: members.append(run(model)) or members[-1], 5)  # type: ignore[func-returns-value]
        torch.testing.assert_close(mean, torch.stack(members).softmax(-1).mean(0))
        assert not torch.allclose(members[0], members[1], atol=1e-4)
        torch.testing.assert_close(self_ensemble(model, lambda: run(model), 3, "values", ratio=1), plain, **CLOSE)
        assert handle.state.ratio is None
        torch.testing.assert_close(run(model), plain, **CLOSE)
        assert not model.training


@torch.no_grad()
def test_ensembles_of_layers_that_draw() -> None:
    layer, x = SubsampledAttention(16, 2).eval(), torch.randn(1, 8, 16)
    dense = layer(x)
    assert not torch.allclose(self_ensemble(layer, lambda: layer(x), 2, "values"), dense, atol=1e-4)
    torch.testing.assert_close(self_ensemble(layer, lambda: layer(x), 2, "values", ratio=1), dense, **CLOSE)
    assert torch.equal(layer(x), dense)
    model, h, e = EGT(EGTConfig(16, 8, 4, source_dropout=0.5), 2).eval(), torch.randn(1, 6, 16), torch.randn(1, 6, 6, 8)
    assert not torch.allclose(self_ensemble(model, lambda: model(h, e)[0], 2, "values"), model(h, e)[0], atol=1e-4)
    seen: list[bool] = []
    self_ensemble(model, lambda: (seen.append(model.training), h)[1], 1, all_stochastic=True)
    assert seen == [True]
    assert not model.training


def test_passes_that_are_not_finite() -> None:
    layer, good, bad = SubsampledAttention(16, 2), torch.ones(3), torch.full((3,), torch.nan)
    queue = iter([bad, good, bad, good, good, good])
    mean = self_ensemble(layer, lambda: next(queue), 3, "values")
    assert torch.equal(mean, good)
    queue = iter([bad, bad, bad, good, bad, bad])
    with pytest.warns(UserWarning, match="1 of 6 passes"):
        self_ensemble(layer, lambda: next(queue), 3, "values")
    with pytest.raises(RuntimeError, match="none of 6 passes"):
        self_ensemble(layer, lambda: bad, 3, "values")


def test_refusals() -> None:
    model, run = logits("llama")
    with pytest.raises(ValueError, match="draws nothing"):
        self_ensemble(model, lambda: run(model))
    with pytest.raises(ValueError, match="members=0"):
        self_ensemble(SubsampledAttention(8, 2), lambda: torch.ones(1), 0)
    with pytest.raises(ValueError, match="probabilities"):
        average_members([torch.ones(2)], "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one member"):
        average_members([])
    with pytest.raises(ValueError, match="3 ratios for 2 attention layers"):
        heed.apply(model, StochasticSubsampling(ratios=(1, 2, 3)))
    with pytest.raises(ValueError, match="ratio=0.5"):
        StochasticSubsampling(ratio=0.5)
    with pytest.raises(ValueError, match=r"layers=\[2\]"):
        heed.apply(model, StochasticSubsampling(layers=(2,)))
    with pytest.raises(ValueError, match="causal attention has no tokens"):
        heed.apply(model, StochasticSubsampling(prefix=1))
    with pytest.raises(TypeError, match="no attention layers"):
        heed.apply(nn.Linear(2, 2), StochasticSubsampling())
    with heed.apply(model, StochasticSubsampling()):
        with pytest.raises(ValueError, match="never forms the attention weights"):
            heed.apply(model, Probe(Watch()))
        with pytest.raises(ValueError, match="each compute"):
            heed.apply(model, StochasticSubsampling())
    gemma = t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, layer_types=["full_attention"] * 2)).train()
    with heed.apply(gemma, StochasticSubsampling()):
        with pytest.raises(ValueError, match="caps its scores"):
            gemma(prompt(), use_cache=False)
        gemma.eval()(prompt())

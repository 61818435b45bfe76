"""Grouped-query attention with even and uneven groups, and the allocations alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.layers.allocation import evolving_allocation, key_driven_allocation, key_norms, uniform_allocation
from heed.layers.attention import PatternAttention
from heed.layers.grouped import DGQA, GQA, KDGQA, PGQA, grouped_scheme, grouped_weights, pool_heads
from heed.layers.grouped_report import AllocationLog, grouped_report

EXACT: Any = {"rtol": 1e-4, "atol": 1e-5}
norm_rows = st.lists(st.floats(0.5, 100, width=32), min_size=1, max_size=8)


def dense(layer: GQA, x: Tensor, counts: list[int]) -> Tensor:
    """The equation written out, group by group."""
    q, k, v = (part(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for part in (layer.q, layer.k, layer.v))
    outs = [
        (group * layer.scale @ k[:, i, None].mT).softmax(-1) @ v[:, i, None]
        for i, group in enumerate(q.split(counts, 1))
    ]
    return layer.proj(torch.cat(outs, 1).transpose(1, 2).flatten(2))


# -- allocations


@settings(max_examples=40)
@given(norm_rows, st.integers(1, 16), st.sampled_from(["kd", "diff", "ema"]))
def test_counts_sum_to_the_heads(row: list[float], heads: int, rule: str) -> None:
    norms = torch.tensor(row)
    cache = norms.flip(0)
    counts = key_driven_allocation(norms, heads) if rule == "kd" else evolving_allocation(norms, cache, heads, rule)
    assert counts.dtype == torch.int64
    assert counts.min() >= 0
    assert counts.sum() == heads


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=8, unique=True), st.sampled_from([0.5, 4.0]), st.integers(0, 9)
)
def test_the_key_driven_rule_ignores_scale_and_offset(row: list[int], factor: float, offset: int) -> None:
    norms = torch.tensor(row, dtype=torch.float32)
    counts = key_driven_allocation(norms, 12)
    assert torch.equal(counts, key_driven_allocation(norms * factor, 12))
    assert torch.equal(counts, key_driven_allocation(norms + offset, 12))


def test_of_two_heads_the_stronger_takes_all() -> None:
    assert key_driven_allocation(torch.tensor([3.0, 3.1]), 8).tolist() == [0, 8]


@pytest.mark.parametrize(("heads", "groups", "even"), [(12, 3, [4, 4, 4]), (8, 5, [2, 2, 2, 1, 1]), (6, 1, [6])])
def test_where_the_rules_divide_by_zero_the_split_is_uniform(heads: int, groups: int, even: list[int]) -> None:
    """The authors' code never comes back from these."""
    norms = torch.full((groups,), 2.5)
    assert key_driven_allocation(norms, heads).tolist() == even
    assert evolving_allocation(norms, norms, heads, "diff").tolist() == even
    assert evolving_allocation(0 * norms, 0 * norms, heads, "ema").tolist() == even
    assert uniform_allocation(heads, groups).tolist() == even


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_that_are_not_finite_are_an_error(value: float) -> None:
    norms = torch.tensor([1.0, value, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        key_driven_allocation(norms, 6)
    with pytest.raises(ValueError, match="not finite"):
        evolving_allocation(norms, torch.ones(3), 6)
    for layer in (KDGQA(16, 4, 2), DGQA(16, 4, 2)):
        with pytest.raises(ValueError, match="not finite"):
            layer(torch.full((1, 3, 16), value))


def test_corrections_are_drawn_or_repeatable() -> None:
    norms, cache = torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3)  # 8 / 3 each rounds to 9
    assert evolving_allocation(norms, cache, 8, draws=[2]).tolist() == [3, 3, 2]
    with pytest.raises(ValueError, match="too few"):
        evolving_allocation(norms, cache, 8, draws=[])
    drawn = [evolving_allocation(norms, cache, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="unknown kind of evolving allocation 'sum'"):
        evolving_allocation(norms, cache, 8, "sum")


def test_norms_are_per_sample_and_have_no_gradient() -> None:
    k = torch.randn(3, 2, 5, 4, requires_grad=True)
    found = key_norms(k)
    torch.testing.assert_close(found, k.flatten(2).norm(dim=-1).sum(0).detach())
    assert not found.requires_grad
    assert key_norms(k.bfloat16()).dtype == torch.float32


# -- layers


@settings(max_examples=10)
@given(st.sampled_from([(6, 3), (8, 5), (4, 4), (6, 1)]), st.integers(1, 3))
def test_kdgqa_is_the_equation(heads_groups: tuple[int, int], batch: int) -> None:
    heads, groups = heads_groups
    layer, x = KDGQA(4 * heads, heads, groups), torch.randn(batch, 7, 4 * heads)
    y = layer(x)
    torch.testing.assert_close(y, dense(layer, x, layer.allocation.tolist()), **EXACT)
    torch.testing.assert_close(layer(x.view(batch, 1, 7, -1)).flatten(1, 2), y, **EXACT)


def test_gqa_is_the_equation_and_kdgqa_with_even_groups() -> None:
    even, uneven, x = GQA(24, 6, 3), KDGQA(24, 6, 3), torch.randn(2, 7, 24)
    torch.testing.assert_close(even(x), dense(even, x, [2, 2, 2]), **EXACT)
    uneven.load_state_dict(even.state_dict())
    uneven.freeze_allocation([2, 2, 2])
    torch.testing.assert_close(uneven(x), even(x), **EXACT)


@pytest.mark.parametrize("heads", [1, 4])
def test_with_all_heads_conversion_is_exact(heads: int) -> None:
    attention, x = PatternAttention(16, heads), torch.randn(2, 5, 16)
    for kind in (GQA, KDGQA):
        layer = kind.from_attention(attention, heads)
        if isinstance(layer, KDGQA):
            layer.freeze_allocation()
        torch.testing.assert_close(layer(x), attention(x), **EXACT)


def test_with_equal_heads_in_a_group_conversion_is_exact() -> None:
    attention, x = PatternAttention(24, 6), torch.randn(2, 5, 24)
    with torch.no_grad():
        for part in (attention.qkv.weight, attention.qkv.bias):
            for kv in part[24:].chunk(2):
                heads = kv.unflatten(0, (3, 2, 4))
                heads[:, 1] = heads[:, 0]
    for pool in ("mean", "first"):
        torch.testing.assert_close(GQA.from_attention(attention, 3, pool=pool)(x), attention(x), **EXACT)


def test_conversion_keeps_dropout_dtype_and_mode() -> None:
    attention = PatternAttention(16, 4, attn_drop=0.1, proj_drop=0.2, qkv_bias=False).double().eval()
    layer = DGQA.from_attention(attention, 2, window=3)
    assert (layer.attn_drop, layer.proj_drop.p, layer.window) == (0.1, 0.2, 3)
    assert (layer.q.bias, layer.q.weight.dtype, layer.training) == (None, torch.float64, False)
    assert layer(torch.randn(1, 3, 16, dtype=torch.float64)).dtype == torch.float64


def test_the_order_of_a_batch_does_not_matter() -> None:
    layer, x = KDGQA(24, 6, 4).eval(), torch.randn(4, 5, 24)
    y, counts = layer(x), layer.allocation
    torch.testing.assert_close(layer(x.flip(0)).flip(0), y, **EXACT)
    assert torch.equal(layer.allocation, counts)


def test_a_frozen_layer_does_not_see_the_batch() -> None:
    for layer in (KDGQA(24, 6, 4), DGQA(24, 6, 4)):
        x = torch.randn(2, 5, 24)
        layer.eval()(x)
        layer.freeze_allocation()
        y, counts = layer(x), layer.allocation
        torch.testing.assert_close(torch.cat([layer(x[:1]), layer(100 * x[1:] / 100)]), y, **EXACT)
        layer(torch.randn(3, 9, 24) * 5)
        assert torch.equal(layer.allocation, counts)
        again = type(layer)(24, 6, 4)
        again.load_state_dict(layer.state_dict())
        again.freeze_allocation()
        torch.testing.assert_close(again.eval()(x), y, **EXACT)
        layer.unfreeze_allocation()
        assert not layer.frozen


@pytest.mark.parametrize("counts", [[1, 2], [3, 3, 1], [7, 0, -1]])
def test_wrong_allocations_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="3 counts from 0 that sum to 6"):
        KDGQA(24, 6, 3).freeze_allocation(counts)


def test_dgqa_waits_for_its_window_in_training() -> None:
    layer, x = DGQA(24, 6, 3, window=3), torch.randn(7, 2, 5, 24)
    caches = []
    for batch in x:
        layer(batch)
        caches.append(layer.cache.tolist())
    changed = [a != b for a, b in zip([[0.0] * 3, *caches], caches, strict=False)]
    assert changed == [True, False, False, True, False, False, True]
    layer.start_epoch()
    layer(x[0])
    assert layer.cache.tolist() != caches[-1]
    assert layer.steps == 1


def test_dgqa_in_eval_mode_remembers_the_last_batch() -> None:
    layer, x = DGQA(24, 6, 3).eval(), torch.randn(2, 5, 24)
    layer(x)
    k = layer.k(x).unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(layer.cache, key_norms(k))
    layer(x)  # no difference at all: where the authors' code hangs
    assert layer.allocation.tolist() == [2, 2, 2]


def test_the_split_is_saved_and_may_be_missing() -> None:
    layer = DGQA(24, 6, 3)
    layer(torch.randn(2, 5, 24))
    state = layer.state_dict()
    other = DGQA(24, 6, 3)
    other.load_state_dict(state)
    assert torch.equal(other.allocation, layer.allocation)
    del state["split"]
    nn.Sequential(other).load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert other.allocation.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({key: value for key, value in state.items() if key != "k.weight"})


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(2, 6), st.sampled_from([(6, 2), (4, 4), (4, 1)]))
def test_pgqa_leaves_every_head_with_mean_zero(batch: int, tokens: int, heads_groups: tuple[int, int]) -> None:
    layer = PGQA(4 * heads_groups[0], *heads_groups)
    y = layer.perturbed(torch.randn(batch, heads_groups[0], tokens, 4) + 3)
    torch.testing.assert_close(y.mean((2, 3)), torch.zeros(batch, heads_groups[0]), **EXACT)


def test_pgqa_is_random_in_eval_mode_and_repeatable() -> None:
    layer, x = PGQA(24, 6, 3).eval(), torch.randn(2, 5, 24)
    assert not torch.equal(layer(x), layer(x))
    outs = []
    for _ in range(2):
        layer.generator = torch.Generator().manual_seed(1)
        outs.append(layer(x))
    assert torch.equal(*outs)
    with pytest.raises(ValueError, match=r"noise \(6, 20\) must be \(3, 2, 20\)"):
        layer(x, noise=torch.rand(6, 20))


@pytest.mark.parametrize("scheme", ["gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa"])
def test_gradients_reach_what_is_used(scheme: str) -> None:
    kind, options = grouped_scheme(scheme)
    layer, x = kind(24, 6, 3, **options), torch.randn(2, 5, 24, requires_grad=True)
    first = layer(x)
    layer(torch.randn(2, 5, 24))  # allocates anew before the first pass goes backward
    first.square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    torch._dynamo.reset()
    layer = layer.eval()
    torch.manual_seed(1)
    assert torch.compile(layer, backend="aot_eager")(x).isfinite().all()


def test_an_unused_head_has_no_gradient() -> None:
    layer = KDGQA(24, 6, 2)
    layer(torch.randn(2, 5, 24)).square().sum().backward()
    unused = layer.allocation.argmin()
    assert layer.allocation[unused] == 0
    for linear in (layer.k, layer.v):
        assert linear.weight.grad is not None
        used = linear.weight.grad.unflatten(0, (2, 4)).abs().sum((1, 2)) > 0
        assert used.tolist() == [unused == 1, unused == 0]


def test_as_a_drop_in_layer() -> None:
    for name in ("gqa", "kdgqa", "dgqa", "pgqa"):
        layer = heed.create_layer(name, 24, 6, (4, 4))
        assert layer.num_kv_heads == 3
        assert heed.create_layer(name, 24, 6, (4, 4), num_kv_heads=2).num_kv_heads == 2
        assert heed.create_layer(name, 20, 5, (4, 4)).num_kv_heads == 1
        model = heed.create_model("vit_micro", attention=name, depth=1)
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


# -- memory, reports


@settings(max_examples=10)
@given(st.sampled_from([1, 2, 3, 6]), st.integers(1, 50), st.integers(1, 4))
def test_memory_is_a_share_of_multi_head(groups: int, tokens: int, batch: int) -> None:
    found = grouped_report(GQA(24, 6, groups), tokens, batch, torch.bfloat16)
    assert found.kv_bytes * 6 == found.multi_head_kv_bytes * groups
    assert found.multi_head_kv_bytes == 2 * batch * tokens * 24 * 2


def test_report_and_log() -> None:
    layers = nn.Sequential(KDGQA(24, 6, 3), DGQA(24, 6, 3))
    log = AllocationLog(layers)
    for step in range(3):
        layers(torch.randn(2, 5, 24))
        log(step)
    assert log.steps == [0, 1, 2]
    assert log.history["0"][-1] == layers[0].allocation.tolist()
    assert "(50% of multi-head)" in str(grouped_report(layers, 10))
    assert str(grouped_report(layers, 10)).endswith(f"1: {layers[1].allocation.tolist()}")
    with pytest.raises(ValueError, match="Linear has no grouped attention layer"):
        grouped_report(nn.Linear(1, 1), 10)


# -- bad input


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (GQA, (25, 6, 3), "dim=25 is not divisible by num_heads=6"),
        (GQA, (24, 6, 4), "num_heads=6 is not a multiple of num_kv_heads=4.*KDGQA and DGQA allow uneven"),
        (PGQA, (24, 6, 4), "num_heads=6 is not a multiple of num_kv_heads=4"),
        (KDGQA, (24, 6, 7), "num_kv_heads=7 must be an integer from 1 to num_heads=6"),
        (DGQA, (24, 6, 0), "num_kv_heads=0"),
        (DGQA, (24, 6, None), "num_kv_heads=None"),
        (DGQA, (24, 6, 3, "sum"), "unknown kind of evolving allocation 'sum'; known: diff, ema"),
        (DGQA, (24, 6, 3, "ema", 0), "window=0 must be at least 1"),
    ],
)
def test_bad_settings(kind: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


def test_bad_input() -> None:
    layer = KDGQA(24, 6, 4)  # uneven groups are fine
    with pytest.raises(ValueError, match="the input has 23 channels"):
        layer(torch.zeros(1, 5, 23))
    with pytest.raises(ValueError, match="takes no mask"):
        layer(torch.zeros(1, 5, 24), is_causal=True)
    with pytest.raises(
        ValueError, match="unknown attention scheme 'dgqa'; known: gqa, kdgqa, dgqa_diff, dgqa_ema, pgqa"
    ):
        grouped_scheme("dgqa")
    with pytest.raises(ValueError, match="num_heads=6 is not a multiple of num_kv_heads=4: conversion pools"):
        KDGQA.from_attention(PatternAttention(24, 6), 4)
    with pytest.raises(ValueError, match="unknown way to pool heads 'max'"):
        pool_heads(torch.zeros(24, 24), 6, 3, "max")
    with pytest.raises(ValueError, match="do not divide into num_heads=6"):
        pool_heads(torch.zeros(25, 24), 6, 3)
    state = copy.copy(PatternAttention(24, 6).state_dict()) | {"q_norm.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=r"no place for q_norm\.weight"):
        grouped_weights(state, 6, 3)

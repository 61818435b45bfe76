"""NATTEN's functions on heed's engine: windows, merging, both halves, their limits, their costs, and their hosts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from heed import catalogue
from heed.engine.attend import attend
from heed.engine.bias import RelativeBias
from heed.engine.patterns import Blocks, Causal, Grouped, Neighborhood
from heed.layers import natten
from heed.layers.neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
FUSED: dict[int, Callable[..., Any]] = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
QK: dict[int, Callable[..., Tensor]] = {1: natten.na1d_qk, 2: natten.na2d_qk, 3: natten.na3d_qk}
AV: dict[int, Callable[..., Tensor]] = {1: natten.na1d_av, 2: natten.na2d_av, 3: natten.na3d_av}
MODULES: dict[int, Callable[..., Any]] = {
    1: NeighborhoodAttention1D,
    2: NeighborhoodAttention2D,
    3: NeighborhoodAttention3D,
}
quick = settings(max_examples=25)


@st.composite
def windows(
    draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3), *, strided: bool = True, causal: bool = True
) -> Neighborhood:
    """Any windows that fit a small layout."""
    rank = draw(st.sampled_from(ranks))
    longest = {1: 21, 2: 9, 3: 5}[rank]
    layout, kernel, dilation, stride, looks_back = [], [], [], [], []
    for _ in range(rank):
        layout.append(draw(st.integers(2, longest)))
        kernel.append(draw(st.integers(2, layout[-1])))
        dilation.append(draw(st.integers(1, layout[-1] // kernel[-1])))
        stride.append(draw(st.integers(1, kernel[-1])) if strided else 1)
        looks_back.append(draw(st.booleans()) if causal else False)
    return Neighborhood(tuple(layout), tuple(kernel), tuple(dilation), tuple(stride), tuple(looks_back))


Three = tuple[Tensor, Tensor, Tensor]


def heads_last(layout: tuple[int, ...], heads: int = 2, kv_heads: int = 2, d: int = 4, dv: int = 4) -> Three:
    sizes = ((heads, d), (kv_heads, d), (kv_heads, dv))
    q, k, v = (torch.randn(2, *layout, *size, requires_grad=True) for size in sizes)
    return q, k, v


def heads_first(layout: tuple[int, ...], d: int = 4, dv: int = 4) -> Three:
    q, k, v = (torch.randn(2, 3, *layout, width, requires_grad=True) for width in (d, d, dv))
    return q, k, v


def flat(x: Any) -> Tensor:
    """(B, *L, H, d) -> (B, H, N, d)"""
    return x.flatten(1, -3).transpose(1, 2)


def flats(qkv: Three) -> Three:
    q, k, v = map(flat, qkv)
    return q, k, v


def run_fused(w: Neighborhood, *qkv: Tensor, **options: Any) -> Any:
    return FUSED[len(w.grid)](*qkv, w.kernel, w.stride, w.dilation, w.causal, **options)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention written out on (B, H, N, d): out and lse, both heads-first and flat."""
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def same_gradients(a: Tensor, b: Tensor, inputs: tuple[Tensor, ...]) -> None:
    weight = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad(a, inputs, weight), torch.autograd.grad(b, inputs, weight), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


# --- fused


@quick
@given(windows(causal=False))
def test_a_window_always_holds_the_same_number_of_keys(w: Neighborhood) -> None:
    assert (w.mask(math.prod(w.grid)).sum(1) == math.prod(w.kernel)).all()


@quick
@given(windows())
def test_fused_equals_dense_attention_under_the_mask(w: Neighborhood) -> None:
    qkv = heads_last(w.grid, dv=3)
    out, lse = run_fused(w, *qkv, return_lse=True)
    expected, expected_lse = dense(*flats(qkv), w.mask(math.prod(w.grid)))
    assert out.shape == (*qkv[0].shape[:-1], 3)
    assert lse.shape == qkv[0].shape[:-1]
    torch.testing.assert_close(flat(out), expected, **EXACT)
    torch.testing.assert_close(lse.flatten(1, -2).transpose(1, 2), expected_lse, **EXACT)
    same_gradients(flat(out), expected, qkv)


@pytest.mark.parametrize("layout", [(9,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("lse", [False, True])
def test_full_window_is_self_attention(layout: tuple[int, ...], lse: bool) -> None:
    qkv = heads_last(layout)
    result = FUSED[len(layout)](*qkv, layout, return_lse=lse)
    out = result[0] if lse else result
    torch.testing.assert_close(flat(out), F.scaled_dot_product_attention(*flats(qkv)), **EXACT)


@pytest.mark.parametrize("stride", [1, 3, 9])
def test_full_causal_window_is_causal_attention(stride: int) -> None:
    qkv = heads_last((9,))
    expected = F.scaled_dot_product_attention(*flats(qkv), is_causal=True)
    torch.testing.assert_close(flat(FUSED[1](*qkv, 9, stride, is_causal=True)), expected, **EXACT)
    torch.testing.assert_close(flat(natten.attention(*qkv, is_causal=True)), expected, **EXACT)


def test_stride_of_a_window_is_blocked_attention() -> None:
    assert torch.equal(Neighborhood((6, 8), (3, 4), stride=(3, 4)).mask(48), Blocks((3, 4), grid=(6, 8)).mask(48))
    qkv = heads_last((12,))
    q, k, v = (x.unflatten(1, (3, 4)).transpose(2, 3) for x in qkv)  # (B, blocks, H, 4, d)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
    torch.testing.assert_close(FUSED[1](*qkv, 4, 4), expected, **EXACT)


@quick
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_dilation_is_attention_on_interleaved_subsequences(w: int, t: int, more: int, causal: bool) -> None:
    qkv = heads_last((w * t + more,))
    out = FUSED[1](*qkv, w, dilation=t, is_causal=causal)
    for g in range(t):
        own = FUSED[1](*(x[:, g::t] for x in qkv), w, is_causal=causal)
        torch.testing.assert_close(out[:, g::t], own, **EXACT)


def test_window_full_along_an_axis_adds_no_restriction_there() -> None:
    mask = Neighborhood((5, 7), (5, 3)).mask(35).view(5, 7, 5, 7)
    assert torch.equal(mask, Neighborhood(7, 3).mask(7)[:, None, :].expand(5, 7, 5, 7))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(kv_heads: int) -> None:
    q, k, v = heads_last((5, 6), heads=4, kv_heads=kv_heads, dv=6)
    extra = torch.randn(2, 3, kv_heads, 4), torch.randn(2, 3, kv_heads, 6)
    repeated = [x.repeat_interleave(4 // kv_heads, -2) for x in (k, v, *extra)]
    out = FUSED[2](q, k, v, 3, 2, additional_keys=extra[0], additional_values=extra[1])
    expected = FUSED[2](q, *repeated[:2], 3, 2, additional_keys=repeated[2], additional_values=repeated[3])
    torch.testing.assert_close(out, expected, **EXACT)


@quick
@given(windows(), st.integers(1, 4), st.sampled_from([None, 0.3]))
def test_additional_keys_are_seen_by_every_query(w: Neighborhood, extra: int, scale: float | None) -> None:
    n = math.prod(w.grid)
    q, k, v = heads_last(w.grid)
    more_k, more_v = torch.randn(2, 2, extra, 2, 4, requires_grad=True).unbind()
    out, lse = run_fused(w, q, k, v, scale=scale, additional_keys=more_k, additional_values=more_v, return_lse=True)
    keys, values = (torch.cat([flat(x), y.transpose(1, 2)], 2) for x, y in ((k, more_k), (v, more_v)))
    mask = torch.cat([w.mask(n), torch.ones(n, extra, dtype=torch.bool)], 1)
    expected, expected_lse = dense(flat(q), keys, values, mask, scale)
    torch.testing.assert_close(flat(out), expected, **EXACT)
    torch.testing.assert_close(lse.flatten(1, -2).transpose(1, 2), expected_lse, **EXACT)
    same_gradients(flat(out), expected, (q, k, v, more_k, more_v))


def test_smallest_causal_window_copies_the_first_value() -> None:
    q, k, v = heads_last((6,))
    torch.testing.assert_close(FUSED[1](q, k, v, 2, is_causal=True)[:, 0], v[:, 0])


@pytest.mark.parametrize("scale", [None, 0, 0.0])
def test_falsy_scale_is_the_default(scale: float | None) -> None:
    qkv = heads_last((6,))
    torch.testing.assert_close(FUSED[1](*qkv, 3, scale=scale), FUSED[1](*qkv, 3, scale=0.5))
    assert not torch.allclose(FUSED[1](*qkv, 3, scale=scale), FUSED[1](*qkv, 3, scale=0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    qkv = [x.detach().to(dtype) for x in heads_last((6, 7))]
    more = [torch.randn(2, 3, 2, 4).to(dtype) for _ in range(2)]
    out, lse = FUSED[2](*qkv, 3, additional_keys=more[0], additional_values=more[1], return_lse=True)
    exact = FUSED[2](*(x.float() for x in qkv), 3, additional_keys=more[0].float(), additional_values=more[1].float())
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


# --- merging


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_merging_any_split_of_the_keys_is_attention_over_all(sizes: list[int]) -> None:
    q = torch.randn(2, 6, 2, 4, requires_grad=True)
    k, v = (torch.randn(2, sum(sizes), 2, 4, requires_grad=True) for _ in range(2))
    parts = [
        natten.attention(q, *part, return_lse=True) for part in zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)
    ]
    out, lse = natten.merge_attentions(*zip(*parts, strict=True))
    expected, expected_lse = natten.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse, **EXACT)
    torch.testing.assert_close(lse, torch.stack([part[1] for part in parts]).logsumexp(0), **EXACT)
    same_gradients(torch.cat([out, lse[..., None]], -1), torch.cat([expected, expected_lse[..., None]], -1), (q, k, v))


@pytest.mark.parametrize("empty", [(True, False), (False, True), (True, True)])
def test_a_part_without_keys_adds_nothing(empty: tuple[bool, bool]) -> None:
    outs = [torch.randn(3, 4, requires_grad=True) for _ in empty]
    lses = [torch.full((3,), -torch.inf if e else 0.3, requires_grad=True) for e in empty]
    out, lse = natten.merge_attentions(outs, lses)
    if not all(empty):
        torch.testing.assert_close((out, lse), (outs[empty.index(False)], lses[empty.index(False)]))
    grads = torch.autograd.grad(out.sum() + lse.clamp(min=-1).sum(), [*outs, *lses])
    assert all(grad.isfinite().all() for grad in grads)
    assert not out.isnan().any()


def test_merge_returns_the_dtype_of_the_outputs() -> None:
    parts = [torch.randn(2, 3, 4).bfloat16() for _ in range(3)]
    out, lse = natten.merge_attentions(parts, [torch.randn(2, 3) for _ in parts])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


# --- unfused


@quick
@given(windows(strided=False, causal=False))
def test_slots_run_over_the_window_in_ascending_order(w: Neighborhood) -> None:
    q, k, _ = heads_first(w.grid)
    logits = QK[len(w.grid)](q, k, w.kernel, w.dilation)
    scores = q.flatten(2, -2) @ k.flatten(2, -2).mT
    picked = scores[:, :, w.mask(math.prod(w.grid))].view_as(logits)
    torch.testing.assert_close(logits, picked, **EXACT)


@quick
@given(windows(strided=False))
def test_both_halves_make_the_fused_attention(w: Neighborhood) -> None:
    rank = len(w.grid)
    q, k, v = heads_first(w.grid, dv=5)
    logits = QK[rank](q, k, w.kernel, w.dilation, is_causal=w.causal)
    out = AV[rank](logits.softmax(-1), v, w.kernel, w.dilation, is_causal=w.causal)
    expected = run_fused(w, *(x.movedim(1, -2) for x in (q, k, v)), scale=1.0).movedim(-2, 1)
    torch.testing.assert_close(out, expected, **EXACT)
    same_gradients(out, expected, (q, k, v))


@quick
@given(windows(strided=False, causal=False))
def test_relative_bias_equals_the_engines(w: Neighborhood) -> None:
    kernel = tuple(x if x % 2 else x - 1 for x in w.kernel)
    if min(kernel) < 2:
        kernel = (3,) * len(kernel)
        w = Neighborhood(tuple(max(3, x) for x in w.grid), kernel)
    w = Neighborhood(w.grid, kernel, w.dilation)
    rank, q_k_v = len(w.grid), heads_first(w.grid)
    q, k, v = q_k_v
    rpb = torch.randn(3, *(2 * x - 1 for x in kernel), requires_grad=True)
    out = AV[rank](QK[rank](q, k, kernel, w.dilation, rpb=rpb).softmax(-1), v, kernel, w.dilation)
    q, k, v = (x.flatten(2, -2) for x in q_k_v)
    expected = attend(q, k, v, w, bias=RelativeBias(rpb), scale=1.0, backend="reference")
    torch.testing.assert_close(out.flatten(2, -2), expected, **EXACT)
    same_gradients(out.flatten(2, -2), expected, (*q_k_v, rpb))  # type: ignore[arg-type]


def test_additional_keys_take_the_last_slots() -> None:
    q, k, v = heads_first((5, 6))
    more_k, more_v = torch.randn(2, 2, 3, 4, 4).unbind()
    logits = natten.na2d_qk(q, k, 3, additional_keys=more_k)
    assert logits.shape == (2, 3, 5, 6, 9 + 4)
    torch.testing.assert_close(logits[..., :9], natten.na2d_qk(q, k, 3))
    torch.testing.assert_close(logits[..., 9:].flatten(2, 3), q.flatten(2, 3) @ more_k.mT)
    only_extra = torch.zeros_like(logits)
    only_extra[..., 9 + 2] = 1.0
    mixed = natten.na2d_av(only_extra, v, 3, additional_values=more_v)
    torch.testing.assert_close(mixed, more_v[:, :, 2, None, None].expand_as(mixed))


def test_causal_slots_without_a_key() -> None:
    q, k, v = heads_first((5,))
    logits = natten.na1d_qk(q, k, 3, is_causal=True)
    absent = logits == -torch.inf
    assert absent[0, 0].tolist() == [[False, True, True], [False, False, True], *[[False] * 3] * 3]
    weights = torch.rand_like(logits)
    expected = natten.na1d_av(weights.masked_fill(absent, 0.0), v, 3, is_causal=True)
    torch.testing.assert_close(natten.na1d_av(weights, v, 3, is_causal=True), expected)


def test_memory_of_the_unfused_halves_is_linear_in_tokens() -> None:
    def kept(n: int) -> int:
        """Bytes kept for the backward pass."""
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x

        alive: list[Tensor] = []
        q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            natten.na1d_av(natten.na1d_qk(q, k, 9).softmax(-1), v, 9)
        return sum(storages.values())

    assert kept(4096) == pytest.approx(4 * kept(1024), rel=0.05)


# --- bad input


def sequence(n: int = 8, heads: int = 2, batch: int = 2, d: int = 4) -> Tensor:
    return torch.zeros(batch, n, heads, d)


X1, X2, X3 = sequence(), torch.zeros(2, 6, 8, 2, 4), torch.zeros(1, 4, 4, 4, 2, 4)  # heads last
F1, F2 = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 6, 8, 4)  # heads first
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "window beyond the axis": (
        lambda: natten.na1d(X1, X1, X1, 5, dilation=2),
        r"5 x dilation 2 = 10 exceeds the 8 .*axis 0",
    ),
    "window beyond axis 1": (lambda: natten.na2d(X2, X2, X2, (3, 9)), r"9 .* exceeds the 8 tokens of axis 1"),
    "window beyond axis 2": (lambda: natten.na3d(X3, X3, X3, (2, 2, 5)), r"5 .* exceeds the 4 tokens of axis 2"),
    "unfused window beyond the axis": (lambda: natten.na2d_qk(F2, F2, (7, 3)), r"7 .* exceeds the 6 tokens of axis 0"),
    "stride beyond the window": (
        lambda: natten.na2d(X2, X2, X2, 3, (1, 4)),
        r"stride 4 on axis 1 exceeds its kernel 3",
    ),
    "window of one": (lambda: natten.na2d(X2, X2, X2, (1, 3)), r"kernel 1 on axis 0 must be at least 2"),
    "window of a half": (lambda: FUSED[2](X2, X2, X2, (3, 2.5)), r"2\.5 on axis 1 must be an integer"),
    "dilation of zero": (
        lambda: natten.na2d(X2, X2, X2, 3, dilation=(1, 0)),
        r"dilation.*0 on axis 1 must be an integer",
    ),
    "stride of True": (lambda: natten.na1d(X1, X1, X1, 3, True), r"stride.*True on axis 0"),
    "causal of one": (lambda: FUSED[1](X1, X1, X1, 3, is_causal=1), r"causal.*1 must be True or False"),
    "entries for other axes": (lambda: natten.na2d(X2, X2, X2, (3, 3, 3)), r"kernel_size=\(3, 3, 3\) has 3 .* 2 axes"),
    "rank": (lambda: natten.na2d(X1, X1, X1, 3), r"query \(2, 8, 2, 4\) has 4 axes; 2 axes of tokens make 5"),
    "unfused rank": (lambda: natten.na3d_qk(F2, F2, 3), r"query .* has 5 axes; 3 axes of tokens make 6"),
    "batch": (lambda: natten.na1d(X1, sequence(batch=3), X1, 3), r"axis 0 \(batch\): 3 and 2"),
    "layout": (
        lambda: natten.na2d(X2, X2[:, :, :7], X2[:, :, :7], 3),
        r"axis 2 \(tokens, axis 1 of the layout\): 7 and 8",
    ),
    "layout of value": (lambda: natten.na1d(X1, X1, sequence(7), 3), r"value .* axis 1 \(tokens.*7 and 8"),
    "width": (lambda: natten.na1d(X1, sequence(d=5), X1, 3), r"axis 3 \(width\): 5 and 4"),
    "heads": (lambda: natten.na1d(sequence(heads=3), X1, X1, 3), r"axis 2 \(heads\): 3 query heads .* of 2 key heads"),
    "heads of value": (lambda: natten.na1d(X1, X1, sequence(heads=1), 3), r"axis 2 \(heads\): 1 and 2"),
    "no values": (
        lambda: natten.na1d(X1, X1, X1, 3, additional_keys=X1),
        r"additional_keys .* without additional_values",
    ),
    "no keys": (
        lambda: natten.na1d(X1, X1, X1, 3, additional_values=X1),
        r"additional_values .* without additional_keys",
    ),
    "additional shape": (
        lambda: natten.na2d(X2, X2, X2, 3, additional_keys=sequence(heads=1), additional_values=X1),
        r"additional_keys \(2, 8, 1, 4\) must be \(2, M, 2, 4\)",
    ),
    "additional tokens": (
        lambda: natten.na1d(X1, X1, X1, 3, additional_keys=X1, additional_values=X1[:, :5]),
        r"axis 1 \(tokens\): 5 and 8",
    ),
    "unfused additional shape": (
        lambda: natten.na1d_qk(F1, F1, 3, additional_keys=F1[:, :1]),
        r"must be \(2, 2, M, 4\)",
    ),
    "NaN scale": (lambda: natten.na1d(X1, X1, X1, 3, scale=math.nan), r"scale=nan must be finite"),
    "bias with causal": (
        lambda: natten.na2d_qk(F2, F2, 3, is_causal=(False, True), rpb=torch.zeros(2, 5, 5)),
        r"axis 1",
    ),
    "bias with even window": (lambda: natten.na2d_qk(F2, F2, (3, 4), rpb=torch.zeros(2, 5, 7)), r"odd .*axis 1 has 4"),
    "bias of another shape": (lambda: natten.na2d_qk(F2, F2, 3, rpb=torch.zeros(2, 5, 7)), r"must be \(2, 5, 5\)"),
    "slots": (lambda: natten.na1d_av(torch.zeros(2, 2, 8, 4), F1, 3), r"4 slots on axis 3; .*3.* make 3"),
    "no parts": (lambda: natten.merge_attentions([], []), r"0 outputs"),
    "lses": (lambda: natten.merge_attentions([X1, X1], [X1[..., 0]]), r"2 outputs and 1 lses"),
    "part shapes": (lambda: natten.merge_attentions([X1, X1], [X1[..., 0], X1[..., :2, :2]]), r"part 1: .*\(2, 8, 2\)"),
    "tile": (lambda: natten.count_tiles(Neighborhood(8, 3), 0, 4), r"query_tile.*0 must be an integer >= 1"),
    "module bias with causal": (
        lambda: NeighborhoodAttention1D(4, 1, 3, is_causal=True, rel_pos_bias=True),
        r"is_causal",
    ),
    "module bias with even window": (lambda: NeighborhoodAttention1D(4, 1, 4, rel_pos_bias=True), r"odd windows.*4"),
    "module rank": (
        lambda: NeighborhoodAttention2D(4, 1, 3)(torch.zeros(1, 8, 4)),
        r"2 axes of tokens, the input has 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_axis_and_numbers(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


# --- modules


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_modules_equal_the_functions(rank: int, rel_pos_bias: bool) -> None:
    layout = (5, 6, 4)[:rank]
    layer = MODULES[rank](8, 2, 3, rel_pos_bias=rel_pos_bias)
    assert set(layer.state_dict()) == {
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
        *(["rpb"] if rel_pos_bias else []),
    }
    x = torch.randn(2, *layout, 8)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).movedim((-3, -2), (0, 2))
    weights = QK[rank](q * 4**-0.5, k, 3, rpb=layer.rpb).softmax(-1)
    expected = layer.proj(AV[rank](weights, v, 3).movedim(1, -2).flatten(-2))
    torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_drop_weights_while_training_only(rank: int) -> None:
    layer = MODULES[rank](8, 2, 3, rel_pos_bias=True, attn_drop=0.5)
    x = torch.randn(1, *(5, 6, 4)[:rank], 8)
    assert not torch.allclose(layer(x), layer(x))
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# --- hosts


def test_flex_attention_takes_the_block_mask() -> None:
    for w in (Neighborhood((13, 11), (5, 3), stride=(2, 1)), Neighborhood(150, 6, 7, causal=True)):
        n = math.prod(w.grid)
        mask = natten.block_mask(w, n)
        q, k, v = torch.randn(3, 1, 2, n, 16).unbind()
        expected, _ = dense(q, k, v, w.mask(n))
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), expected, **EXACT)


def test_block_mask_visits_every_block_that_holds_a_pair() -> None:
    """The eager kernel ignores the lists of blocks, which the compiled one relies on."""
    cases = {
        Neighborhood((20, 20), 5): 400,
        Neighborhood(600, 40, stride=16): 600,
        Neighborhood(520, 9, 3): 520,
        Causal(): 600,
    }
    for w, n in cases.items():
        mask = natten.block_mask(w, n)
        assert mask.full_kv_indices is not None
        assert mask.full_kv_num_blocks is not None
        padded = F.pad(w.mask(n), (0, -n % 128, 0, -n % 128))
        blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2).flatten(2)
        for row in range(blocks.shape[0]):
            partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
            full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
            assert {*partial, *full} >= set(blocks[row].any(-1).nonzero().flatten().tolist())
            real = blocks[row, :, : min(128, n - 128 * row) * 128]
            assert real[full].all()


def test_block_mask_of_groups_per_head_and_wrong_sizes() -> None:
    labels = torch.randint(0, 3, (2, 2, 140))
    pattern = Grouped(labels)
    q, k, v = torch.randn(3, 2, 2, 140, 16).unbind()
    mask = natten.block_mask(pattern, 140, batch=2, heads=2)
    expected, _ = dense(q, k, v, labels[..., :, None] == labels[..., None, :])
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), expected, **EXACT)
    with pytest.raises(ValueError, match="64 tokens, but there are 60"):
        natten.block_mask(Neighborhood((8, 8), 3), 60)


def test_catalogue_lists_the_functions() -> None:
    names = {name.rpartition(".")[2] for name in catalogue.system("13-fna").names}
    assert names >= set(natten.__all__) - {"TileCount"}


# --- cost


@quick
@given(windows())
def test_flops_count_the_pairs_of_the_mask(w: Neighborhood) -> None:
    pairs = int(w.mask(math.prod(w.grid)).sum())
    assert natten.neighborhood_flops(w, batch=2, heads=3, head_dim=4) == 2 * 2 * 3 * pairs * 4
    if not any(w.causal):
        assert pairs == math.prod(w.grid) * math.prod(w.kernel)
    more = natten.neighborhood_flops(w, head_dim=4, head_dim_v=5, additional_tokens=2)
    assert more == (pairs + 2 * math.prod(w.grid)) * 9


@quick
@given(windows(ranks=(1, 2)), st.integers(1, 5), st.integers(1, 5))
def test_tiles_against_counting_on_the_mask(w: Neighborhood, query_tile: int, key_tile: int) -> None:
    """Dilation groups are tiled by themselves, so tokens are ordered by group first."""
    n = math.prod(w.grid)

    def tile_of(tile: int) -> Tensor:
        """(n, rank) the tile of every token, and whether it is whole."""
        per_axis = []
        for x, t in zip(w.grid, w.dilation, strict=True):
            i = torch.arange(x)
            per_axis.append(i % t * x + i // t // tile)
        return torch.cartesian_prod(*per_axis).view(n, -1)

    mask = w.mask(n)
    (_, of_query), (_, of_key) = (tile_of(t).unique(dim=0, return_inverse=True) for t in (query_tile, key_tile))
    cells = torch.zeros(int(of_query.max()) + 1, int(of_key.max()) + 1, dtype=torch.long)
    cells.index_put_((of_query[:, None].expand(n, n), of_key.expand(n, n)), mask.long(), accumulate=True)
    count = natten.count_tiles(w, query_tile, key_tile)
    area = (query_tile * key_tile) ** len(w.grid)
    assert (count.visited, count.full, count.total) == (
        int((cells > 0).sum()),
        int((cells == area).sum()),
        cells.numel(),
    )
    assert (count.pairs, count.scores) == (int(mask.sum()), count.visited * area)
    assert count.wasted == pytest.approx(1 - count.pairs / count.scores)
    assert count.masked == pytest.approx(1 - count.full / count.visited)


def test_stride_that_fits_the_tiles_wastes_nothing() -> None:
    """The point of strided neighborhoods: a stride and window of whole tiles leave no masked scores."""
    aligned = natten.count_tiles(Neighborhood((32, 32), (16, 16), stride=(16, 16)), (8, 8), (8, 8))
    assert (aligned.wasted, aligned.masked) == (0.0, 0.0)
    assert natten.count_tiles(Neighborhood((32, 32), 16), (8, 8), (8, 8)).wasted > 0.3

"""Aggregated and length-scaled attention: their equations, the position tables, gates, gradients and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.aggregated import AggregatedAttention, CosineHeads, LengthScaledAttention
from heed.layers.registry import create_layer

EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
quick = settings(max_examples=12)
sides = st.integers(1, 9)


def strengthened(layer: CosineHeads) -> Any:
    """Weights at which every part moves the output."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


def scaled_queries(layer: Any, q: Tensor, keys: Tensor) -> Tensor:
    """(B, h, N, d) unit queries, and how many keys each sees (N)."""
    return (q + layer.query_embedding) * F.softplus(layer.temperature) * keys.log()[:, None]


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def dense(layer: Any, x: Tensor) -> Tensor:
    """The equation with all N keys and a mask for the window."""
    batch, rows, columns, _ = x.shape
    count, half, tokens = layer.num_heads, layer.window_size // 2, rows * columns
    y, z = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    down, right = y[None] - y[:, None] + half, z[None] - z[:, None] + half
    near = (down >= 0) & (down <= 2 * half) & (right >= 0) & (right <= 2 * half)
    place = (down * layer.window_size + right).clamp(0, layer.window_size**2 - 1)
    flat = x.flatten(1, 2)
    q = F.normalize(heads(layer.q(flat), count), dim=-1)
    k, v = (heads(t, count) for t in layer.kv(flat).chunk(2, -1))
    pooled = F.gelu(layer.sr(x.permute(0, 3, 1, 2)))
    pooled = layer.norm(F.adaptive_avg_pool2d(pooled, layer.key_grid).flatten(2).transpose(1, 2))
    far_k, far_v = (heads(t, count) for t in layer.kv(pooled).chunk(2, -1))
    scaled = scaled_queries(layer, q, (near.sum(1) + pooled.shape[1]).float())
    local = scaled @ F.normalize(k, dim=-1).mT + layer.relative_pos_bias_local[:, place]
    far = scaled @ F.normalize(far_k, dim=-1).mT + layer.position_bias()
    weights = torch.cat([local.masked_fill(~near, -torch.inf), far], -1).softmax(-1)
    learned = (q @ layer.learnable_tokens + layer.learnable_bias).gather(3, place.expand(batch, count, -1, -1))
    out = (weights[..., :tokens] + learned.masked_fill(~near, 0)) @ v + weights[..., tokens:] @ far_v
    out = out.transpose(1, 2)
    if layer.router is not None:
        out = out * layer.router(flat).gates[..., None]
    return layer.proj(out.reshape(x.shape))


@quick
@given(
    sides, sides, st.sampled_from([1, 3, 5]), st.integers(1, 5), st.sampled_from([(None, 0), (2, 0), (1, 1), (0, 2)])
)
def test_equals_the_equation(rows: int, columns: int, window: int, ratio: int, split: tuple[int | None, int]) -> None:
    layer = strengthened(
        AggregatedAttention(
            8, 2, (rows, columns), window_size=window, pool_ratio=ratio, shared=split[0], routed=split[1]
        )
    )
    x = torch.randn(2, rows, columns, 8, requires_grad=True)
    grad = torch.randn(2, rows, columns, 8)
    own, expected = layer(x), dense(layer, x)
    torch.testing.assert_close(own, expected, **EXACT)
    inputs = [x, layer.q.weight, layer.kv.weight, layer.learnable_tokens, layer.relative_pos_bias_local]
    for have, want in zip(
        torch.autograd.grad(own, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)


@quick
@given(sides, sides)
def test_length_scaled_attention_equals_its_equation(rows: int, columns: int) -> None:
    layer = strengthened(LengthScaledAttention(8, 2, (rows, columns)))
    x = torch.randn(2, rows, columns, 8)
    q, k, v = (heads(t, 2) for t in layer.qkv(x.flatten(1, 2)).chunk(3, -1))
    tokens = rows * columns
    scaled = scaled_queries(layer, F.normalize(q, dim=-1), torch.full((tokens,), float(tokens)))
    y = (scaled @ F.normalize(k, dim=-1).mT + layer.position_bias()).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.proj(y.transpose(1, 2).reshape(x.shape)), **EXACT)


@quick
@given(st.integers(2, 16), st.integers(2, 16), st.integers(1, 8), st.one_of(st.none(), st.integers(2, 20)))
def test_positions_are_logarithmic_offsets(rows: int, columns: int, ratio: int, pretrain: int | None) -> None:
    grid = (rows, columns)
    layer = AggregatedAttention(4, 1, grid, pool_ratio=ratio, pretrain_grid=pretrain and (pretrain, pretrain))
    pairs = []
    for side, keys, reach in zip(grid, layer.key_grid, layer.pretrain_grid, strict=True):
        places = torch.arange(side).float()
        offset = places[:, None] - F.adaptive_avg_pool1d(places[None], keys)
        pairs.append(offset / (reach - 1) * 8)
    down, right = pairs[0][:, None, :, None], pairs[1][None, :, None, :]
    offsets = torch.stack(torch.broadcast_tensors(down, right), -1).view(-1, 2)
    table, index = layer.position_table()
    expected = offsets.sign() * (offsets.abs() + 1).log2() / 3
    torch.testing.assert_close(table[index], expected)
    assert (table.view(-1, 2)[1:] != table[:-1]).any(1).all()
    bias = layer.cpb_fc2(F.relu(layer.cpb_fc1(expected))).view(1, rows * columns, -1)
    torch.testing.assert_close(layer.position_bias(), bias)


def test_tables_hold_the_offsets_that_occur() -> None:
    """Where the ratio divides the sides, as in all published models, there is no other entry."""
    for side, ratio in ((16, 8), (14, 2), (28, 4), (7, 7)):
        table, index = AggregatedAttention(4, 1, (side, side), pool_ratio=ratio).position_table()
        assert index.unique().tolist() == list(range(len(table)))


@quick
@given(sides, sides, st.sampled_from([1, 3, 5]))
def test_window_and_pool_share_one_softmax(rows: int, columns: int, window: int) -> None:
    layer = strengthened(AggregatedAttention(8, 2, (rows, columns), window_size=window))
    torch.nn.init.zeros_(layer.learnable_tokens)
    torch.nn.init.zeros_(layer.learnable_bias)
    near, far = layer.attention(torch.randn(1, rows, columns, 8))
    assert near.shape == (1, 2, rows * columns, window**2)
    torch.testing.assert_close(near.sum(-1) + far.sum(-1), torch.ones(1, 2, rows * columns))
    reach = window // 2
    seen = [min(rows - 1, reach) + 1, min(columns - 1, reach) + 1]  # by the token in the corner
    assert (near[0, 0, 0] > 0).sum() == math.prod(seen)


def test_far_tokens_count_through_the_pool_alone() -> None:
    layer = strengthened(AggregatedAttention(8, 2, (9, 9), pool_ratio=3))
    x = torch.randn(1, 9, 9, 8)
    torch.nn.init.zeros_(layer.sr.weight)
    changed = x.clone()
    changed[:, 4, 4] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 3)) > 1e-6
    window = torch.zeros(9, 9, dtype=torch.bool)
    window[3:6, 3:6] = True
    assert torch.equal(moved, window)


def test_a_router_that_decides_nothing_gives_plain_attention() -> None:
    kinds: tuple[Any, ...] = (AggregatedAttention, LengthScaledAttention)
    for kind in kinds:
        plain = strengthened(kind(8, 4, (4, 5)))
        gated = kind(8, 4, (4, 5), shared=2, routed=2)
        zero = {key: torch.zeros_like(value) for key, value in gated.state_dict().items() if "router" in key}
        load_weights(gated, plain.state_dict() | zero, "plain")
        x = torch.randn(2, 4, 5, 8)
        torch.testing.assert_close(gated.eval()(x), plain(x))


@pytest.mark.parametrize("kind", [AggregatedAttention, LengthScaledAttention])
def test_gradients_are_those_of_the_function(kind: Any) -> None:
    layer = strengthened(kind(4, 2, (3, 2), shared=2)).double()
    x = torch.randn(1, 3, 2, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x, atol=1e-4)


def test_dropout_takes_weights_of_window_and_pool() -> None:
    torch.manual_seed(0)
    layer = AggregatedAttention(8, 2, (3, 3), attn_drop=0.5)
    torch.nn.init.zeros_(layer.learnable_tokens)
    x = torch.randn(64, 3, 3, 8)
    near, far = layer.train().attention(x)
    assert 0.4 < (near[:, :, 4] == 0).float().mean() < 0.6  # the window of the token in the middle
    assert 0.4 < (far == 0).float().mean() < 0.6
    assert 0.9 < (near.sum(-1) + far.sum(-1)).mean() < 1.1
    near, far = layer.eval().attention(x)
    torch.testing.assert_close(near.sum(-1) + far.sum(-1), torch.ones(64, 2, 9))


def test_tables_are_no_state_and_follow_the_layer() -> None:
    layer = strengthened(AggregatedAttention(8, 2, (4, 4)))
    assert not list(layer.buffers())
    x = torch.randn(1, 4, 4, 8)
    torch.testing.assert_close(layer.double()(x.double()).float(), layer.float()(x), **EXACT)
    low = layer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(low.float(), layer.float()(x), rtol=0.1, atol=0.1)


def test_exports() -> None:
    layer = strengthened(AggregatedAttention(8, 2, (4, 4), shared=0, routed=1))
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x), **EXACT)


def test_created_by_name_pools_to_about_seven() -> None:
    for side, pooled in ((8, 4), (14, 7), (56, 7), (1, 1)):
        layer: Any = create_layer("aggregated", 8, 2, (side, side))
        assert layer.key_grid == (pooled, pooled)
        assert layer.router is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 2}, "window_size=2 must be odd"),
        ({"window_size": -1}, "window_size=-1"),
        ({"pool_ratio": 0}, "pool_ratio=0 must be at least 1"),
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"grid": (0, 4)}, r"grid=\(0, 4\)"),
        ({"routed": 1}, "routed=1 heads with shared=None"),
        ({"shared": 2, "routed": 1}, "shared=2 and routed=1 of heads=2"),
        ({"shared": -1}, "shared=-1"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AggregatedAttention(**{"dim": 8, "num_heads": 2, "grid": (4, 4)} | options)


@pytest.mark.parametrize("kind", [AggregatedAttention, LengthScaledAttention])
@pytest.mark.parametrize("shape", [(1, 5, 4, 8), (1, 4, 4, 6), (1, 16, 8)])
def test_other_grids_are_refused(kind: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(B, 4, 4, 8\)"):
        kind(8, 2, (4, 4))(torch.zeros(shape))

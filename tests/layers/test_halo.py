"""Halo attention against a loop over pixels, against timm, and in timm's models."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers.halo_attn import HaloAttn
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import ByobNet
from torch import Tensor, nn

import heed
from heed.layers.halo import HaloAttention, HaloSelfAttention

EXACT = {"rtol": 1e-4, "atol": 2e-5}
quick = settings(max_examples=20, deadline=None)

SHAPES = st.fixed_dictionaries(
    {
        "num_heads": st.sampled_from([1, 2]),
        "dim_head": st.sampled_from([None, 3]),
        "block_size": st.integers(1, 4),
        "halo_size": st.integers(0, 2),
        "qkv_bias": st.booleans(),
        "scale_pos_embed": st.booleans(),
    }
)


def layer_and_input(height: int, width: int, seed: int = 0, **options: Any) -> tuple[HaloAttention, Tensor]:
    torch.manual_seed(seed)
    layer = HaloAttention(8, **{"num_heads": 2, "block_size": 4, "halo_size": 1} | options).eval()
    return layer, torch.randn(2, 8, height, width)


def by_loops(layer: HaloAttention, x: Tensor) -> Tensor:
    """Halo attention (stride 1) of the first image, pixel by pixel."""
    b, h, d = layer.block_size, layer.halo_size, layer.dim_head
    height, width = x.shape[-2:]
    q = layer.q(x)[0].unflatten(0, (layer.num_heads, -1))
    k, v = layer.kv(x)[0].unflatten(0, (layer.num_heads, -1)).split([d, layer.dim_out // layer.num_heads], 1)
    out = torch.zeros(layer.num_heads, v.shape[1], height, width)
    for head in range(layer.num_heads):
        for r in range(height):
            for c in range(width):
                query, logits, values = q[head, :, r, c], [], []
                top, left = r // b * b, c // b * b
                for j in range(b + 2 * h):
                    for i in range(b + 2 * h):
                        y, z = top - h + j, left - h + i
                        inside = 0 <= y < height and 0 <= z < width
                        if not inside and layer.padding == "mask":
                            continue
                        key = k[head, :, y, z] if inside else torch.zeros(d)
                        relative = query @ layer.pos_embed.height_rel[j - (r - top) + layer.window - 1]
                        relative = relative + query @ layer.pos_embed.width_rel[i - (c - left) + layer.window - 1]
                        factor = layer.scale if layer.scale_pos_embed else 1.0
                        logits.append(layer.scale * query @ key + factor * relative)
                        values.append(v[head, :, y, z] if inside else torch.zeros(v.shape[1]))
                out[head, :, r, c] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out.flatten(0, 1)


@pytest.mark.parametrize("padding", ["zeros", "mask"])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
@torch.no_grad()
def test_the_equation(padding: str, size: tuple[int, int]) -> None:
    layer, x = layer_and_input(*size, block_size=2, padding=padding, pad=True, qkv_bias=True)
    nn.init.normal_(layer.kv.bias)
    torch.testing.assert_close(layer(x)[0], by_loops(layer, x), **EXACT)


@quick
@given(shape=SHAPES, blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.sampled_from([1, 2]))
@torch.no_grad()
def test_equals_timm(shape: dict[str, Any], blocks: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    height, width = (n * shape["block_size"] for n in blocks)
    assume(min(height, width) >= stride)
    theirs = HaloAttn(8, 12, stride=stride, **shape).eval()
    ours = HaloAttention(8, 12, stride=stride, **shape).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, height, width)
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)


@torch.no_grad()
def test_one_block_without_halo_is_dense_attention() -> None:
    layer, x = layer_and_input(4, 4, halo_size=0)
    q, k, v = layer.q(x), *layer.kv(x).unflatten(1, (2, 2, 4)).unbind(2)
    q, k, v = (t.reshape(2, 2, 4, 16).transpose(2, 3) for t in (q, k, v))
    places = torch.arange(4)
    offset = places[None, :] - places[:, None] + 3
    rows = torch.einsum("bnijd,ikd->bnijk", q.unflatten(2, (4, 4)), layer.pos_embed.height_rel[offset])
    columns = torch.einsum("bnijd,jkd->bnijk", q.unflatten(2, (4, 4)), layer.pos_embed.width_rel[offset])
    bias = (rows[..., :, None] + columns[..., None, :]).reshape(2, 2, 16, 16)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=layer.scale)
    torch.testing.assert_close(layer(x), dense.transpose(2, 3).reshape(2, 8, 4, 4), **EXACT)


@torch.no_grad()
def test_shifts_by_whole_blocks_shift_the_output() -> None:
    layer, x = layer_and_input(16, 16)
    interior = (slice(None), slice(None), slice(8, 12), slice(8, 12))
    for shift, same in ((4, True), (1, False)):
        moved = layer(x.roll((-shift, -shift), (2, 3))).roll((shift, shift), (2, 3))
        assert torch.allclose(moved[interior], layer(x)[interior], **EXACT) is same


@quick
@given(
    row=st.integers(0, 11),
    column=st.integers(0, 11),
    halo=st.integers(0, 3),
    padding=st.sampled_from(["zeros", "mask"]),
)
@torch.no_grad()
def test_a_pixel_reaches_the_blocks_whose_window_holds_it(row: int, column: int, halo: int, padding: str) -> None:
    layer, x = layer_and_input(12, 12, halo_size=halo, padding=padding)
    other = x.clone()
    other[:, :, row, column] += 1
    changed = (layer(x) != layer(other)).any(1).any(0)
    for top in range(0, 12, 4):
        for left in range(0, 12, 4):
            seen = all(start - halo <= at < start + 4 + halo for start, at in ((top, row), (left, column)))
            assert changed[top : top + 4, left : left + 4].any().item() is seen


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_reach_everything_but_the_unread_table_rows(stride: int) -> None:
    layer, x = layer_and_input(8, 8, stride=stride, halo_size=2, qkv_bias=True)
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        unread = layer.window - layer.block_size // stride if name.startswith("pos_embed") else 0
        rows = parameter.grad.flatten(1).abs().sum(1) if parameter.ndim > 1 else parameter.grad.abs()
        assert (rows[:unread] == 0).all(), name
        assert (rows[unread:] > 0).all(), name


@torch.no_grad()
def test_masked_padding_has_no_weight() -> None:
    layer, x = layer_and_input(12, 12, padding="mask", qkv_bias=True)
    torch.nn.init.zeros_(layer.kv.weight)
    torch.nn.init.ones_(layer.kv.bias)
    torch.testing.assert_close(layer(x), torch.ones(2, 8, 12, 12))  # constant values: the weights of pixels sum to 1
    sink = HaloAttention(8, num_heads=2, block_size=4, halo_size=1, qkv_bias=True)
    sink.load_state_dict(layer.state_dict())
    y = sink(x)
    assert (y[:, :, 0] < 0.999).all()
    torch.testing.assert_close(y[:, :, 4:8, 4:8], torch.ones(2, 8, 4, 4))


@torch.no_grad()
def test_both_paddings_agree_inside() -> None:
    zeros, x = layer_and_input(12, 12)
    mask, _ = layer_and_input(12, 12, padding="mask")
    difference = (zeros(x) - mask(x)).abs().amax((0, 1))
    assert difference[4:8, 4:8].max() < 1e-6
    assert difference[0].min() > 1e-6


@pytest.mark.parametrize(("block", "avg_down"), [(4, False), (4, True), (3, False)])
def test_pad_takes_any_size(block: int, avg_down: bool) -> None:
    for padding in ("zeros", "mask"):
        layer, x = layer_and_input(7, 10, stride=2, block_size=block, avg_down=avg_down, padding=padding, pad=True)
        y = layer(x)
        assert y.shape == (2, 8, 4, 5)
        assert y.isfinite().all()


def test_bfloat16_autocast() -> None:
    layer, x = layer_and_input(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_state_dict_round_trip() -> None:
    layer, x = layer_and_input(8, 8)
    other, _ = layer_and_input(8, 8, seed=1)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_receptive_field_is_almost_free_of_parameters() -> None:
    layers = [HaloAttention(64, num_heads=4, block_size=8, halo_size=h) for h in range(1, 8)]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert [b - a for a, b in pairwise(sizes)] == [2 * 4 * layers[0].dim_head] * 6
    costs = [layer.complexity(64, 64) for layer in layers]
    assert [cost.receptive_field for cost in costs] == [10, 12, 14, 16, 18, 20, 22]
    assert costs[2].memory_ratio == (14 / 8) ** 2
    assert costs[2].per_pixel_ratio == 49
    assert layers[2].complexity(128, 128).multiply_adds == 4 * costs[2].multiply_adds
    dense = 64 * 64 * 3 + 14**2 * (64 + 64) + 2 * 27 * 64
    assert costs[2].multiply_adds == 64 * 64 * dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 3}, "stride=3"),
        ({"block_size": 0}, "block_size=0"),
        ({"halo_size": -1}, "halo_size=-1"),
        ({"dim_out": 9, "num_heads": 2}, "not divisible by num_heads=2"),
        ({"padding": "reflect"}, "padding='reflect'"),
        ({"dim_out": 64, "num_heads": 64, "qk_ratio": 0.1}, "qk_ratio=0.1 .* set dim_head"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaloAttention(8, **options)


def test_bad_maps() -> None:
    layer, _ = layer_and_input(8, 8)
    with pytest.raises(ValueError, match=r"9 x 8 .* block_size=4: add 3 rows and 0 columns"):
        layer(torch.randn(1, 8, 9, 8))
    with pytest.raises(ValueError, match="dim=8, the input has 6 channels"):
        layer(torch.randn(1, 6, 8, 8))


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (16, 24), (7, 5), (1, 1), (2, 3)])
def test_registered_for_grids(grid: tuple[int, int]) -> None:
    layer = heed.create_layer("halo", 16, 2, grid)
    assert isinstance(layer, HaloSelfAttention)
    x = torch.randn(2, *grid, 16)
    assert layer(x).shape == x.shape
    block = layer.attn.block_size
    assert block == {(8, 8): 4, (14, 14): 7, (16, 24): 8}.get(grid, block)


def test_in_heeds_vit() -> None:
    model = heed.create_model("vit_micro", attention="halo", attention_options={"padding": "mask"}, depth=1)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_in_timms_resnet() -> None:
    """Halo attention in place of the 3 x 3 convolutions of the last stage, through timm's own pyramid."""
    torch.manual_seed(0)
    model = timm.create_model("resnet26", features_only=True, output_stride=32)
    for block in model.layer4:
        conv = block.conv2
        block.conv2 = HaloAttention(
            conv.in_channels, conv.out_channels, stride=conv.stride[0], num_heads=8, block_size=2, halo_size=1
        )
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    maps[-1].mean().backward()
    assert all(p.grad is not None for p in model.layer4.parameters())


@torch.no_grad()
def test_swapped_into_timms_halonet() -> None:
    torch.manual_seed(0)
    kwargs = {"block_size": 4, "halo_size": 1, "num_heads": 2}
    config = replace(model_cfgs["halonet26t"], self_attn_kwargs=kwargs)
    theirs = ByobNet(config, num_classes=5, zero_init_last=False).eval()
    x = torch.randn(1, 3, 128, 128)
    # As timm's own switch, ...
    named = ByobNet(replace(config, self_attn_layer=HaloAttention), num_classes=5).eval()
    named.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(named(x), theirs(x), **EXACT)
    # ... and module by module in a model that is there.
    swapped = copy.deepcopy(theirs)
    build = partial(HaloAttention, **kwargs)
    for module in list(swapped.modules()):
        if isinstance(old := getattr(module, "self_attn", None), HaloAttn):
            stride = old.block_stride if isinstance(old.pool, nn.Identity) else 2
            module.self_attn = build(old.q.in_channels, stride=stride).eval()
            module.self_attn.load_state_dict(old.state_dict())
    torch.testing.assert_close(swapped(x), theirs(x), **EXACT)

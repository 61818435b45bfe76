"""Focal modulation: its equation, what each level sees, gates, surgery on windows and levels, and its hosts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.checkpoint import load_weights
from heed.layers.focal import FocalModulation, refocus
from heed.layers.registry import create_layer

EXACT = {"rtol": 1e-4, "atol": 2e-5}
quick = settings(max_examples=12)
sides = st.integers(1, 8)


def layer_and_input(height: int, width: int, **options: Any) -> tuple[FocalModulation, Tensor]:
    torch.manual_seed(0)
    layer = FocalModulation(8, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer, torch.randn(2, height, width, 8)


@torch.no_grad()
def set_gates(layer: FocalModulation, values: list[float]) -> None:
    """Gates that do not depend on the input."""
    layer.f.weight[2 * layer.dim :] = 0
    layer.f.bias[2 * layer.dim :] = torch.tensor(values)


@quick
@given(sides, sides, st.integers(0, 3), st.sampled_from([1, 3, 5]), st.booleans(), st.booleans())
def test_equals_the_equation(height: int, width: int, levels: int, window: int, norm: bool, post: bool) -> None:
    layer, x = layer_and_input(height, width, levels=levels, window=window, normalize_modulator=norm, post_norm=post)
    q, context, gates = layer.f(x).split([8, 8, levels + 1], -1)
    gathered = torch.zeros_like(q)
    for level in range(levels):
        kernel = window + 2 * level
        weight = layer.focal_layers[level][0].weight  # type: ignore[index]
        context = F.gelu(F.conv2d(context.movedim(-1, 1), weight, padding=kernel // 2, groups=8)).movedim(1, -1)
        gathered = gathered + gates[..., level : level + 1] * context
    gathered = gathered + gates[..., levels:] * F.gelu(context.mean((1, 2), keepdim=True))
    if norm:
        gathered = gathered / (levels + 1)
    modulator = gathered @ layer.h.weight[:, :, 0, 0].T + layer.h.bias
    expected = layer.proj(layer.ln(q * modulator))
    torch.testing.assert_close(layer(x), expected, **EXACT)
    parts = layer.parts(x)
    torch.testing.assert_close(parts.modulator.movedim(1, -1), modulator, **EXACT)
    torch.testing.assert_close(parts.strength(), modulator.norm(dim=-1), **EXACT)
    torch.testing.assert_close(parts.shares().sum(1), torch.ones(2, height, width))


def test_without_levels_the_mean_of_the_context_is_all_there_is() -> None:
    layer, x = layer_and_input(4, 5, levels=0)
    parts = layer.parts(x)
    (whole,) = parts.contexts
    torch.testing.assert_close(whole[..., 0, 0], F.gelu(layer.f(x)[..., 8:16].mean((1, 2))), **EXACT)
    assert layer.receptive_fields == []


@quick
@given(st.integers(0, 3))
def test_closed_gates_leave_the_output_bias(levels: int) -> None:
    layer, x = layer_and_input(5, 4, levels=levels)
    set_gates(layer, [0.0] * (levels + 1))
    torch.nn.init.zeros_(layer.h.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), layer.proj.bias.expand_as(x))


@quick
@given(st.sampled_from([(3, 1), (3, 2), (5, 1), (1, 3)]))
def test_a_level_sees_its_receptive_field(case: tuple[int, int]) -> None:
    window, levels = case
    layer, x = layer_and_input(17, 17, window=window, levels=levels)
    set_gates(layer, [0.0] * (levels - 1) + [1.0, 0.0])  # the last convolutional level alone
    changed = x.clone()
    changed[:, 8, 8] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 3)) > 1e-7
    reach = layer.receptive_fields[-1] // 2
    inside = torch.zeros(17, 17, dtype=torch.bool)
    inside[8 - reach : 9 + reach, 8 - reach : 9 + reach] = True
    assert not (moved & ~inside).any()
    assert moved[8 - reach, 8 - reach]
    assert moved[8 + reach, 8 + reach]


def test_receptive_fields() -> None:
    assert FocalModulation(4, 3, 3).receptive_fields == [3, 7, 13]
    assert FocalModulation(4, 9, 3).receptive_fields == [9, 19, 31]


@quick
@given(st.integers(0, 3), st.integers(0, 3))
def test_shifting_the_input_shifts_the_output(down: int, right: int) -> None:
    """Away from the borders, where the global context has no say."""
    layer, x = layer_and_input(16, 16)
    set_gates(layer, [0.7, -0.4, 0.0])
    shifted = layer(x.roll((down, right), (1, 2)))
    inner = slice(6, 13)  # three tokens of reach and three of shift from the seam
    torch.testing.assert_close(shifted[:, inner, inner], layer(x).roll((down, right), (1, 2))[:, inner, inner], **EXACT)


@quick
@given(st.integers(1, 3), st.sampled_from([5, 7, 9]))
def test_surgery_to_wider_windows_changes_nothing(levels: int, window: int) -> None:
    narrow, x = layer_and_input(7, 9, levels=levels)
    wide = FocalModulation(8, window, levels).eval()
    load_weights(wide, refocus(narrow.state_dict(), wide), "narrow")
    torch.testing.assert_close(wide(x), narrow(x), **EXACT)
    back = FocalModulation(8, 3, levels)
    load_weights(back, refocus(wide.state_dict(), back), "wide")
    for key, value in narrow.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_surgery_to_more_levels() -> None:
    few, x = layer_and_input(7, 9, levels=1)
    many = FocalModulation(8, levels=3).eval()
    load_weights(many, refocus(few.state_dict(), many), "few")
    gates = many.parts(x).gates
    torch.testing.assert_close(gates[:, [0, 3]], few.parts(x).gates, **EXACT)
    assert not gates[:, 1:3].any()
    assert (many(x) - few(x)).abs().max() > 1e-3  # the global context comes from the third level now
    set_gates(few, [0.6, 0.0])
    load_weights(many, refocus(few.state_dict(), many), "few")
    torch.testing.assert_close(many(x), few(x), **EXACT)


def test_surgery_does_not_drop_levels_or_halve_tokens() -> None:
    many, _ = layer_and_input(3, 3, levels=3)
    with pytest.raises(NotImplementedError, match="levels=2, the weights have 3.*build the model with levels=3"):
        refocus(many.state_dict(), FocalModulation(8, levels=2))
    odd = many.state_dict()
    odd["focal_layers.0.0.weight"] = torch.zeros(8, 1, 4, 4)
    with pytest.raises(ValueError, match="cannot be centred in a kernel of 3"):
        refocus(odd, FocalModulation(8, levels=3))


def test_layouts_agree() -> None:
    layer, x = layer_and_input(4, 6)
    expected = layer(x)
    torch.testing.assert_close(layer(x.flatten(1, 2), 4, 6), expected.flatten(1, 2))
    fixed, first = FocalModulation(8, grid=(4, 6)), FocalModulation(8, channels_first=True)
    for other in (fixed, first):
        load_weights(other, layer.state_dict(), "layer")
    torch.testing.assert_close(fixed(x.flatten(1, 2)), expected.flatten(1, 2))
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)), expected.permute(0, 3, 1, 2), **EXACT)
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2).contiguous()), expected.permute(0, 3, 1, 2), **EXACT)


def test_nothing_is_kept_on_the_module() -> None:
    layer, x = layer_and_input(4, 4)
    before = set(vars(layer))
    layer(x)
    layer.parts(x)
    assert set(vars(layer)) == before


def test_the_mean_over_large_maps_is_precise_in_half_precision() -> None:
    layer, _ = layer_and_input(1, 1, levels=0)
    x = torch.rand(1, 200, 200, 8) + 1
    (precise,) = layer.parts(x).contexts
    (half,) = layer.bfloat16().parts(x.bfloat16()).contexts
    torch.testing.assert_close(half.float(), precise, rtol=0.03, atol=0.03)


def test_gradients_are_those_of_the_function() -> None:
    layer, x = layer_and_input(3, 4, post_norm=True)
    assert torch.autograd.gradcheck(layer.double(), x[:1].double().requires_grad_())


def test_exports() -> None:
    layer, x = layer_and_input(4, 4)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, r"window=4 and factor=2 give kernels \[4, 6\]: all must be odd"),
        ({"factor": 1}, r"window=3 and factor=1 give kernels \[3, 4\]"),
        ({"window": -1}, "window=-1"),
        ({"levels": -1}, "levels=-1 must not be negative"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FocalModulation(8, **options)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 24, 8), (4, 5), "24 tokens are not height=4 times width=5"),
        ((2, 24, 8), (), "24 tokens are not height=0"),
        ((2, 4, 6, 9), (), r"dim=8, the input \(2, 4, 6, 9\) has 9"),
        ((24, 8), (), r"input \(24, 8\): give"),
    ],
)
def test_bad_input(shape: tuple[int, ...], grid: tuple[int, ...], message: str) -> None:
    layer, _ = layer_and_input(4, 4)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape), *grid)


def test_drops_into_the_vit_host_and_learns_there() -> None:
    model = heed.create_model("vit_micro", attention="focal", attention_options={"levels": 1})
    assert create_layer("focal", 16, 4, (8, 8)).receptive_fields == [3, 7]  # type: ignore[attr-defined]
    y = torch.arange(16) % 4
    x = torch.randn(4, 1, 8, 8)[y] + 0.1 * torch.randn(16, 1, 8, 8)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_takes_the_place_of_transformers_modulation() -> None:
    pytest.importorskip("transformers")
    from transformers import FocalNetBackbone, FocalNetConfig

    config = FocalNetConfig(
        image_size=32, embed_dim=8, depths=[1, 2], hidden_sizes=[8, 16], focal_levels=[2, 3], focal_windows=[3, 5],
        use_post_layernorm_in_modulation=True, normalize_modulator=True, out_features=["stage1", "stage2"],
    )  # fmt: skip
    host = FocalNetBackbone(config).eval()
    x = torch.randn(1, 3, 32, 40)
    expected = host(x).feature_maps
    for i, stage in enumerate(host.focalnet.encoder.stages):
        for block in stage.layers:
            own = FocalModulation(
                8 * 2**i, config.focal_windows[i], config.focal_levels[i], post_norm=True, normalize_modulator=True
            )
            own.load_transformers(block.modulation.state_dict())
            block.modulation = own.eval()
    for ours, theirs in zip(host(x).feature_maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@torch.no_grad()
def test_mixes_the_tokens_of_a_timm_block() -> None:
    from timm.layers import Mlp
    from timm.models.metaformer import MetaFormerBlock

    block = MetaFormerBlock(8, token_mixer=lambda dim, **_: FocalModulation(dim, channels_first=True), mlp_layer=Mlp)
    block.mlp = Mlp(8, 16, use_conv=True)
    x = torch.randn(1, 8, 5, 6)
    assert block.eval()(x).shape == x.shape

"""MSA-Conv's operators and layers: their equation, what borders do, special cases, heed's additions, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import heed
from heed.checkpoint import load_weights, read_weights
from heed.engine.attend import attend
from heed.engine.patterns import Full, Neighborhood
from heed.layers.msa_conv import ConvWindow, msa_conv, msa_conv_av, msa_conv_qk
from heed.layers.registry import create_layer
from heed.layers.tic import IPM, MDCSM, MSAConv2d, msa_conv_multiply_adds

GOLDEN = Path(__file__).parents[1] / "golden" / "52-tic" / "layer_k5_stride2_dil2.safetensors"
EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
quick = settings(max_examples=12)
sides = st.integers(1, 9)
windows = st.sampled_from([(3, 1), ((5, 3), 2), ((1, 3), 1), (2, 2), (7, 1), (3, (1, 3)), (1, 1)])  # kernel, dilation
pad_modes = st.sampled_from(["zeros", "mask"])


def maps(height: int, width: int, channels: int = 4, count: int = 3, pool: int = 1) -> list[Tensor]:
    small = -(-height // pool), -(-width // pool)
    return [torch.randn(2, channels, *((height, width) if i == 0 else small)) for i in range(count)]


def from_halves(q: Tensor, k: Tensor, v: Tensor, *window: Any, heads: int, pad_mode: str, pool: int = 1) -> Tensor:
    dots = msa_conv_qk(q, k, *window, heads=heads, pad_mode=pad_mode, pool=pool).unflatten(1, (heads, -1))
    weights = (dots * (q.shape[1] // heads) ** -0.5).softmax(2).nan_to_num()  # NaN where no tap is on the map
    return msa_conv_av(weights.flatten(1, 2), v, *window, heads=heads, pool=pool)


@quick
@given(sides, sides, windows, st.sampled_from([1, 2, 4]), pad_modes, st.sampled_from([1, 2, 3]))
def test_the_whole_is_its_halves(
    height: int, width: int, window: tuple[Any, Any], heads: int, pad_mode: str, pool: int
) -> None:
    q, k, v = maps(height, width, pool=pool)
    whole = msa_conv(q, k, v, *window, heads=heads, pad_mode=pad_mode, pool=pool)
    halves = from_halves(q, k, v, *window, heads=heads, pad_mode=pad_mode, pool=pool)
    torch.testing.assert_close(whole, halves, **EXACT)


@quick
@given(st.integers(3, 9), st.integers(3, 9), st.sampled_from([1, 2]), st.sampled_from([(3, 3), (5, 3)]))
def test_equals_the_unfold_formulation(height: int, width: int, dilation: int, kernel: tuple[int, int]) -> None:
    q, k, v = maps(height, width)
    reach = dilation * (kernel[0] - 1) // 2, dilation * (kernel[1] - 1) // 2
    keys, values = (F.unfold(x, kernel, dilation, reach).view(2, 4, -1, height, width) for x in (k, v))
    dots = (q[:, :, None] * keys).sum(1)
    torch.testing.assert_close(msa_conv_qk(q, k, kernel, dilation), dots, **EXACT)
    out = ((dots / 2).softmax(1)[:, None] * values).sum(2)
    torch.testing.assert_close(msa_conv(q, k, v, kernel, dilation), out, **EXACT)


@quick
@given(sides, sides, windows)
def test_the_pattern_is_the_window(height: int, width: int, window: tuple[Any, Any]) -> None:
    pattern = ConvWindow((height, width), *window)
    (rows, columns), (down, right), steps = pattern.kernel, pattern.reach, pattern.dilation
    expected = torch.zeros(height, width, height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            for i in range(rows):
                for j in range(columns):
                    a, b = y - down + i * steps[0], x - right + j * steps[1]
                    if 0 <= a < height and 0 <= b < width:
                        expected[y, x, a, b] = True
    assert torch.equal(pattern.mask(height * width), expected.view(height * width, -1))
    keys = (height + 2 * down) * (width + 2 * right)
    padded = ConvWindow((height, width), *window, padded=True).mask(height * width, keys)
    assert (padded.sum(1) == pattern.taps).all()


@quick
@given(st.integers(1, 5), st.integers(1, 5))
def test_a_masked_window_over_the_whole_map_is_global_attention(height: int, width: int) -> None:
    q, k, v = maps(height, width)
    tokens = [x.flatten(2).transpose(1, 2)[:, None] for x in (q, k, v)]
    whole = attend(tokens[0], tokens[1], tokens[2], Full())
    ours = msa_conv(q, k, v, (2 * height - 1, 2 * width - 1), pad_mode="mask")
    torch.testing.assert_close(ours, whole[:, 0].transpose(1, 2).reshape(q.shape), **EXACT)


def test_neighborhoods_agree_inside_and_differ_at_the_border() -> None:
    q, k, v = maps(8, 9)
    tokens = [x.flatten(2).transpose(1, 2)[:, None] for x in (q, k, v)]
    slid = attend(tokens[0], tokens[1], tokens[2], Neighborhood((8, 9), 3))[:, 0].transpose(1, 2).reshape(q.shape)
    zeros, masked = (msa_conv(q, k, v, 3, pad_mode=mode) for mode in ("zeros", "mask"))
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(zeros[inner], slid[inner], **EXACT)
    torch.testing.assert_close(masked[inner], slid[inner], **EXACT)
    border = torch.ones(8, 9, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    for a, b in ((zeros, slid), (masked, slid), (zeros, masked)):
        assert ((a - b).abs().amax((0, 1))[border] > 1e-4).all()


def test_padding_takes_weight_unless_it_is_masked() -> None:
    q, k, _ = maps(6, 7)
    ones = torch.ones_like(q)
    zeros, masked = (msa_conv(q, k, ones, 3, pad_mode=mode) for mode in ("zeros", "mask"))
    torch.testing.assert_close(masked, ones)
    torch.testing.assert_close(zeros[..., 1:-1, 1:-1], ones[..., 1:-1, 1:-1])  # constant values stay, away from borders
    assert (zeros[..., 0, :] < 1).all()
    assert msa_conv_qk(q, k, 3)[:, 0, 0].eq(0).all()  # the first tap of the first row lies outside
    assert msa_conv_qk(q, k, 3, pad_mode="mask")[:, 0, 0].isneginf().all()


@pytest.mark.parametrize("kind", [MSAConv2d, IPM])
@pytest.mark.parametrize("pad_mode", ["zeros", "mask"])
@torch.no_grad()
def test_weights_are_those_that_mix(kind: type[MSAConv2d], pad_mode: str) -> None:
    layer = kind(6, 6, 3, dilation=2, padding="same", heads=2, pad_mode=pad_mode).eval()
    x = torch.randn(2, 6, 7, 5)
    weights = layer.attention(x)
    torch.testing.assert_close(weights.unflatten(1, (2, 9)).sum(2), torch.ones(2, 2, 7, 5))
    _, _, v = layer.qkv(x)
    pool = 2 if kind is IPM else 1
    torch.testing.assert_close(msa_conv_av(weights, v, 3, 2, heads=2, pool=pool), layer.mixed(x), **EXACT)


@torch.no_grad()
def test_a_window_that_misses_the_map_has_no_weights() -> None:
    with pytest.warns(UserWarning, match=r"\(0, 0\) would keep it"):
        layer = MSAConv2d(2, 2, 2, dilation=2, padding=1, pad_mode="mask").eval()
    x = torch.randn(1, 2, 1, 1)
    assert not layer.attention(x).any()
    assert not layer.mixed(x).any()


@torch.no_grad()
def test_one_tap_adds_the_value() -> None:
    layer = MSAConv2d(4, 4, 1, padding=0).eval()
    x = torch.randn(1, 4, 3, 5)
    assert torch.equal(layer.attention(x), torch.ones(1, 1, 3, 5))
    _, _, v = layer.qkv(x)
    torch.testing.assert_close(layer(x), F.relu(layer.mlp(v + x)))


@quick
@given(st.integers(-6, 6), st.integers(-6, 6))
@torch.no_grad()
def test_a_periodic_map_may_be_rolled(down: int, right: int) -> None:
    layer = MSAConv2d(3, 3, 3, padding="same", heads=3).eval()

    def periodic(x: Tensor) -> Tensor:
        return layer(F.pad(x, (2, 2, 2, 2), mode="circular"))[..., 2:-2, 2:-2]

    x = torch.randn(1, 3, 6, 7)
    torch.testing.assert_close(
        periodic(x.roll((down, right), (2, 3))), periodic(x).roll((down, right), (2, 3)), **EXACT
    )


@torch.no_grad()
def test_heads_are_layers_of_their_own() -> None:
    q, k, v = maps(5, 6, channels=6)
    for heads in (2, 6):
        groups = zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
        parts = [msa_conv(*group, 3, 2) for group in groups]
        torch.testing.assert_close(msa_conv(q, k, v, 3, 2, heads=heads), torch.cat(parts, 1), **EXACT)


def test_gradients_are_those_of_the_function() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda a, b, c: from_halves(a, b, c, (3, 1), 2, heads=2, pad_mode="zeros"), (q, k, v)
    )
    assert torch.autograd.gradcheck(lambda a, b, c: msa_conv(a, b, c, 3, heads=2, pad_mode="mask"), (q, k, v))


def test_half_precision_scores_come_back_in_float32() -> None:
    q, k, v = maps(4, 5)
    low = msa_conv_qk(q.bfloat16(), k.bfloat16(), 3)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, msa_conv_qk(q.bfloat16().float(), k.bfloat16().float(), 3))
    assert msa_conv(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3).dtype == torch.bfloat16


@torch.no_grad()
def test_inter_pooling_covers_twice_the_window() -> None:
    layer = IPM(2, 2, 3, padding="same").eval()
    x = torch.randn(1, 2, 12, 14)
    moved = x.clone()
    moved[..., 4, 4] += 1.0
    seen = (layer.mixed(moved) != layer.mixed(x)).any(1)[0]
    expected = torch.zeros(12, 14, dtype=torch.bool)
    expected[2:8, 2:8] = True  # the pixel's cell is 2, so queries of cells 1, 2 and 3 see it
    assert torch.equal(seen, expected)
    assert layer(torch.randn(1, 2, 7, 5)).shape == (1, 2, 7, 5)


@quick
@given(st.integers(-3, 3), st.integers(-3, 3))
@torch.no_grad()
def test_cyclic_shift_joins_opposite_borders(down: int, right: int) -> None:
    layer = MSAConv2d(2, 2, 3, padding="same").eval()
    x = torch.randn(1, 2, 11, 12)
    shifted = MDCSM(layer, (down, right))(x)
    assert torch.equal(shifted, layer(x.roll((down, right), (2, 3))).roll((-down, -right), (2, 3)))
    inner = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(shifted[inner], layer(x)[inner], **EXACT)
    moved = x.clone()
    moved[..., -1, :] += 1.0
    assert (MDCSM(layer, (down, right))(moved)[..., 0, :] != shifted[..., 0, :]).any() == (down != 0)


def test_directions() -> None:
    assert MDCSM.directions(2) == [(2, 0), (0, 2), (-2, 0), (0, -2)]
    assert len(set(MDCSM.directions(1, diagonals=True))) == 8


@torch.no_grad()
def test_same_weights_take_any_size_and_the_inside_of_an_image_is_that_of_its_crop() -> None:
    net = nn.Sequential(*(MSAConv2d(3, 3, 3, dilation=2, padding="same") for _ in range(2))).eval()
    for height, width in ((32, 32), (48, 40), (33, 57)):
        x = torch.randn(1, 3, height, width)
        y = net(x)
        assert y.shape == x.shape
        crop = net(x[..., 3:27, 5:29])
        torch.testing.assert_close(crop[..., 6:-6, 6:-6], y[..., 9:21, 11:23], **EXACT)  # 2 + 1 pixels per layer


def test_multiply_adds() -> None:
    costs = msa_conv_multiply_adds(64, 28, 28, 7)
    assert costs["MSA-Conv"] == 28**2 * (3 * 64**2 + 2 * 49 * 64 + 49 * 64**2)
    assert costs["global attention"] == 28**2 * 4 * 64**2 + 2 * 28**4 * 64
    layer = MSAConv2d(64, 64, 7, padding="same")
    weights = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    pairs = round(ConvWindow((28, 28), 7, padded=True).density(28**2, 34**2) * 28**2 * 34**2)
    assert costs["MSA-Conv"] == 28**2 * weights + 2 * 64 * pairs
    double = msa_conv_multiply_adds(64, 56, 56, 7)
    assert double["MSA-Conv"] == 4 * costs["MSA-Conv"]  # linear in pixels, and the other almost quadratic
    assert double["global attention"] > 13 * costs["global attention"]
    assert msa_conv_multiply_adds(8, 9, 9, 3, 16, 2)["MSA-Conv"] == 81 * (192 + 144) + 25 * 9 * 8 * 16


def test_authors_weights_from_a_file(tmp_path: Path) -> None:
    case = load_file(GOLDEN)
    names = {key.removeprefix("state."): value for key, value in case.items() if key.startswith("state.")}
    save_file(names, tmp_path / "layer.safetensors")
    layer = MSAConv2d(6, 6, 5, 2, 2, padding="same", bias=True).eval()
    load_weights(layer, read_weights(tmp_path / "layer.safetensors"), "layer.safetensors")
    torch.testing.assert_close(layer(case["input.x"]), case["output.y"], **EXACT)
    with pytest.raises(ValueError, match=r"does not fit MSAConv2d; missing: mlp\.bias"):
        load_weights(layer, {key: value for key, value in names.items() if key != "mlp.bias"}, "these")


def test_takes_the_place_of_convolutions_in_timm() -> None:
    model: Any = timm.create_model("resnet10t", num_classes=3)
    for stage in (model.layer1, model.layer2):
        block = stage[0]
        block.conv2 = MSAConv2d.in_place_of(block.conv2, heads=4, dropout=0.0)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    strided = MSAConv2d.in_place_of(nn.Conv2d(4, 8, 3, 2, 1, bias=True))
    assert strided(torch.randn(1, 4, 9, 8)).shape == (1, 8, 5, 4)
    assert strided.mlp.bias is not None


def test_drops_into_the_vit_host() -> None:
    layer: Any = create_layer("msa_conv", 8, 2, (5, 6)).eval()
    assert (layer.heads, layer.kernel_size) == (2, (3, 3))
    x = torch.randn(2, 5, 6, 8)
    maps = MSAConv2d(8, 8, 3, heads=2).eval()
    maps.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert heed.create_model("vit_micro", attention="msa_conv")(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_dropout_is_of_weights_in_training() -> None:
    layer = MSAConv2d(4, 4, 3, dropout=0.5)
    x = torch.randn(1, 4, 6, 6)
    assert not torch.equal(layer.mixed(x), layer.mixed(x))
    assert torch.equal(layer.eval().mixed(x), layer.mixed(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel 4 with dilation 1 on axis 0 has no centre; take an odd kernel"),
        ({"kernel_size": (3, 2), "dilation": 3}, "kernel 2 with dilation 3 on axis 1"),
        ({"kernel_size": 0}, "0 must be an integer >= 1"),
        ({"heads": 3}, "dim=4 is not divisible by num_heads=3"),
        ({"pad_mode": "zero"}, "unknown pad_mode 'zero'; did you mean 'zeros'"),
        ({"kernel_size": 2, "dilation": 2, "padding": "same"}, "padding='same' needs odd sides"),
        ({"padding": "valid"}, "padding='valid' must be 'same' or pixels"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSAConv2d(4, 4, **cast(Any, {"kernel_size": 3} | options))


def test_padding_that_changes_the_size_is_named() -> None:
    with pytest.warns(UserWarning, match=r"padding=1 with kernel_size=\(7, 7\).*\(3, 3\) would keep it"):
        layer = MSAConv2d(2, 2, 7)
    assert layer(torch.randn(1, 2, 9, 10)).shape == (1, 2, 5, 6)  # as with the authors
    with pytest.raises(ValueError, match="kernel of 7 x 7 is larger than the map of 4 x 9 pixels, padded to 6 x 11"):
        layer(torch.randn(1, 2, 4, 9))


def test_bad_maps() -> None:
    layer = MSAConv2d(4, 4, 3)
    for shape in ((4, 6, 6), (1, 6, 6, 4)):
        with pytest.raises(ValueError, match=r"MSAConv2d takes maps \(B, 4, H, W\)"):
            layer(torch.zeros(shape))
    q = torch.zeros(1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"maps must be \(B, C, H, W\), not \(4, 6, 6\)"):
        msa_conv_qk(q[0], q[0], 3)
    with pytest.raises(ValueError, match=r"k \(1, 2, 6, 6\) must be \(1, 4, 6, 6\)"):
        msa_conv_qk(q, q[:, :2], 3)
    with pytest.raises(ValueError, match=r"v \(1, 4, 6, 6\) must be \(1, 4, 3, 3\) .* pool=2"):
        msa_conv(q, q[..., ::2, ::2], q, 3, pool=2)
    with pytest.raises(ValueError, match="stride=2: the operators work on every pixel"):
        msa_conv_qk(q, q, 3, stride=2)
    with pytest.raises(ValueError, match="stride=2"):
        msa_conv_av(torch.zeros(1, 9, 6, 6), q, 3, stride=2)
    with pytest.raises(ValueError, match="has 9 channels; 2 heads of 9 taps make 18"):
        msa_conv_av(torch.zeros(1, 9, 6, 6), q, 3, heads=2)
    with pytest.raises(ValueError, match="dim=4 is not divisible by num_heads=3"):
        msa_conv_qk(q, q, 3, heads=3)
    with pytest.raises(ValueError, match="6 x 6 pixels into 3 x 3, so the shift cannot be undone"):
        MDCSM(MSAConv2d(4, 4, 3, 2), (1, 0))(q)

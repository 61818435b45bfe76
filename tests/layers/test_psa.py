"""Polarized self-attention: both branches by hand, symmetries, exact counts, and insertion into timm's networks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.layers.psa import PSA, ChannelPSA, SpatialPSA, insert_psa, load_authors, psa_overhead

FORMS = ["parallel", "sequential", "paper"]
KINDS = [(layout, variant) for layout in ("parallel", "sequential") for variant in ("code", "paper")]
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def strong(module: Any) -> Any:
    """Weights strong enough for the masks to leave 0.5."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


@pytest.mark.parametrize("form", FORMS)
def test_channel_mask_by_the_equations(form: str) -> None:
    branch, x = strong(ChannelPSA(16, form)), torch.randn(2, 16, 5, 7)
    values, query = branch.v(x).flatten(2), branch.q(x).flatten(2).softmax(-1)
    pooled = (values @ query.transpose(1, 2))[..., None]
    torch.testing.assert_close(branch.mask(x), torch.sigmoid(branch.up(pooled)), **EXACT)
    torch.testing.assert_close(branch(x), x * branch.mask(x))


@pytest.mark.parametrize("form", FORMS)
def test_spatial_mask_by_the_equations(form: str) -> None:
    branch, x = strong(SpatialPSA(16, form)), torch.randn(2, 16, 5, 7)
    q, values = branch.q(x).flatten(2).mean(2)[:, None], branch.v(x).flatten(2)
    logits = {
        "parallel": (q @ values).softmax(-1),
        "sequential": q @ values.softmax(-1),
        "paper": q.softmax(-1) @ values,
    }[form]
    torch.testing.assert_close(branch.mask(x), torch.sigmoid(logits).view(2, 1, 5, 7), **EXACT)


@pytest.mark.parametrize(("layout", "variant"), KINDS)
def test_layouts(layout: str, variant: str) -> None:
    psa, x = strong(PSA(16, layout, variant)), torch.randn(2, 16, 5, 7)
    channel, spatial = psa.masks(x)
    expected = x * (channel + spatial) if layout == "parallel" else x * channel * spatial
    torch.testing.assert_close(psa(x), expected)
    for mask in (channel, spatial):
        assert 0 < mask.min() <= mask.max() < 1
    psa.gain = 4.0
    torch.testing.assert_close(psa(x), 4 * expected)
    assert psa.channel.form == (layout if variant == "code" else "paper")


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from(KINDS))
def test_positions_have_no_order(seed: int, kind: tuple[str, str]) -> None:
    psa, x = strong(PSA(16, *kind)), torch.randn(1, 16, 4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))

    def moved(y: Tensor) -> Tensor:
        return y.flatten(2)[..., order].view_as(y)

    (channel, spatial), (channel_moved, spatial_moved) = psa.masks(x), psa.masks(moved(x))
    torch.testing.assert_close(channel_moved, channel, **EXACT)
    torch.testing.assert_close(spatial_moved, moved(spatial), **EXACT)
    torch.testing.assert_close(psa(x.flip(3)), psa(x).flip(3), **EXACT)


def test_zero_weights() -> None:
    x = torch.randn(1, 16, 4, 5)
    for layout, logit in (("parallel", 1 / 20), ("sequential", 0.0)):
        psa = PSA(16, layout)
        for conv in (psa.channel.q, psa.channel.v, psa.spatial.q, psa.spatial.v):
            nn.init.zeros_(conv.weight)
        spatial = psa.masks(x)[1]
        torch.testing.assert_close(spatial, torch.full_like(spatial, logit).sigmoid())


def test_on_large_maps_the_parallel_mask_is_almost_a_half() -> None:
    assert (PSA(16, "parallel").masks(torch.randn(1, 16, 64, 64))[1] - 0.5).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("dim", "sequential", "parallel"),
    [
        (48, 4_002, 4_656),
        (64, 7_064, 8_256),
        (96, 15_780, 18_528),
        (192, 62_664, 73_920),
        (384, 249_744, 295_296),
        (512, 443_584, 524_800),
    ],
)
def test_parameters(dim: int, sequential: int, parallel: int) -> None:
    for layout, count in (("sequential", sequential), ("parallel", parallel)):
        assert sum(p.numel() for p in PSA(dim, layout).parameters()) == count


@pytest.mark.parametrize(("layout", "variant"), KINDS)
def test_multiply_adds(layout: str, variant: str) -> None:
    psa = PSA(64, layout, variant)
    with FlopCounterMode(display=False) as counter:
        psa(torch.randn(1, 64, 8, 9))
    assert psa.multiply_adds(8, 9) == counter.get_total_flops() // 2
    assert psa.multiply_adds(8, 9) < psa.multiply_adds(8, 9, as_published=True)


def test_published_multiply_adds() -> None:
    conv = 9 * 64 * 64 * 32 * 32
    assert PSA(64).multiply_adds(32, 32, as_published=True) == pytest.approx(6.42e6, rel=1e-3)
    assert PSA(64).multiply_adds(32, 32, as_published=True) / conv == pytest.approx(0.17, abs=0.005)


@pytest.mark.parametrize(("layout", "variant"), KINDS)
def test_gradients_are_those_of_the_function(layout: str, variant: str) -> None:
    psa = strong(PSA(32, layout, variant)).double()
    x = torch.randn(1, 32, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(psa, x)
    psa(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in psa.parameters())


@pytest.mark.parametrize(("layout", "variant"), KINDS)
def test_half_precision_and_export(layout: str, variant: str) -> None:
    torch.manual_seed(0)
    psa, x = PSA(16, layout, variant).eval(), torch.randn(2, 16, 5, 6)
    exported = torch.export.export(psa, (x,)).module()
    torch.testing.assert_close(exported(x), psa(x), **EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = psa(x)
    torch.testing.assert_close(mixed.float(), psa(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(psa.bfloat16()(x.bfloat16()), mixed.bfloat16(), rtol=0.05, atol=0.05)


# -- in networks


@pytest.mark.parametrize(
    ("host", "kinds", "blocks", "before", "sequential", "parallel"),
    [
        ("hrnet_w48", (BasicBlock,), 104, 75_420_864, 5_384_544, 6_355_200),
        ("resnet18", (BasicBlock, Bottleneck), 8, 11_689_512, 1_179_600, 1_394_560),
        ("resnet50", (BasicBlock, Bottleneck), 16, 25_557_032, 2_130_952, 2_518_720),
        ("resnet101", (BasicBlock, Bottleneck), 33, 44_549_160, 4_021_352, 4_751_296),
    ],
)
def test_published_counts(
    host: str, kinds: tuple[type[nn.Module], ...], blocks: int, before: int, sequential: int, parallel: int
) -> None:
    options = {"num_classes": 0} if host.startswith("hrnet") else {}
    for layout, added in (("sequential", sequential), ("parallel", parallel)):
        with torch.device("meta"):
            done = insert_psa(timm.create_model(host, **options), kinds, layout=layout)
        assert (len(done.blocks), done.before, done.added) == (blocks, before, added)
    assert f"{before:,} parameters" in str(done)


def test_insertion_is_after_the_first_3x3_convolution() -> None:
    basic, bottleneck = BasicBlock(16, 16).eval(), Bottleneck(64, 16).eval()
    x, y = torch.randn(1, 16, 6, 5), torch.randn(1, 64, 6, 5)
    with torch.no_grad():
        insert_psa(basic)
        inside = basic.aa(F.relu(basic.bn1(basic.conv1(x))))
        torch.testing.assert_close(basic(x), F.relu(basic.bn2(basic.conv2(inside)) + x))
        insert_psa(bottleneck, layout="parallel")
        inside = bottleneck.aa(F.relu(bottleneck.bn2(bottleneck.conv2(F.relu(bottleneck.bn1(bottleneck.conv1(y)))))))
        torch.testing.assert_close(bottleneck(y), F.relu(bottleneck.bn3(bottleneck.conv3(inside)) + y))


def test_overhead_of_a_network() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        _, bare = psa_overhead(model, torch.empty(2, 3, 64, 64))
        insert_psa(model)
        spent, whole = psa_overhead(model, torch.empty(2, 3, 64, 64))
    assert spent == whole - bare == 2 * sum(2 * PSA(64 * 2**i).multiply_adds(16 >> i, 16 >> i) for i in range(4))


def test_authors_names_in_a_network() -> None:
    model, other = BasicBlock(16, 16), BasicBlock(16, 16)
    insert_psa(model)
    insert_psa(other)
    theirs = {
        key.replace("aa.channel.up", "deattn.conv_up")
        .replace("aa.channel.q", "deattn.conv_q_right")
        .replace("aa.channel.v", "deattn.conv_v_right")
        .replace("aa.spatial.q", "deattn.conv_q_left")
        .replace("aa.spatial.v", "deattn.conv_v_left"): value
        for key, value in model.state_dict().items()
    }
    assert "deattn.conv_up.3.bias" in theirs
    load_authors(other, theirs)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"does not fit PSA; missing: channel.up.0.bias"):
        load_authors(PSA(16), {"conv_q_right.weight": torch.zeros(1, 16, 1, 1)})


def test_bad_insertion() -> None:
    with pytest.raises(ValueError, match="Linear has no BasicBlock or Bottleneck of timm"):
        insert_psa(nn.Linear(2, 2))
    narrow = nn.Sequential(BasicBlock(16, 16))
    narrow[0].conv1 = nn.Conv2d(16, 16, 1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="block '0' has no 3x3 convolution"):
        insert_psa(narrow)
    twice = BasicBlock(16, 16)
    insert_psa(twice)
    with pytest.raises(ValueError, match="block 'BasicBlock': its place for a PSA, 'aa', is taken"):
        insert_psa(twice)


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "paralel"}, "did you mean 'parallel'"),
        ({"variant": "papers"}, "did you mean 'paper'"),
        ({"dim": 7}, "dim=7 leaves no channel in the bottleneck"),
        ({"dim": 4, "variant": "paper", "layout": "parallel"}, "give at least 8"),
        ({"dim": 1, "layout": "parallel"}, "give at least 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:dim=.* is odd")
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PSA(**{"dim": 16} | options)
    with pytest.raises(ValueError, match="unknown form"):
        ChannelPSA(16, "code")


def test_odd_widths_warn() -> None:
    with pytest.warns(UserWarning, match="dim=13 is odd; the inner width is rounded down to 6") as caught:
        psa = PSA(13, "parallel")
    assert len(caught) == 1
    assert psa(torch.randn(1, 13, 3, 3)).shape == (1, 13, 3, 3)


@pytest.mark.parametrize("shape", [(16, 5, 5), (2, 8, 5, 5), (2, 5, 5, 16)])
def test_bad_input(shape: tuple[int, ...]) -> None:
    for layout in ("parallel", "sequential"):
        with pytest.raises(ValueError, match=r"takes maps \(B, 16, H, W\)"):
            PSA(16, layout)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"takes tokens \(B, H, W, 16\), channels last"):
        heed.create_layer("psa", 16, 2, (5, 5))(torch.zeros(2, 16, 5, 5))


def test_drops_into_the_vit_host() -> None:
    model = heed.create_model("vit_micro", attention="psa", attention_options={"layout": "parallel"})
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)

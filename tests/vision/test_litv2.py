"""LITv2: the published counts, deformable merging against torchvision, any image size, and the authors' checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import deform_conv2d

import heed
from heed.layers.hilo import HiLoAttention
from heed.models import from_pretrained
from heed.vision.litv2 import (
    ConvFFNBlock,
    DeformableTokenMerging,
    HiLoBlock,
    LITv2,
    LITv2Config,
    deformable_merge,
)

EXACT = {"rtol": 1e-4, "atol": 2e-5}
TINY = LITv2Config(
    num_classes=5, dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), mlp_ratio=2.0, alpha=0.5, drop_path=0.0
)
GOLDEN = Path(__file__).parents[1] / "golden" / "23-hilo" / "litv2_tiny_model.safetensors"
GOLDEN_CONFIG: dict[str, Any] = {
    "num_classes": 5, "dim": 6, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4), "mlp_ratio": 2.0, "alpha": 0.5
}  # fmt: skip


def tiny(seed: int = 0, **overrides: Any) -> LITv2:
    torch.manual_seed(seed)
    return LITv2(LITv2Config(**{**TINY.__dict__, **overrides}))


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [
        ("litv2_s", 27_844_000, 3.73),
        ("litv2_m", 48_830_368, 7.48),
        ("litv2_b", 86_520_704, 13.19),
        ("litv2_b_384", 86_520_704, 39.71),
        ("litv2_s_alpha0", 28_089_760, 3.97),
        ("litv2_s_alpha02", 27_844_000, 3.88),
        ("litv2_s_alpha04", 27_696_544, 3.82),
        ("litv2_s_alpha05", 27_647_392, 3.77),
        ("litv2_s_alpha07", 27_696_544, 3.74),
        ("litv2_s_alpha1", 28_089_760, 3.75),
    ],
)
def test_published_counts(name: str, parameters: int, gflops: float) -> None:
    with torch.device("meta"):
        model = heed.create_model(name)
        side = model.config.img_size
        assert model(torch.empty(1, 3, side, side)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.flops() / 1e9 == pytest.approx(gflops, rel=0.01)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 3), st.sampled_from([0.0, 0.5, 3.0]))
def test_merging_equals_torchvision(height: int, width: int, seed: int, reach: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    offset = (reach * torch.randn(2, 8, height // 2, width // 2, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ours = deformable_merge(x, offset, weight, bias)
    theirs = deform_conv2d(x, offset, weight, bias, stride=(2, 2))
    torch.testing.assert_close(ours, theirs)
    probe = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (x, offset, weight, bias), probe) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_merging_without_offsets_is_a_strided_convolution() -> None:
    torch.manual_seed(0)
    merge = DeformableTokenMerging(4).eval()
    x = torch.randn(2, 6, 4, 4)
    plain = F.gelu(merge.norm(F.conv2d(x.permute(0, 3, 1, 2), merge.conv.weight, stride=2))).permute(0, 2, 3, 1)
    torch.testing.assert_close(merge(x), plain, **EXACT)


def test_merging_odd_and_tiny_maps() -> None:
    merge = DeformableTokenMerging(4)
    with pytest.warns(UserWarning, match="5 x 4 tokens is halved by dropping"):
        assert merge(torch.randn(2, 5, 4, 4)).shape == (2, 2, 2, 8)
    with pytest.raises(ValueError, match="1 x 4 tokens cannot be halved"):
        merge(torch.randn(1, 1, 4, 4))


def test_blocks() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 8)
    for block in (ConvFFNBlock(8, 2.0), HiLoBlock(HiLoAttention(8, 2), 2.0)):
        assert block(x).shape == x.shape
    still = ConvFFNBlock(8)
    torch.nn.init.zeros_(still.mlp.fc2.weight)
    torch.nn.init.zeros_(still.mlp.fc2.bias)
    assert torch.equal(still(x), x)


def test_stages_have_the_authors_blocks() -> None:
    model = tiny()
    kinds = [[type(block) for block in stage.blocks] for stage in model.stages]
    assert kinds == [[ConvFFNBlock], [ConvFFNBlock], [HiLoBlock] * 2, [HiLoBlock]]
    assert model.stages[3].blocks[0].attn.high_heads == 0  # window 1
    rates = [block.drop_path.drop_prob for stage in tiny(drop_path=0.4).stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("size", [(29, 29), (64, 96), (70, 45), (31, 130)])
@pytest.mark.parametrize("stage_norms", [False, True])
def test_any_image_size_gives_a_pyramid(size: tuple[int, int], stage_norms: bool) -> None:
    model = tiny(stage_norms=stage_norms).eval()
    x = torch.randn(2, 3, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # odd maps
        final, maps = model.forward_intermediates(x)
        logits = model(x)
    rows, columns = (-(-side // 4) for side in size)
    for i, (feature, info) in enumerate(zip(maps, model.feature_info, strict=True)):
        assert feature.shape == (2, info["num_chs"], rows >> i, columns >> i)
        assert info["reduction"] == 4 * 2**i
        assert model.get_submodule(info["module"]) is not None
        if stage_norms:
            normed = feature.mean(1)
            torch.testing.assert_close(normed, torch.zeros_like(normed), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.forward_head(final), logits)
    assert logits.shape == (2, 5)


def test_padding_of_images_is_zeros_below_and_right() -> None:
    model = tiny().eval()
    x = torch.randn(1, 3, 62, 61)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 3, 0, 2))))


def trained_a_little(model: LITv2) -> LITv2:
    """The zero-initialised offsets moved, so that gradients flow through every part."""
    for stage in model.stages[:-1]:
        torch.nn.init.normal_(stage.downsample.offset.weight, std=0.1)
    return model


@pytest.mark.parametrize("stage_norms", [False, True])
def test_gradients_reach_every_parameter(stage_norms: bool) -> None:
    model = trained_a_little(tiny(stage_norms=stage_norms, num_classes=0))
    maps = model.stage_maps(torch.randn(2, 3, 64, 64))
    sum((model.finish(m) if m is maps[-1] else m).square().sum() for m in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_parameter_groups() -> None:
    groups = tiny().parameter_groups(1e-3)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in tiny().parameters())
    slow = [g for g in groups if g["lr"] == pytest.approx(1e-5)]
    assert sum(len(g["params"]) for g in slow) == 6  # weight and bias of three offset convolutions
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])
    torch.optim.AdamW(groups)


def test_half_precision() -> None:
    model = trained_a_little(tiny()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    torch.testing.assert_close(mixed.float(), model(x), rtol=0.1, atol=0.05)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, mixed, rtol=0.1, atol=0.05)


def test_exports() -> None:
    model = trained_a_little(tiny()).eval()
    x = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), **EXACT)


def test_saves_and_loads(tmp_path: Path) -> None:
    model = trained_a_little(tiny()).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(from_pretrained(tmp_path)(x), model(x))


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in load_file(GOLDEN).items() if k.startswith("state.")}


def test_converts_the_authors_classifier(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    torch.save({"model": golden_state(), "epoch": 299}, tmp_path / "litv2.pth")
    model = LITv2.from_authors(tmp_path / "litv2.pth", "litv2_s", **GOLDEN_CONFIG)
    assert not model.training
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-4, atol=5e-5)


def test_converts_the_authors_detector(tmp_path: Path) -> None:
    """mmdet's layout: the backbone under a prefix with a norm per stage, and the detector's own parts beside it."""
    state = {k: v for k, v in golden_state().items() if not k.startswith(("norm.", "head."))}
    for i in range(4):
        state |= {f"norm{i}.weight": torch.full((6 * 2**i,), 2.0), f"norm{i}.bias": torch.ones(6 * 2**i)}
    detector = {f"backbone.{k}": v for k, v in state.items()}
    detector |= {"neck.lateral_convs.0.conv.weight": torch.ones(1), "bbox_head.bias": torch.ones(1)}
    torch.save({"state_dict": detector, "meta": {}}, tmp_path / "retinanet.pth")
    settings = GOLDEN_CONFIG | {"num_classes": 0, "stage_norms": True}
    model = LITv2.from_authors(tmp_path / "retinanet.pth", "litv2_s", **settings)
    maps = model.forward_intermediates(load_file(GOLDEN)["input.x"], intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(6, 16, 16), (12, 8, 8), (24, 4, 4), (48, 2, 2)]
    torch.testing.assert_close(maps[0].mean(1), torch.ones(1, 16, 16), rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"model": golden_state()}, tmp_path / "litv2.pth")
    with pytest.raises(ValueError, match="does not fit LITv2"):
        LITv2.from_authors(tmp_path / "litv2.pth", "litv2_s", **GOLDEN_CONFIG | {"dim": 12})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"images \(B, 3, H, W\)"),
        ((1, 1, 64, 64), r"images \(B, 3, H, W\)"),
        ((1, 64, 64, 3), r"images \(B, 3, H, W\)"),
        ((1, 3, 28, 64), "sides of at least 29"),
    ],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="need one entry per stage"):
        LITv2Config(depths=(1, 1))
    with pytest.raises(ValueError, match="dim=16 is not divisible by num_heads=3"):
        tiny(num_heads=(1, 2, 3, 8), dim=4)


@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_micro_takes_small_images(side: int) -> None:
    model = heed.create_model("litv2_micro", in_chans=3)
    assert model(torch.randn(2, 3, side, side)).shape == (2, 10)


@pytest.mark.slow
def test_learns_digits_as_well_as_full_attention_with_fewer_multiplications() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train, test = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tensor_split([1400])
    accuracy, multiplications = [], []
    for windows in ((0, 2), (0, 1)):
        torch.manual_seed(0)
        model = heed.create_model("litv2_micro", windows=windows)
        optimiser = torch.optim.AdamW(model.parameter_groups(3e-3))
        rates = [group["lr"] for group in optimiser.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=15 * 22)
        for _ in range(15):
            for batch in train[torch.randperm(1400)][: 22 * 63].view(22, 63):
                optimiser.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimiser.step()
                schedule.step()
        with torch.no_grad():
            accuracy.append((model.eval()(x[test]).argmax(1) == y[test]).float().mean().item())
        multiplications.append(model.flops())
    assert min(accuracy) > 0.95
    assert accuracy[0] > accuracy[1] - 0.01
    assert multiplications[0] < multiplications[1]

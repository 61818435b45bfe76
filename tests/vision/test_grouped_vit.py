"""ViTs with grouped attention: sizes, timm's weights, schemes, up-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.layers.grouped import DGQA, GQA, KDGQA, grouped_layers
from heed.layers.grouped_report import AllocationLog, grouped_report
from heed.vision.grouped_vit import GroupedViT, group_heads, grouped_transform, uptrain

# size -> (key-value heads, parameters, 10^9 multiply-adds)
TABLE = {
    "small": ((6, 22_050_664, 4.599), (3, 20_276_584, 4.250), (2, 19_685_224, 4.134), (1, 19_093_864, 4.018)),
    "base": (
        (12, 86_567_656, 17.564),
        (6, 79_480_552, 16.170),
        (4, 77_118_184, 15.705),
        (3, 75_937_000, 15.472),
        (2, 74_755_816, 15.240),
    ),
    "large": ((16, 304_326_632, 61.555), (8, 279_136_232, 56.597), (4, 266_541_032, 54.118), (2, 260_243_432, 52.879)),
}
SCHEMES = ("gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa")
SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "num_classes": 5}


def tiny_vit(**options: Any) -> VisionTransformer:
    settings = SMALL | {"embed_dim": 24, "depth": 2, "num_heads": 6, "mlp_ratio": 2} | options
    return VisionTransformer(**settings).eval()


def micro(**options: Any) -> GroupedViT:
    return cast(GroupedViT, heed.create_model("grouped_vit_micro", depth=2, **options).eval())


@pytest.mark.parametrize(("size", "row"), [(size, row) for size, rows in TABLE.items() for row in rows])
def test_published_counts(size: str, row: tuple[int, int, float]) -> None:
    heads, parameters, gmacs = row
    schemes = {"small": ["gqa", "kdgqa"], "base": ["kdgqa"], "large": ["gqa"]}[size]
    for scheme in [*schemes, "mhsa"] if heads == TABLE[size][0][0] else schemes:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = heed.create_model(f"grouped_vit_{size}", num_kv_heads=heads, att_scheme=scheme).eval()
            assert sum(p.numel() for p in model.parameters()) == parameters
            model(torch.empty(1, 3, 224, 224))
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=1e-3)


def test_all_schemes_have_equal_parameters() -> None:
    counts = {sum(p.numel() for p in micro(att_scheme=scheme).parameters()) for scheme in SCHEMES}
    assert len(counts) == 1


def test_names_and_defaults() -> None:
    with torch.device("meta"):
        heads = {n: heed.create_model(f"grouped_vit_{n}").config.num_kv_heads for n in ("small", "base", "large")}
        readme = heed.create_model("grouped_vit_base_kv6").config
    assert heads == {"small": 3, "base": 3, "large": 4}
    assert (readme.num_kv_heads, readme.window) == (6, 300)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_runs_and_reports(scheme: str) -> None:
    model, x = micro(att_scheme=scheme), torch.randn(2, 1, 8, 8)
    assert model(x).shape == (2, 10)
    found = model.allocations()
    assert found.shape == (2, 4)
    assert (found.sum(1) == 8).all()
    report = grouped_report(model, 65)
    assert report.kv_bytes * 2 == report.multi_head_kv_bytes
    assert list(report.allocations) == ["blocks.0.attn", "blocks.1.attn"]


def test_mhsa_is_timms_vit() -> None:
    vit = tiny_vit()
    model = GroupedViT.from_timm(vit, "mhsa", load_head=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), vit(x))
    with pytest.raises(ValueError, match="att_scheme='mhsa' has no groups"):
        model.allocations()


@pytest.mark.parametrize("scheme", ["gqa", "kdgqa", "dgqa_diff"])
def test_with_all_heads_conversion_is_exact(scheme: str) -> None:
    vit, x = tiny_vit(), torch.randn(2, 3, 16, 16)
    model = GroupedViT.from_timm(vit, scheme, 6, load_head=True)
    model.freeze_allocation()
    torch.testing.assert_close(model(x), vit(x), rtol=1e-4, atol=1e-5)


def test_final_norm_and_head() -> None:
    vit = tiny_vit()
    torch.nn.init.constant_(vit.norm.weight, 2.0)
    whole, code = GroupedViT.from_timm(vit), GroupedViT.from_timm(vit, load_final_norm=False)
    assert (whole.norm.weight == 2).all()
    assert (code.norm.weight == 1).all()
    assert not torch.equal(whole.head.weight, vit.head.weight)
    assert torch.equal(GroupedViT.from_timm(vit, load_head=True).head.weight, vit.head.weight)


def test_in_place_in_timm() -> None:
    """timm's own model with grouped layers: forward, features, gradients, a state dict."""
    vit, x = (
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval(),
        torch.randn(2, 3, 32, 32),
    )
    other = GroupedViT.from_timm(cast(VisionTransformer, vit), "kdgqa", 1, load_head=True)
    assert group_heads(vit, "kdgqa", 1) == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(vit(x), other(x))
    assert vit.blocks[0].attn.scale == 64**-0.5
    assert vit.blocks[0].attn.head_dim == 64
    _, maps = vit.forward_intermediates(x)
    assert len(maps) == 2
    vit(x).sum().backward()
    assert set(other.state_dict()) == set(vit.state_dict())
    with pytest.raises(ValueError, match="no blocks with fused multi-head attention"):
        group_heads(vit, "kdgqa", 1)


def test_what_would_be_lost_is_reported() -> None:
    for options, key in (({"qk_norm": True}, "k_norm.weight"), ({"init_values": 0.1}, "ls1.gamma")):
        with pytest.raises(ValueError, match=key):
            GroupedViT.from_timm(tiny_vit(**options))
    normed = tiny_vit(qk_norm=True)
    with pytest.raises(ValueError, match="no place for k_norm"):
        group_heads(normed)
    assert not grouped_layers(normed)


def test_other_channels_are_refused() -> None:
    model = micro(in_chans=1, img_size=16, patch_size=4)
    with pytest.raises(ValueError, match=r"in_chans=1, but .* of 3 channels; create the model with in_chans=3"):
        model.load_timm(tiny_vit().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"att_scheme": "mqa"}, "unknown att_scheme 'mqa'; known: mhsa, gqa, kdgqa, dgqa_diff, dgqa_ema, pgqa"),
        ({"img_size": 9, "patch_size": 2}, "img_size=9 is not a multiple"),
        ({"num_kv_heads": 9}, "num_kv_heads=9"),
        ({"num_kv_heads": 3, "att_scheme": "gqa"}, "num_heads=8 is not a multiple of num_kv_heads=3"),
        ({"dim": 60}, "dim=60 is not divisible by num_heads=8"),
        ({"att_scheme": "dgqa_ema", "window": 0}, "window=0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**options)


def test_authors_layout_through_a_file(tmp_path: Path) -> None:
    model, x = micro(att_scheme="dgqa_ema"), torch.randn(2, 1, 8, 8)
    theirs = {key: value for key, value in model.state_dict().items() if not key.endswith("split")}
    save_file(theirs, tmp_path / "theirs.safetensors")
    loaded = GroupedViT.from_authors(
        tmp_path / "theirs.safetensors", "grouped_vit_micro", depth=2, att_scheme="dgqa_ema"
    )
    generators = [layer for net in (model, loaded) for layer in grouped_layers(net).values()]
    for layer in generators:
        cast(DGQA, layer).generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(loaded(x), model(x))
    del theirs["blocks.1.attn.k.weight"]
    save_file(theirs, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.attn\.k\.weight"):
        GroupedViT.from_authors(tmp_path / "short.safetensors", "grouped_vit_micro", depth=2, att_scheme="dgqa_ema")


def test_a_frozen_model_is_saved_frozen(tmp_path: Path) -> None:
    model, x = micro(), torch.randn(4, 1, 8, 8)
    model(x)
    model.freeze_allocation()
    y, counts = model(x), model.allocations()
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), y, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = cast(GroupedViT, heed.from_pretrained(tmp_path))
    torch.testing.assert_close(again(x[:2]), y[:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(again.allocations(), counts)


def batches(count: int, classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(8) % classes
    return [(torch.randn(8, 3, 16, 16) + labels[:, None, None, None], labels) for _ in range(count)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_stages_of_training(scheme: str) -> None:
    model = GroupedViT.from_timm(tiny_vit(), scheme, window=2)
    log = AllocationLog(model)
    losses = uptrain(model, batches(8), epochs=2, learning_rate=3e-3, after_step=log)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert log.steps == list(range(1, 17))
    assert not model.training
    if scheme.startswith("dgqa"):
        assert [cast(DGQA, layer).steps for layer in grouped_layers(model).values()] == [8, 8]
    model.reset_classifier(3)
    assert len(uptrain(model, batches(2, 3), epochs=1)) == 2
    with pytest.raises(ValueError, match="batches is empty"):
        uptrain(model, [])


def test_transform_of_pictures() -> None:
    picture = Image.fromarray(np.full((20, 30, 3), 255, np.uint8))
    plain = grouped_transform(False, 16)(picture)
    assert plain.shape == (3, 16, 16)
    assert (plain == 1).all()
    assert grouped_transform(True, 16)(picture).shape == (3, 16, 16)


def test_a_batch_decides_the_allocation() -> None:
    """What the documentation warns of: the result for an image depends on its batch."""
    model, x = micro(), torch.randn(16, 1, 8, 8)
    assert all(isinstance(layer, KDGQA) for layer in grouped_layers(model).values())
    for layer in grouped_layers(model).values():
        torch.nn.init.normal_(cast(GQA, layer).k.weight)
    alone = torch.cat([model(one[None]) for one in x])
    assert not torch.allclose(alone, model(x), atol=1e-4)

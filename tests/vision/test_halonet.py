"""HaloNet: the paper's table, timm's networks and weights, the pyramid, hybrids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import ByobNet
from torch import nn

import heed
from heed.layers.halo import HaloAttention
from heed.models import from_pretrained
from heed.vision.halonet import ConvBottleneck, HaloBottleneck, HaloNet, HaloNetConfig, hybrid

# Parameters and multiply-adds (10^9) of the paper's table.
PAPER = {
    "halonet_h0": (5_502_248, 2.35),
    "halonet_h1": (8_101_352, 2.99),
    "halonet_h2": (9_405_608, 3.31),
    "halonet_h3": (11_842_792, 6.18),
    "halonet_h4": (19_103_464, 12.0),
    "halonet_h5": (30_718_952, 32.3),
    "halonet_h6": (43_458_280, 52.8),
    "halonet_h7": (67_434_728, 121.5),
}
# heed's name, timm's name, parameters.
TIMM = [
    ("halonet_timm_h1", "halonet_h1", 8_100_056),
    ("halonet26t", "halonet26t", 12_480_288),
    ("sehalonet33ts", "sehalonet33ts", 13_691_712),
    ("halonet50ts", "halonet50ts", 22_733_280),
    ("eca_halonext26ts", "eca_halonext26ts", 10_756_885),
    ("haloregnetz_b", "haloregnetz_b", 11_680_072),
]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, **overrides: Any) -> HaloNet:
    with torch.device("meta"):
        model = heed.create_model(name, **overrides)
    assert isinstance(model, HaloNet)
    return model


def micro(**overrides: Any) -> HaloNet:
    torch.manual_seed(0)
    model = heed.create_model("halonet_micro", **overrides)
    assert isinstance(model, HaloNet)
    return model


def lively(model: nn.Module) -> None:
    """Random norms, so that no branch is silent and no channel is alike."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table(name: str) -> None:
    model = on_meta(name)
    parameters, multiply_adds = PAPER[name]
    assert count(model) == parameters
    assert model.multiply_adds() / 1e9 == pytest.approx(multiply_adds, rel=2e-3)
    assert [stage["reduction"] for stage in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize(("name", "theirs", "parameters"), TIMM)
def test_timms_parameters_by_name(name: str, theirs: str, parameters: int) -> None:
    model = on_meta(name)
    with torch.device("meta"):
        reference = timm.create_model(theirs)
    assert count(model) == parameters
    shapes = {HaloNet.authors_key(key): value.shape for key, value in reference.state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "theirs"), [row[:2] for row in TIMM])
@torch.no_grad()
def test_timms_checkpoints_give_timms_logits(name: str, theirs: str, tmp_path: Path) -> None:
    """Blocks of 4 and few classes keep this fast; they change neither the layout nor the names."""
    torch.manual_seed(0)
    kwargs = model_cfgs[theirs].self_attn_kwargs | {"block_size": 4}
    config = replace(model_cfgs[theirs], self_attn_kwargs=kwargs)
    if theirs == "halonet50ts":  # its second stage has settings of its own
        own = kwargs | {"num_heads": 4}
        stages = [
            tuple(replace(b, self_attn_kwargs=own) if b.self_attn_kwargs else b for b in s)
            if isinstance(s, tuple)
            else s
            for s in config.blocks
        ]
        config = replace(config, blocks=tuple(stages))
    reference = ByobNet(config, num_classes=5, zero_init_last=False).eval()
    lively(reference)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    model = HaloNet.from_authors(tmp_path / "model.safetensors", name, num_classes=5, block_size=4)
    x = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.forward_features(x), reference.forward_features(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_timms_model_as_it_is() -> None:
    torch.manual_seed(0)
    reference = timm.create_model("halonet26t").eval()
    lively(reference)
    model = heed.create_model("halonet26t")
    assert isinstance(model, HaloNet)
    model.load_authors(reference.state_dict()).eval()
    x = torch.randn(1, 3, 256, 256)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_pyramid() -> None:
    model = micro(stem_stride=4, stem=(8, 8), strides=(1, 2, 2, 2), layout=("h", "c", "h", "h"), num_heads=(2,) * 4,
                  channels=(16, 24, 32, 40), bottleneck=(0.5,) * 4, final_width=48).eval()  # fmt: skip
    x = torch.randn(2, 1, 64, 64)
    features, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 16), (2, 24, 8, 8), (2, 32, 4, 4), (2, 40, 2, 2)]
    assert [(s["num_chs"], s["reduction"]) for s in model.feature_info] == [(16, 4), (24, 8), (32, 16), (40, 32)]
    assert features.shape == (2, 48, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))


def test_hybrids() -> None:
    parameters = {}
    for layout in ("hhhh", "chhh", "cchh", "ccch"):
        with torch.device("meta"):
            model = hybrid("halonet_h7", layout)
        kinds = [{type(block) for block in stage} for stage in model.stages]  # type: ignore[union-attr]
        assert kinds == [{HaloBottleneck if letter == "h" else ConvBottleneck} for letter in layout]
        parameters[layout] = count(model)
    assert parameters["hhhh"] == PAPER["halonet_h7"][0]
    assert len(set(parameters.values())) == 4
    with torch.device("meta"):
        mixed = hybrid("halonet_micro", ("chc", "h"), num_classes=3)
    assert mixed.config.layout == ("chc", "hhh")
    assert mixed.num_classes == 3


def test_value_ratio_widens_values_alone() -> None:
    block = on_meta("halonet_h5").stages[0][1]  # type: ignore[index]
    attention = block.self_attn
    assert isinstance(attention, HaloAttention)
    assert attention.q.weight.shape == (64, 64, 1, 1)
    assert attention.kv.weight.shape == (64 + 160, 64, 1, 1)
    assert block.conv3_1x1.conv.weight.shape == (128, 160, 1, 1)


def test_trains() -> None:
    model = micro(in_chans=3, block_size=2)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_blocks_start_as_their_shortcut() -> None:
    model = micro().eval()
    x = torch.randn(2, 64, 8, 8)
    block = model.stages[0][1]  # type: ignore[index]
    torch.testing.assert_close(block(x), nn.functional.silu(x))


@pytest.mark.parametrize("side", [8, 13, 28, 32])
@torch.no_grad()
def test_micro_takes_small_images(side: int) -> None:
    assert micro().eval()(torch.randn(2, 1, side, side)).shape == (2, 10)


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    model = micro(num_classes=7, drop_path=0.1).eval()
    lively(model)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


def test_bfloat16_autocast() -> None:
    model = micro().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 1, 8, 8))
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_classifier_is_exchanged() -> None:
    model = micro()
    model.reset_classifier(3)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, model.num_features)


def test_h7_needs_padding_at_the_papers_600_pixels() -> None:
    with torch.device("meta"):
        layer = HaloAttention(64, num_heads=4, block_size=10)
    with pytest.raises(ValueError, match=r"75 x 75 .* add 5 rows and 5 columns, or set pad=True"):
        layer(torch.empty(1, 64, 75, 75, device="meta"))
    assert heed.create_model("halonet_micro", block_size=10, halo_size=3)(torch.randn(1, 1, 15, 15)).shape == (1, 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layout": ("hx", "hh")}, "'hx' must hold"),
        ({"channels": (64,)}, "1 entries for 2 stages"),
        ({"strides": (1, 3)}, "strides="),
        ({"gate": "cbam"}, "unknown gate 'cbam'"),
        ({"stem_stride": 4}, "stem_stride=4"),
        ({"act": "sigmoidal"}, "act='sigmoidal'"),
        ({"num_heads": (5, 5)}, "not divisible by num_heads=5"),
        ({"padding": "reflect"}, "padding='reflect'"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heed.create_model("halonet_micro", **overrides)


def test_bad_hybrids() -> None:
    with pytest.raises(ValueError, match="3 stages; halonet_h1 has 4"):
        hybrid("halonet_h1", "chh")
    with pytest.raises(ValueError, match="'vit_tiny' is no HaloNet"):
        hybrid("vit_tiny", "chhh")


def test_bad_checkpoint(tmp_path: Path) -> None:
    save_file({"stem.conv1.conv.weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not fit HaloNet; missing"):
        HaloNet.from_authors(tmp_path / "x.safetensors", "halonet_micro")


def test_config_is_a_value() -> None:
    config = heed.create_model("halonet_micro").config
    assert config == replace(config)
    assert hash(config) == hash(replace(config))
    assert isinstance(config, HaloNetConfig)

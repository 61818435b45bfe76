"""DaViT: the published counts, what reaches what, any image size, and weights from and to four implementations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.models.davit import DaVit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.explain.attention import attention_map
from heed.layers.channel import ChannelGroupAttention
from heed.layers.window import WindowAttention
from heed.vision.davit import DaViT, DaViTBlock, DaViTConfig

SMALL: dict[str, Any] = {
    "num_classes": 5, "dims": (8, 16), "depths": (1, 2), "num_heads": (2, 4), "window_size": 3, "mlp_ratio": 2.0
}  # fmt: skip
GOLDEN = Path(__file__).parents[1] / "golden" / "24-davit" / "davit_tiny_model.safetensors"
GOLDEN_CONFIG: dict[str, Any] = SMALL | {"dims": (8, 16, 24), "depths": (1, 1, 2), "num_heads": (2, 4, 4)}
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def small(**overrides: Any) -> DaViT:
    torch.manual_seed(0)
    return DaViT(DaViTConfig(**SMALL | {"drop_path": 0.0} | overrides)).eval()


def strengthened(model: nn.Module) -> Any:
    """Weights of a size at which every part moves the output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs", "ours"),
    [  # multiply-adds in the authors' comments (for the last two the card's), and by our count
        ("davit_tiny", 28_360_168, 4.540244736, 4.521801216),
        ("davit_small", 49_745_896, 8.800488192, 8.773012992),
        ("davit_base", 87_954_408, 15.510430720, 15.47379712),
        ("davit_large", 196_811_752, 102.966676992, 102.805204992),
        ("davit_huge", 348_922_856, 61.2, 61.159165952),
        ("davit_giant", 1_406_470_120, 192.8, 192.785184768),
    ],
)
def test_published_counts(name: str, parameters: int, gmacs: float, ours: float) -> None:
    """We count convolutions, matrices and attention; the comments also count norms, which is the difference."""
    with torch.device("meta"):
        model: Any = heed.create_model(name)
        side = model.config.img_size
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, side, side)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.multiply_adds() / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert model.multiply_adds() == counter.get_total_flops() // 2 == pytest.approx(1e9 * ours, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "dims"),
    [("davit_base_florence2", (128, 256, 512, 1024)), ("davit_huge_florence2", (256, 512, 1024, 2048))],
)
def test_florence2_counts_are_those_of_transformers(name: str, dims: tuple[int, ...]) -> None:
    modelling = pytest.importorskip("transformers.models.florence2.modeling_florence2")
    heads = tuple(dim // 32 for dim in dims)
    with torch.device("meta"):
        model = heed.create_model(name)
        theirs = modelling.Florence2VisionBackbone(_florence_config(dims, (1, 1, 9, 1), heads))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_costs_are_linear_in_the_tokens() -> None:
    with torch.device("meta"):
        model: Any = heed.create_model("davit_tiny")
    once, twice = model.complexity(224, 224), model.complexity(224, 448)
    assert [cost.kind for cost in once] == ["spatial", "channel"] * 6
    assert [cost.stage for cost in once] == [0] * 2 + [1] * 2 + [2] * 6 + [3] * 2
    assert [cost.tokens for cost in once][::2] == [3136, 784, 196, 196, 196, 49]
    for a, b in zip(once, twice, strict=True):
        assert (b.tokens, b.multiply_adds) == (2 * a.tokens, 2 * a.multiply_adds)
        assert b.dense > 2 * a.dense
    assert once[-2].multiply_adds == once[-2].dense  # the last stage at 224 pixels is one window


@settings(max_examples=10)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(4, False), (4, True), (2, False), (1, True)]))
def test_any_image_size_gives_a_pyramid(height: int, width: int, embedding: tuple[int, bool]) -> None:
    patch, overlapped = embedding
    model = small(patch_size=patch, overlapped=overlapped, norms="stages")
    maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    for feature, info in zip(maps, model.feature_info, strict=True):
        assert feature.shape == (1, info["num_chs"], -(-height // info["reduction"]), -(-width // info["reduction"]))
        assert isinstance(model.get_submodule(info["module"]), nn.LayerNorm)
        assert feature.mean(1).abs().max() < 1e-5
    assert model(torch.randn(1, 3, height, width)).shape == (1, 5)


def test_the_head_pools_before_it_normalises() -> None:
    model = strengthened(small())
    x = torch.randn(2, 3, 32, 32)
    pooled = model.norms(model.stage_maps(x)[-1].mean((2, 3)))
    torch.testing.assert_close(model(x), model.head(pooled))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)


def reached(**overrides: Any) -> Tensor:
    """Where the map of one stage moves when a corner of the image does."""
    model = strengthened(small(**{"dims": (8,), "depths": (1,), "num_heads": (2,), "patch_size": 1} | overrides))
    x = torch.randn(1, 3, 24, 24)
    other = x.clone()
    other[..., 0, 0] += 1
    with torch.no_grad():
        return (model.forward_features(other) != model.forward_features(x)).any(1)[0]


def test_channels_carry_what_windows_cannot() -> None:
    local = reached(blocks=("spatial",))
    assert local[0, 0]
    assert not local[8:].any()  # a window of 3 and two 3x3 convolutions do not come that far
    assert not local[:, 8:].any()
    assert reached().all()
    assert reached(blocks=("channel",)).all()


def test_the_attention_map_shows_it() -> None:
    model = strengthened(small(dims=(8,), depths=(1,), num_heads=(2,), patch_size=1, in_chans=1))
    assert (attention_map(model, torch.randn(1, 12, 12), (0, 0)) > 0).all()


def test_stochastic_depth_rises_over_single_blocks() -> None:
    def rates(**overrides: Any) -> list[float]:
        model = small(drop_path=0.5, **overrides)
        return [module.drop_path.drop_prob for module in model.modules() if isinstance(module, DaViTBlock)]

    assert rates() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates(blocks=("channel",)) == pytest.approx([0, 0.25, 0.5])


def test_what_a_dual_block_is_made_of() -> None:
    reverse = small(blocks=("channel", "spatial"))
    kinds = [type(block.attn) for block in reverse.main_blocks[0][0]]  # type: ignore[index,union-attr]
    assert kinds == [ChannelGroupAttention, WindowAttention]
    assert not [key for key in small(ffn=False).state_dict() if "mlp" in key or "norm2" in key]
    assert small(cpe_act=True)(torch.ones(1, 3, 8, 8)).shape == (1, 5)
    x = torch.randn(1, 3, 16, 16)
    plain, active = strengthened(small()), strengthened(small(cpe_act=True))
    assert not torch.allclose(plain(x), active(x))


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = DaViT(DaViTConfig(**SMALL | {"dims": (64, 128), "conv_init": True}))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            assert not module.bias.any()
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)


# -- weights


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in load_file(GOLDEN).items() if k.startswith("state.")}


def test_reads_the_official_classifier(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    torch.save({"state_dict": golden_state(), "epoch": 299}, tmp_path / "davit.pth")
    model = DaViT.from_authors(tmp_path / "davit.pth", "davit_tiny", **GOLDEN_CONFIG)
    assert not model.training
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-4, atol=5e-5)
    assert model.export_weights("official").keys() == golden_state().keys()
    with pytest.raises(ValueError, match="does not fit DaViT"):
        DaViT.from_authors(tmp_path / "davit.pth", "davit_tiny", **GOLDEN_CONFIG | {"ffn": False})


def test_reads_the_official_detector(tmp_path: Path) -> None:
    """mmdet's layout: the backbone under a prefix with a norm per stage, and the detector's own parts beside it."""
    state = {k: v for k, v in golden_state().items() if not k.startswith(("norms.", "head."))}
    for i, dim in enumerate((8, 16, 24)):
        state |= {f"norm{i}.weight": torch.full((dim,), 2.0), f"norm{i}.bias": torch.ones(dim)}
    detector = {f"backbone.{k}": v for k, v in state.items()} | {"neck.lateral_convs.0.conv.weight": torch.ones(1)}
    torch.save({"state_dict": detector, "meta": {}}, tmp_path / "detector.pth")
    options = GOLDEN_CONFIG | {"num_classes": 0, "norms": "stages"}
    model = DaViT.from_authors(tmp_path / "detector.pth", "davit_tiny", **options)
    maps = model.forward_intermediates(load_file(GOLDEN)["input.x"], intermediates_only=True)
    torch.testing.assert_close(maps[0].mean(1), torch.ones(1, 9, 11), rtol=0, atol=1e-5)


def test_timm_and_back(tmp_path: Path) -> None:
    theirs = strengthened(
        DaVit(depths=(1, 2), embed_dims=(8, 16), num_heads=(2, 4), num_classes=5, window_size=3, mlp_ratio=2)
    )
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = DaViT.from_authors(tmp_path / "timm.pth", "davit_tiny", **SMALL)
    x = torch.randn(2, 3, 50, 38)
    torch.testing.assert_close(model(x), theirs(x), **EXACT)
    back = model.export_weights("timm")
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


def test_the_released_sizes_have_timms_keys() -> None:
    with torch.device("meta"):
        for name in ("davit_tiny", "davit_small", "davit_base"):
            model: Any = heed.create_model(name)
            theirs = timm.create_model(name).state_dict()
            assert {k: v.shape for k, v in model.export_weights("timm").items()} == {
                k: v.shape for k, v in theirs.items()
            }


def _florence_config(dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    later = len(dims) - 1
    return transformers.Florence2VisionConfig(
        embed_dim=dims,
        depths=depths,
        num_heads=heads,
        num_groups=heads,
        patch_size=(7,) + (3,) * later,
        patch_stride=(4,) + (2,) * later,
        patch_padding=(3,) + (1,) * later,
        patch_prenorm=(False,) + (True,) * later,
        **settings,
    )


def test_florence2_and_back(tmp_path: Path) -> None:
    modelling = pytest.importorskip("transformers.models.florence2.modeling_florence2")
    theirs = strengthened(
        modelling.Florence2VisionBackbone(_florence_config((8, 16), (1, 2), (2, 4), window_size=3, mlp_ratio=2.0))
    )
    whole = {f"model.vision_tower.{k}": v for k, v in theirs.state_dict().items()}
    torch.save(whole | {"model.language_model.shared.weight": torch.ones(1)}, tmp_path / "florence.pth")
    options = SMALL | {"num_classes": 0}
    model = DaViT.from_authors(tmp_path / "florence.pth", "davit_base_florence2", **options)
    x = torch.randn(2, 3, 52, 36)
    torch.testing.assert_close(model.forward_features(x), theirs(x).last_hidden_state, **EXACT)
    assert model.export_weights("transformers").keys() == theirs.state_dict().keys()

    original = {f"vision_tower.{k}": v for k, v in model.export_weights("florence2").items()}
    assert {
        "vision_tower.convs.1.proj.weight",
        "vision_tower.blocks.1.1.spatial_block.conv1.fn.dw.weight",
        "vision_tower.blocks.1.1.spatial_block.window_attn.norm.bias",
        "vision_tower.blocks.1.1.channel_block.channel_attn.fn.qkv.weight",
        "vision_tower.blocks.1.1.channel_block.ffn.fn.net.fc2.bias",
    } <= original.keys()
    torch.save(original, tmp_path / "original.pth")
    again = DaViT.from_authors(tmp_path / "original.pth", "davit_base_florence2", **options)
    assert torch.equal(again.forward_features(x), model.forward_features(x))


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, "need one entry per stage"),
        ({"num_heads": (2, 4, 8)}, "need one entry per stage"),
        ({"patch_size": 3}, "patch_size=3 must be 4, or 2 or 1"),
        ({"num_heads": (2, 5)}, "dim=16 is not divisible by num_heads=5"),
        ({"window_size": 0}, "window_size=0 must be"),
        ({"blocks": ()}, "must name at least one"),
        ({"blocks": ("spacial",)}, "unknown block 'spacial'; did you mean 'spatial'"),
        ({"norms": "stage"}, "did you mean 'stages'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape("images (B, 3, H, W)")):
        small()(torch.zeros(shape))


def test_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match="did you mean 'timm'"):
        small().export_weights("tim")


@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_micro_takes_small_images(side: int) -> None:
    assert heed.create_model("davit_micro", in_chans=3)(torch.randn(2, 3, side, side)).shape == (2, 10)

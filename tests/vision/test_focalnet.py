"""FocalNet: the published counts, timm's and transformers' numbers, checkpoints, surgery, and dense prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.focalnet import FocalNet as TimmFocalNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
import heed.timm
from heed.checkpoint import read_weights
from heed.layers.focal import FocalModulation
from heed.vision.focalnet import FocalBlock, FocalNet, FocalNetConfig, recipe

EXACT = {"rtol": 1e-4, "atol": 1e-4}
TINY = FocalNetConfig(
    num_classes=5, dim=8, depths=(1, 1, 2, 1), levels=(2, 1, 2, 2), windows=(3, 5, 3, 3), mlp_ratio=2.0, drop_path=0.0
)
LARGE_STYLE: dict[str, Any] = {
    "conv_embed": True, "post_norm": True, "post_norm_in_modulation": True, "layer_scale": 0.5
}  # fmt: skip
GOLDEN = Path(__file__).parents[1] / "golden" / "68-focalnet"


def tiny(**overrides: Any) -> FocalNet:
    torch.manual_seed(0)
    return FocalNet(replace(TINY, **overrides)).eval()


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A case's tensors, and the state dict in it."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return tensors, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


# Multiply-adds of convolutions and products, and what the authors' own count says where they publish it.
@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds", "published", "overrides"),
    [
        ("tiny_srf", 28_427_116, 4.403, 4.4126, {}),
        ("tiny_lrf", 28_647_928, 4.475, 4.4856, {}),
        ("tiny_lrf", 28_647_928, 13.149, None, {"img_size": 384}),
        ("small_srf", 49_891_216, 8.599, 8.6133, {}),
        ("small_lrf", 50_342_440, 8.715, 8.7323, {}),
        ("base_srf", 88_148_144, 15.241, 15.2608, {}),
        ("base_lrf", 88_749_768, 15.397, 15.4195, {}),
        ("base_lrf", 88_749_768, 45.246, None, {"img_size": 384}),
        ("tiny_iso", 5_880_280, 1.109, 1.112, {}),
        ("small_iso", 22_376_344, 4.299, 4.305, {}),
        ("base_iso", 87_237_400, 16.921, 16.934, {}),
        ("large_fl3", 239_134_898, 104.9, None, {}),
        ("large_fl4", 207_281_248, 35.73, None, {"num_classes": 1000, "img_size": 224}),
        ("large_fl4", 207_281_248, 105.01, None, {"num_classes": 1000}),
        ("xlarge_fl3", 408_787_378, 185.4, None, {}),
        ("xlarge_fl4", 409_028_042, 185.6, None, {}),
        ("huge_fl3", 745_276_338, 118.1, None, {}),
        ("huge_fl4", 747_989_578, 118.8, None, {}),
    ],
)
def test_published_counts(
    name: str, parameters: int, multiply_adds: float, published: float | None, overrides: dict[str, int]
) -> None:
    with torch.device("meta"):
        model: Any = heed.create_model(f"focalnet_{name}", **overrides).eval()
        side = model.config.img_size
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, side, side)).shape == (1, model.num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=5e-4)
    # The authors' count holds norms and gates, too, and a final norm on more tokens than there are.
    assert model.flops() / 1e9 == pytest.approx(multiply_adds if published is None else published, rel=4e-3)
    if published is not None:
        assert model.flops() / 1e9 == pytest.approx(published, abs=5e-4)


def test_cost_is_linear_in_pixels() -> None:
    with torch.device("meta"):
        model: Any = heed.create_model("focalnet_tiny_lrf")
    assert model.flops(384, 384) / model.flops(224, 224) == pytest.approx((384 / 224) ** 2, rel=1e-3)
    assert model.flops(448, 224) == pytest.approx(2 * model.flops(224, 224), rel=1e-3)


@torch.no_grad()
def test_timms_checkpoint_gives_timms_logits(tmp_path: Path) -> None:
    reference = timm.create_model("focalnet_tiny_lrf", num_classes=7).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    model = FocalNet.from_authors(tmp_path / "model.safetensors", "focalnet_tiny_lrf", num_classes=7)
    x = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(model(x), reference(x), **EXACT)


def timm_large_style() -> TimmFocalNet:
    torch.manual_seed(0)
    model = TimmFocalNet(
        num_classes=5, embed_dim=8, depths=(1, 1, 2, 1), mlp_ratio=2.0, focal_levels=(2, 1, 2, 2),
        focal_windows=(3, 5, 3, 3), use_overlap_down=True, use_post_norm=True, use_post_norm_in_modulation=True,
        layerscale_value=0.5,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_timms_large_models() -> None:
    reference = timm_large_style()
    model = tiny(**LARGE_STYLE).load_authors(reference.state_dict())
    x = torch.randn(1, 3, 64, 70)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-3, atol=1e-4)
    with pytest.warns(UserWarning, match="create the model with normalize_modulator=False"):
        tiny(**LARGE_STYLE, normalize_modulator=True).load_authors(reference.state_dict())


@pytest.mark.parametrize("large", [False, True])
@torch.no_grad()
def test_transformers_checkpoint_gives_its_logits(large: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import FocalNetConfig as TheirConfig
    from transformers import FocalNetForImageClassification

    config = TheirConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 64], focal_levels=[2, 1, 2, 2],
        focal_windows=[3, 5, 3, 3], mlp_ratio=2.0, num_labels=5, use_conv_embed=large, use_post_layernorm=large,
        use_post_layernorm_in_modulation=large, use_layerscale=large, layerscale_value=0.5,
    )  # fmt: skip
    reference = FocalNetForImageClassification(config).eval()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = tiny(**LARGE_STYLE if large else {}).load_authors(reference.state_dict())
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model(x), reference(x).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_authors_checkpoint(tmp_path: Path) -> None:
    tensors, state = golden("model_tiny")
    torch.save({"model": state}, tmp_path / "focalnet.pth")
    settings: dict[str, Any] = {
        "num_classes": 10, "dim": 6, "depths": (1, 1, 2, 1), "levels": (2, 3, 2, 1), "windows": (3, 3, 5, 3)
    }  # fmt: skip
    model = FocalNet.from_authors(tmp_path / "focalnet.pth", "focalnet_tiny_srf", mlp_ratio=2.0, **settings)
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="does not fit FocalNet; wrong shapes"):
        FocalNet.from_authors(tmp_path / "focalnet.pth", "focalnet_tiny_srf", **settings)


@torch.no_grad()
def test_the_authors_detector(tmp_path: Path) -> None:
    """mmdet's layout: the backbone under a prefix, the detector's own parts beside it."""
    tensors, state = golden("dense_backbone")
    detector = {f"backbone.{key}": value for key, value in state.items()} | {"bbox_head.bias": torch.ones(1)}
    torch.save({"state_dict": detector, "meta": {}}, tmp_path / "mask_rcnn.pth")
    model = FocalNet.from_authors(
        tmp_path / "mask_rcnn.pth", "focalnet_tiny_srf", dim=6, depths=(1,) * 3, levels=(2, 2, 3), windows=(9, 5, 3),
        mlp_ratio=2.0, layer_scale=1e-4, dense=True, num_classes=0,
    )  # fmt: skip
    maps = model.forward_intermediates(tensors["input.x"], intermediates_only=True)
    for i, found in enumerate(maps):
        torch.testing.assert_close(found, tensors[f"output.map{i}"], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_fine_tuning_starts_from_a_classifier_with_narrower_windows() -> None:
    small = tiny()
    wide = tiny(windows=(9, 11, 9, 9), num_classes=3).start_from(small.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(wide.forward_features(x), small.forward_features(x), **EXACT)
    assert not torch.equal(wide.head.weight[:3], small.head.weight[:3])
    dense = tiny(windows=(9, 11, 9, 9), levels=(3, 3, 3, 3), dense=True, num_classes=0).start_from(small.state_dict())
    assert [m.shape[-1] for m in dense.stage_maps(x)] == [16, 8, 4, 2]
    with pytest.raises(NotImplementedError, match=r"stages.0.blocks.0.modulation has levels=1, the weights have 2"):
        tiny(levels=(1, 1, 1, 1)).start_from(small.state_dict())
    with pytest.raises(ValueError, match="does not fit FocalNet; missing"):
        tiny().start_from({key: value for key, value in small.state_dict().items() if "mlp" not in key})


@torch.no_grad()
def test_fine_tuning_starts_from_timms_file(tmp_path: Path) -> None:
    reference = timm_large_style()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    model = tiny(**LARGE_STYLE, windows=(5, 5, 5, 5)).start_from(read_weights(tmp_path / "model.safetensors"))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("overrides", [{}, LARGE_STYLE], ids=["plain", "large"])
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (61, 35)])
@torch.no_grad()
def test_any_image_size_gives_a_pyramid(size: tuple[int, int], overrides: dict[str, Any]) -> None:
    model = tiny(dense=True, **overrides)
    x = torch.randn(1, 3, *size)
    maps = model.stage_maps(x)
    sides = size
    for i, found in enumerate(maps):
        sides = tuple(-(-side // (2 if i else 4)) for side in sides)
        assert found.shape == (1, 8 * 2**i, *sides)
        torch.testing.assert_close(found.mean(1), torch.zeros(1, *sides), rtol=0, atol=1e-5)
    filled = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    torch.testing.assert_close(model.stage_maps(filled)[-1], maps[-1])


@torch.no_grad()
def test_classification_drops_what_is_left_of_a_patch() -> None:
    model = tiny()
    x = torch.randn(1, 3, 35, 66)
    torch.testing.assert_close(model(x), model(x[:, :, :32, :64]))


@torch.no_grad()
def test_out_indices_and_stem_padding() -> None:
    model = tiny(dense=True, out_indices=(1, 2), num_classes=0)
    maps = model.stage_maps(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 16, 8, 8), (1, 32, 4, 4)]
    assert set(model.norms) == {"1", "2"}
    assert [info["reduction"] for info in model.feature_info] == [8, 16]
    padding = {
        settings: tiny(conv_embed=True, dense=settings[0], stem_padding=settings[1]).patch_embed.proj.padding[0]
        for settings in [(False, None), (True, None), (True, 2), (False, 3)]
    }
    assert list(padding.values()) == [2, 3, 2, 3]
    assert isinstance(tiny(patch_norm=False).patch_embed.norm, nn.Identity)


@pytest.mark.parametrize(("stages", "frozen"), [(-1, 0), (0, 1), (1, 1), (2, 2), (4, 4)])
def test_frozen_stages_neither_learn_nor_drop(stages: int, frozen: int) -> None:
    model = tiny(frozen_stages=stages, drop_path=0.3).train()
    assert isinstance(model, FocalNet)
    still = [model.patch_embed, *model.stages][:frozen]
    assert all(not p.requires_grad and not m.training for m in still for p in m.parameters())
    assert all(p.requires_grad for m in [model.patch_embed, *model.stages][frozen:] for p in m.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.head.weight.grad is not None


@torch.no_grad()
def test_parts_are_what_the_blocks_compute() -> None:
    model = tiny(post_norm=True, layer_scale=0.5)
    x = torch.randn(1, 3, 64, 64)
    found = model.parts(x)
    assert [len(stage) for stage in found] == [1, 1, 2, 1]
    assert [stage[-1].gates.shape[1] for stage in found] == [3, 2, 3, 3]
    assert found[2][1].modulator.shape == (1, 32, 4, 4)
    block: Any = model.stages[0].blocks[0]  # type: ignore[union-attr]
    torch.testing.assert_close(found[0][0].modulator, block.modulation.parts(model.patch_embed(x)).modulator)


@torch.no_grad()
def test_blocks_norm_before_or_after() -> None:
    x = torch.randn(1, 4, 4, 8)
    for post in (False, True):
        block = FocalBlock(FocalModulation(8), 2.0, post_norm=post, layer_scale=0.3).eval()

        def branch(norm: nn.Module, part: nn.Module, x: Tensor, post: bool = post) -> Tensor:
            return 0.3 * (norm(part(x)) if post else part(norm(x)))

        y = x + branch(block.norm1, block.modulation, x)
        torch.testing.assert_close(block(x), y + branch(block.norm2, block.mlp, y))


def test_recipe() -> None:
    options = recipe("focalnet_base_lrf", 512)
    assert (options["lr"], options["warmup_epochs"], options["drop_path"]) == (1e-4, 5, 0.5)
    assert recipe("focalnet_tiny_srf", paper=True)["lr"] == 1e-3
    assert timm.is_model(options["model"])
    create_optimizer_v2(tiny(), options["opt"], options["lr"], options["weight_decay"], betas=options["opt_betas"])
    with pytest.raises(ValueError, match="'vit_tiny' is a ViT"):
        recipe("vit_tiny")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"levels": (2, 2)}, "need one entry per stage"),
        ({"windows": (3,)}, "need one entry per stage"),
        ({"windows": (3, 4, 3, 3)}, "window=4"),
        ({"patch_size": 8, "conv_embed": True}, "patch_size=8: conv_embed"),
        ({"out_indices": (1,)}, "needs dense=True"),
        ({"dense": True, "out_indices": (1, 4)}, "stage numbers from 0 to 3"),
        ({"dense": True, "out_indices": ()}, "stage numbers from 0 to 3"),
        ({"frozen_stages": 7}, "frozen_stages=7"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        ((3, 64, 64), {}, r"images \(B, 3, H, W\)"),
        ((1, 1, 64, 64), {}, r"images \(B, 3, H, W\)"),
        ((1, 3, 31, 64), {}, "sides of at least 32"),
        ((1, 3, 3, 64), {"dense": True}, "sides of at least 4"),
        ((1, 3, 3, 64), {"conv_embed": True}, "sides of at least 4"),
    ],
)
def test_bad_images(shape: tuple[int, ...], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)(torch.zeros(shape))

"""SOFT: the published sizes, the pyramid at any image size, the authors' checkpoints, a segmentation host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.layers.soft import SoftKernel
from heed.models import models
from heed.vision.soft import Soft, SoftBlock, SoftConfig, SoftmaxBlock, training_recipe

TINY = {"num_classes": 5, "dims": (4, 8, 8, 12), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)}
GOLDEN = Path(__file__).parents[1] / "golden" / "64-soft" / "model_tiny.safetensors"


def tiny(**overrides: Any) -> Soft:
    return Soft(SoftConfig(**TINY | overrides))


@pytest.mark.parametrize("norm", ["", "norm_"])
@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"),
    [
        ("tiny", 13_069_056, 2.221),
        ("small", 38_858_462, 7.717),
        ("medium", 45_812_707, 9.072),
        ("large", 64_700_646, 13.732),
        ("huge", 87_108_273, 19.404),
    ],
)
def test_published_counts(size: str, norm: str, parameters: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = heed.create_model(f"soft_{norm}{size}").eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        if norm:  # the same but for the inverse, which the authors search for with products of its own
            assert model.config == SoftConfig(**models.get(f"soft_{size}").config.__dict__ | {"normalised": True})
            return
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    # Every distance is one matrix product here and three in the authors' code, which adds the squares with products too.
    config, more = model.config, 0
    for i, (depth, heads, ratio) in enumerate(zip(config.depths, config.num_heads, config.ratios, strict=False)):
        tokens, width = (56 >> i) ** 2, config.dims[i] // heads
        landmarks = tokens // ratio**2
        more += depth * heads * 2 * landmarks * (tokens + landmarks) * width
    assert (counter.get_total_flops() / 2 + more) / 1e9 == pytest.approx(gmacs, rel=0.002)


@pytest.mark.parametrize("size", [(29, 29), (64, 96), (70, 45), (31, 130)])
@torch.no_grad()
def test_any_image_size_gives_a_pyramid(size: tuple[int, int]) -> None:
    model = tiny().eval()
    x = torch.randn(2, 3, *size)
    final, maps = model.forward_intermediates(x)
    for i, (feature, info) in enumerate(zip(maps, model.feature_info, strict=True)):
        assert feature.shape == (2, info["num_chs"], *(-(-side // (4 * 2**i)) for side in size))
    torch.testing.assert_close(model.forward_head(final), model(x))
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    torch.testing.assert_close(last_two, maps[2:])
    torch.testing.assert_close(model.forward_intermediates(x, indices=[-1, 0])[1], [maps[3], maps[0]])


def test_a_fixed_number_of_landmarks_makes_the_cost_linear_and_images_small() -> None:
    def flops(side: int, **overrides: Any) -> int:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            # One SOFT stage, and a last one of the same size whatever the image.
            model = Soft(
                SoftConfig(
                    dims=(16, 8),
                    depths=(2, 0),
                    num_heads=(2, 1),
                    ratios=(4,),
                    conv_sizes=(3,),
                    position_side=8,
                    **overrides,
                )
            ).eval()
            model(torch.empty(1, 3, side, side))
        return counter.get_total_flops()

    assert flops(512, num_landmarks=49) < 4.05 * flops(256, num_landmarks=49)
    assert flops(512) > 8 * flops(256)
    model = tiny(num_landmarks=4).eval()
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 5)


def test_positions_are_resized_and_the_class_token_keeps_its_own() -> None:
    model = tiny(position_side=8)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "positions" in name}
    assert shapes["stages.3.positions.weight"] == (1, 2, 12)
    grid, first = torch.zeros(1, 8, 8, 4), model.get_submodule("stages.0.positions")
    assert torch.equal(first(grid).flatten(1, 2), model.get_parameter("stages.0.positions.weight"))
    larger = first(torch.zeros(1, 16, 24, 4))
    wanted = nn.functional.interpolate(first(grid).permute(0, 3, 1, 2), (16, 24), mode="bilinear")
    torch.testing.assert_close(larger.permute(0, 3, 1, 2), wanted)


def test_stages_have_the_authors_blocks() -> None:
    model = tiny(drop_path=0.4)
    kinds = [[type(block) for block in model.get_submodule(f"stages.{i}.blocks")] for i in range(4)]  # type: ignore[attr-defined]
    assert kinds == [[SoftBlock], [SoftBlock], [SoftBlock] * 2, [SoftmaxBlock]]
    rates = [block.drop.p for block in model.modules() if isinstance(block, SoftBlock)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    kernels = [module for module in model.modules() if isinstance(module, SoftKernel)]
    assert [(k.ratio, k.conv.kernel_size[0]) for k in kernels if k.conv] == [(8, 9), (4, 5), (2, 3), (2, 3)]


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in load_file(GOLDEN).items() if k.startswith("state.")}


def test_converts_the_authors_checkpoint_and_finds_its_depths(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    torch.save({"model": golden_state()}, tmp_path / "soft.pth")
    settings = {key: TINY[key] for key in ("dims", "num_heads")} | {"num_classes": 10}
    model = Soft.from_authors(tmp_path / "soft.pth", "soft_small", **settings)
    assert model.config.depths == (1, 1, 2, 1)
    assert not model.training
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-3, atol=3e-4)
    with pytest.raises(ValueError, match="does not fit Soft"):
        Soft.from_authors(tmp_path / "soft.pth", "soft_small")


def test_a_normalised_model_has_the_same_weights_and_other_logits(tmp_path: Path) -> None:
    torch.save(golden_state(), tmp_path / "soft.pth")
    settings = {key: TINY[key] for key in ("dims", "num_heads")} | {"num_classes": 10}
    x = load_file(GOLDEN)["input.x"]
    plain, norm = (Soft.from_authors(tmp_path / "soft.pth", f"soft_{n}tiny", **settings)(x) for n in ("", "norm_"))
    assert not torch.allclose(plain, norm, atol=1e-3)


def test_serves_transformers_upernet() -> None:
    transformers = pytest.importorskip("transformers")
    import heed.timm  # noqa: F401  puts the models into the registry that transformers reads

    backbone = transformers.TimmBackboneConfig(
        backbone="heed_soft_norm_tiny", out_indices=[0, 1, 2, 3], use_pretrained_backbone=False
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=3, hidden_size=8, auxiliary_in_channels=320, auxiliary_channels=4
    )
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).logits.shape == (1, 3, 64, 96)


def test_exports() -> None:
    model, x = tiny().eval(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_recipe() -> None:
    assert training_recipe()["lr"] == 1e-3
    assert training_recipe("soft_norm_huge")["lr"] == 2.7e-4


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"images \(B, 3, H, W\)"),
        ((1, 1, 64, 64), r"images \(B, 3, H, W\)"),
        ((1, 3, 28, 64), "sides of at least 29"),
    ],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


def test_errors_name_the_layer() -> None:
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.attn.kernel: the queries are not finite"):
        tiny().eval()(torch.full((1, 3, 32, 32), torch.inf))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, r"depths=\(1, 1\) needs 4 entries for 4 stages"),
        ({"ratios": (8, 4, 2, 1)}, "needs 3 entries for 4 stages"),
        ({"stem_stride": 3}, "stem_stride=3 must be 1, 2 or 4"),
        ({"position_side": 7}, "position_side=7 cannot be halved for 4 stages"),
        ({"num_heads": (3, 2, 2, 2)}, "dim=4 is not divisible by num_heads=3"),
        ({"num_heads": (1, 2, 2, 5)}, "dim=12 is not divisible by num_heads=5"),
        ({"conv_sizes": (8, 5, 3)}, "conv_size=8 must be odd"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize("side", [8, 28, 32])
def test_micro_takes_small_images(side: int) -> None:
    assert heed.create_model("soft_micro", in_chans=3)(torch.randn(2, 3, side, side)).shape == (2, 10)

"""TiC: its sizes, its parts in their order, any image size, one set of weights at several sizes, and its reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import heed
from heed.layers.tic import IPM, MDCSM, MSAConv2d
from heed.vision.tic import TiC, logits_at_sizes, receptive_field

PLAIN: dict[str, Any] = {"shift": 0, "inter_pooling": False}
TABLE = {"tic_micro": 98_986, "tic_tiny": 9_881_704, "tic_small": 19_334_248}


def micro(**overrides: Any) -> TiC:
    return cast(TiC, heed.create_model("tic_micro", **overrides)).eval()


@pytest.mark.parametrize("name", TABLE)
def test_sizes(name: str) -> None:
    with torch.device("meta"):
        model = heed.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == TABLE[name]


def layers(model: TiC) -> list[list[Any]]:
    return [[block.layer for block in stage] for stage in model.stages]  # type: ignore[union-attr]


def test_shift_and_pooling_take_turns_and_can_be_left_out() -> None:
    with torch.device("meta"):
        found = layers(cast(TiC, heed.create_model("tic_tiny")))
        plain = layers(cast(TiC, heed.create_model("tic_tiny", **PLAIN)))
        wide = layers(cast(TiC, heed.create_model("tic_tiny", shift=2, diagonals=True)))
    assert [len(stage) for stage in found] == [2, 2, 6, 2]
    assert all(type(layer) is MSAConv2d for stage in plain for layer in stage)
    for i, stage in enumerate(found):
        for j, layer in enumerate(stage):
            halves = i > 0 and j == 0
            assert isinstance(layer, MDCSM) is not halves
            inner = layer if halves else layer.layer
            assert isinstance(inner, IPM) is (j % 2 == 1)
            assert inner.mlp.stride == ((2, 2) if halves else (1, 1))
    shifts = [layer.shift for stage in found for layer in stage if isinstance(layer, MDCSM)]
    assert shifts[:5] == [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 0)]
    assert (2, -2) in [layer.shift for stage in wide for layer in stage if isinstance(layer, MDCSM)]


@settings(max_examples=8)
@given(st.integers(1, 21), st.integers(1, 21))
@torch.no_grad()
def test_any_image_size_gives_a_pyramid(height: int, width: int) -> None:
    model = micro(in_chans=3, patch_size=2)
    final, maps = model.forward_intermediates(torch.randn(1, 3, height, width))
    for stage, info in zip(maps, model.feature_info, strict=True):
        step = info["reduction"]
        assert stage.shape == (1, info["num_chs"], -(-height // step), -(-width // step))
    assert final.shape == maps[-1].shape


@torch.no_grad()
def test_the_inside_of_an_image_is_that_of_its_crop() -> None:
    model = micro(**PLAIN)
    x = torch.randn(1, 1, 40, 44)
    whole, crop = (model.stage_maps(part)[-1] for part in (x, x[..., 4:36, 6:38]))
    # Reach in pixels: two layers of 2, then one of 2 at full size and one of 2 at half size.
    torch.testing.assert_close(crop[..., 5:-5, 5:-5], whole[..., 7:13, 8:14], rtol=1e-4, atol=2e-5)
    shifted, crop = (micro().stage_maps(part)[-1] for part in (x, x[..., 4:36, 6:38]))
    assert (crop[..., 0, :] - shifted[..., 2, 3:19]).abs().max() > 1e-3


@torch.no_grad()
def test_one_set_of_weights_at_several_sizes() -> None:
    model = micro()
    x = torch.rand(2, 1, 32, 32)
    logits = logits_at_sizes(model, x, [(32, 32), (48, 40), (33, 57)])
    assert list(logits) == [(32, 32), (48, 40), (33, 57)]
    torch.testing.assert_close(logits[32, 32], model(x))
    assert all(value.shape == (2, 10) for value in logits.values())
    with pytest.raises(ValueError, match="ViT takes images of 8 pixels only"):
        logits_at_sizes(cast(Any, heed.create_model("vit_micro")), x, [(16, 16)])


def test_shift_and_pooling_enlarge_the_receptive_field() -> None:
    x = torch.randn(2, 1, 24, 24)

    def area(at: tuple[int, int], **overrides: Any) -> int:
        torch.manual_seed(0)
        model = micro(dims=(8,), depths=(2,), heads=(2,), **overrides)
        return int((receptive_field(lambda y: model.stage_maps(y)[-1], x, at) > 0).sum())

    middle, corner = (12, 12), (0, 0)
    assert area(middle, **PLAIN) == 9 * 9  # two layers, each an attention window and a convolution of 3 x 3
    assert area(middle, shift=0) > 9 * 9
    assert area(corner, **PLAIN) == 5 * 5
    assert area(corner, inter_pooling=False) > 5 * 5
    assert area(middle, inter_pooling=False) == 9 * 9  # opposite borders are too far away to matter here
    assert area(corner) > area(corner, shift=0)


def test_masked_borders_reach_every_layer() -> None:
    model = micro(pad_mode="mask")
    assert {m.pad_mode for m in model.modules() if isinstance(m, MSAConv2d)} == {"mask"}
    x = torch.randn(1, 1, 8, 8)
    other = micro()
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model(x), other(x))


def test_training_on_one_value_per_channel_is_explained() -> None:
    model = micro().train()
    with pytest.raises(ValueError, match="one image of 2 x 1 .* BatchNorm needs more than one"):
        model(torch.randn(1, 1, 2, 1))
    assert model(torch.randn(1, 1, 3, 1)).shape == model.eval()(torch.randn(1, 1, 1, 1)).shape == (1, 10)


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    model = micro()
    save_file(model.state_dict(), tmp_path / "tic.safetensors")
    x = torch.randn(1, 1, 9, 8)
    assert torch.equal(TiC.from_authors(tmp_path / "tic.safetensors", "tic_micro")(x), model(x))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1,)}, r"depths=\(1,\) and heads=\(4, 8\) need one entry per stage"),
        ({"depths": (1, 0)}, r"depths=\(1, 0\): every stage needs a layer"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"kernel_size": 4}, "kernel 4 with dilation 1 on axis 0 has no centre"),
        ({"heads": (3, 3)}, "dim=32 is not divisible by num_heads=3"),
        ({"pad_mode": "none"}, "unknown pad_mode 'none'"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**overrides)


@pytest.mark.slow
def test_learns_digits_at_one_size_and_reads_them_at_another() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    model = cast(TiC, heed.create_model("tic_micro"))
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(4):
        for batch in torch.randperm(1400).split(50):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    logits = logits_at_sizes(model.eval(), x[1400:], [(8, 8), (10, 9)])
    right = {size: (value.argmax(1) == y[1400:]).float().mean().item() for size, value in logits.items()}
    assert right[8, 8] > 0.85
    assert right[10, 9] > 0.5

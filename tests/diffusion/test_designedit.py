"""DesignEdit: the invariants of its mechanisms, every operation end to end, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from heed.diffusion.denoise import Position
from heed.diffusion.designedit import (
    Background,
    DesignEdit,
    DesignEditSettings,
    EditPlan,
    KeyMaskedAttnProcessor,
    Layer,
    LayerFusion,
    ProximalGuidance,
    decompose,
    shift,
)
from heed.diffusion.inversion import Trajectory
from heed.diffusion.masks import Box, Polygon
from heed.diffusion.processors import layer_grid
from heed.diffusion.tiny import tiny_pipeline

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers.models.attention_processor import Attention  # noqa: E402

quick = settings(max_examples=15, deadline=None)
STEPS = 6
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
OTHER = 255 - PICTURE[:32, :32]
BOX = Box(8, 8, 24, 24)
fractions = st.floats(-0.99, 0.99)


def editor(steps: int = STEPS, **options: Any) -> DesignEdit:
    pipeline = tiny_pipeline(**{key: options.pop(key) for key in ("kind", "pixels") if key in options})
    pipeline.set_progress_bar_config(disable=True)
    return DesignEdit(pipeline, DesignEditSettings(steps=steps), **options)


# Key masking


def attention(bias: bool = False) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, bias=bias).eval(), torch.randn(4, 36, 16)


def masked(attn: Attention, x: Tensor, mask: Tensor, step: int = 1, **options: Any) -> Tensor:
    position = Position(step, range(len(x)))
    attn.set_processor(KeyMaskedAttnProcessor(position, 3, mask, range(1, 5), **options))
    with torch.no_grad():
        return attn(x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_mask_of_zeros_is_ordinary_attention(bias: bool) -> None:
    attn, x = attention(bias)
    with torch.no_grad():
        want = attn(x)
    assert torch.equal(masked(attn, x, torch.zeros(1, 1, 12, 12)), want)
    for step in (0, 5):  # outside the window nothing is blanked
        assert torch.equal(masked(attn, x, torch.ones(1, 1, 12, 12), step), want)


@pytest.mark.parametrize("bias", [False, True])
def test_a_mask_of_ones_makes_one_row_uniform(bias: bool) -> None:
    attn, x = attention(bias)
    with torch.no_grad():
        want = attn(x)
        uniform = attn.to_out[0](attn.to_v(x[3]).mean(0, keepdim=True)).expand(36, -1)
    got = masked(attn, x, torch.ones(1, 1, 12, 12))
    torch.testing.assert_close(got[3], uniform, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[:3], want[:3])


def test_blanked_keys_still_take_part() -> None:
    """Logit 0 and not minus infinity: written out."""
    attn, x = attention()
    mask = (torch.rand(1, 1, 6, 6) > 0.5).float()
    q, k, v = (layer(x[3]).view(36, 2, 8).transpose(0, 1) for layer in (attn.to_q, attn.to_k, attn.to_v))
    logits = q @ k.transpose(1, 2) / 8**0.5 * (1 - mask.view(1, 1, 36))
    with torch.no_grad():
        want = attn.to_out[0]((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(masked(attn, x, mask)[3], want, rtol=1e-5, atol=1e-5)


def test_rows_in_several_passes() -> None:
    attn, x = attention()
    mask = (torch.rand(1, 1, 6, 6) > 0.5).float()
    whole = masked(attn, x, mask)
    position = Position(1)
    attn.set_processor(KeyMaskedAttnProcessor(position, 3, mask, range(1, 5)))
    for rows in (range(2), range(2, 4), range(3, 4)):
        position.rows = rows
        with torch.no_grad():
            torch.testing.assert_close(attn(x[list(rows)]), whole[list(rows)], rtol=1e-5, atol=1e-6)


def test_oblong_maps_need_their_grid() -> None:
    attn, _ = attention()
    x, mask = torch.randn(4, 15, 16), torch.zeros(1, 1, 10, 6)
    with pytest.raises(ValueError, match="15 tokens form no square"):
        masked(attn, x, mask)
    with pytest.raises(ValueError, match=r"15 tokens are no halving of grid=\(8, 8\)"):
        masked(attn, x, mask, grid=(8, 8))
    assert masked(attn, x, mask, grid=(10, 6)).shape == x.shape
    assert layer_grid(9, (5, 6)) == (3, 3)


def test_what_the_processor_refuses() -> None:
    attn, x = attention()
    zeros = torch.zeros(1, 1, 6, 6)
    with pytest.raises(ValueError, match="mask must be"):
        masked(attn, x, zeros[0])
    with pytest.raises(ValueError, match="one size is needed"):
        masked(attn, x, zeros, refine=torch.zeros(1, 1, 3, 3))
    position = Position(1, range(3))
    attn.set_processor(KeyMaskedAttnProcessor(position, 3, zeros, range(1, 5)))
    with pytest.raises(ValueError, match="4 rows given where the position tells of 3"):
        attn(x)
    with pytest.raises(ValueError, match="does not support text"):
        attn(x, encoder_hidden_states=x)
    with pytest.raises(ValueError, match="does not support attention_mask"):
        attn(x, attention_mask=torch.zeros(4, 1, 36))


# Fusion and guidance


@quick
@given(st.floats(0, 0.99), st.integers(1, 12), st.integers(1, 12))
def test_shifting_there_and_back_loses_only_what_left(fraction: float, height: int, width: int) -> None:
    x = torch.randn(2, height, width)
    lost = int(fraction * width)
    back = shift(shift(x, fraction), -fraction)
    assert torch.equal(back[..., : width - lost], x[..., : width - lost])
    assert not back[..., width - lost :].any()
    up = shift(x, 0, fraction)
    lost = int(fraction * height)
    assert torch.equal(up[:, : height - lost], x[:, lost:])
    assert not up[:, height - lost :].any()


def test_a_layer_that_covers_everything_is_the_canvas() -> None:
    z, ones = torch.randn(4, 4, 6, 7), torch.ones(1, 1, 6, 7)
    fusion = LayerFusion(torch.zeros_like(ones), range(3), [ones], [(0.0, 0.0)])
    assert torch.equal(fusion(z, 3)[2], z[3])
    for step in (2, 4):
        assert torch.equal(fusion(z, step)[2], z[2])


@quick
@given(fractions, fractions, fractions, fractions)
def test_the_order_of_layers_changes_their_overlap_only(dx1: float, dy1: float, dx2: float, dy2: float) -> None:
    torch.manual_seed(0)
    z, remove = torch.randn(5, 4, 8, 9), torch.zeros(1, 1, 8, 9)
    masks = [(torch.rand(1, 1, 8, 9) > 0.5).float() for _ in range(2)]
    moves = [(dx1, dy1), (dx2, dy2)]
    first = LayerFusion(remove, range(1), masks, moves)(z, 1)[2]
    second = LayerFusion(remove, range(1), masks[::-1], moves[::-1])(z[[0, 1, 2, 4, 3]], 1)[2]
    overlap = (shift(masks[0], *moves[0]) * shift(masks[1], *moves[1]))[0].bool().expand_as(first)
    assert torch.equal(first[~overlap], second[~overlap])


def test_blending_is_exact_outside_the_mask_and_leaves_its_input_alone() -> None:
    z, remove = torch.randn(2, 4, 6, 6), (torch.rand(1, 1, 6, 6) > 0.5).float()
    before = z.clone()
    fused = LayerFusion(remove, range(3))(z, 1)
    assert torch.equal(z, before)
    here = remove[0].bool().expand(4, 6, 6)
    assert torch.equal(fused[1][~here], z[0][~here])
    assert torch.equal(fused[1][here], z[1][here])
    assert torch.equal(LayerFusion(remove, range(3))(z, 3), z)


def test_fusion_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="1 layers need as many shifts"):
        LayerFusion(torch.zeros(1, 1, 4, 4), range(1), [torch.zeros(1, 1, 4, 4)], [])
    with pytest.raises(ValueError, match="layer 0: its mask is"):
        LayerFusion(torch.zeros(1, 1, 4, 4), range(1), [torch.zeros(1, 1, 5, 4)], [(0, 0)])
    with pytest.raises(ValueError, match="must lie in"):
        shift(torch.zeros(4, 4), 1.0)


def test_kinds_of_proximal_guidance() -> None:
    uncond, d = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    threshold, got = d.abs().quantile(0.75), {}
    for prox in (None, "l0", "l1"):
        config = DesignEditSettings(prox=prox, guidance_scale=2)  # type: ignore[arg-type]
        guidance = ProximalGuidance(config, torch.zeros(51, 2, 4, 5, 5), torch.zeros(1, 1, 5, 5))
        got[prox] = (guidance.guide(uncond, uncond + d, 900) - uncond) / 2
    torch.testing.assert_close(got[None], d, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["l0"], torch.where(d.abs() > threshold, d, 0), rtol=1e-4, atol=1e-5)
    shrunk = d.sign() * (d.abs() - threshold).clamp(min=0)
    torch.testing.assert_close(got["l1"], shrunk, rtol=1e-4, atol=1e-5)


def test_only_unedited_places_are_pulled_and_only_late() -> None:
    inverted = torch.randn(51, 3, 4, 9, 9)
    remove = torch.zeros(1, 1, 9, 9)
    remove[..., :3, :3] = 1
    guidance = ProximalGuidance(DesignEditSettings(), inverted, remove)
    z, same = torch.randn(3, 4, 9, 9), torch.zeros(3, 4, 9, 9)
    guidance.guide(same, same, 399)
    assert guidance.pull(z, 10, 400) is z
    pulled = guidance.pull(z, 10, 399)
    want = z - 0.1 * (z - inverted[39])
    torch.testing.assert_close(pulled[0], want[0])
    assert torch.equal(pulled[1, :, :3, :3], z[1, :, :3, :3])
    torch.testing.assert_close(pulled[1, :, 3:], want[1, :, 3:])
    assert torch.equal(pulled[2], z[2])  # the canvas


# The operations

OPERATIONS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], int]] = {  # method, arguments, options, rows
    "remove": ("remove", (BOX,), {"refine_mask": Box(4, 4, 30, 30)}, 2),
    "remove two": ("remove", ([BOX, Box(30, 20, 40, 30)],), {}, 2),
    "move": ("move", (BOX, 0.3, -0.2), {}, 4),
    "resize": ("resize", (BOX, 0.6), {}, 4),
    "flip": ("flip", (BOX, "both"), {}, 4),
    "copy": ("copy", (BOX, 0.4), {"scale": 1.2, "flip": "up-down"}, 4),
    "swap": ("swap", (BOX, Box(30, 20, 40, 30)), {}, 5),
    "zoom out": ("zoom_out", (0.7, 0.5), {}, 2),
    "pan": ("pan", (-0.2,), {}, 2),
    "compose": ("compose", ([Layer(Box(2, 2, 20, 20), OTHER, 0.1), Layer(BOX), Layer(BOX, dy=0.3)],), {}, 6),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_end_to_end(name: str) -> None:
    method, arguments, options, rows = OPERATIONS[name]
    edit = editor()
    calls = []
    hook = edit.host.unet.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    edited = getattr(edit, method)(PICTURE, *arguments, **options)
    hook.remove()
    assert edited.image.size == (48, 40)
    assert edited.latents.shape == (rows, 4, 16, 16)
    assert torch.isfinite(edited.latents).all()
    inverted = len(edited.trajectory.keys)
    assert calls == [inverted] * STEPS + [2 * rows] * STEPS


def test_without_a_mask_the_background_is_the_source() -> None:
    latents = editor().remove(PICTURE, np.zeros((40, 48), bool)).latents
    assert torch.equal(latents[0], latents[1])


def test_the_background_equals_the_source_outside_the_mask_until_the_paste() -> None:
    edit, seen = editor(), []
    edited = edit.move(PICTURE, BOX, 0.3, on_step=lambda k, z: seen.append(z))
    outside = edited.decomposition.remove[0].eq(0).expand(4, 16, 16)
    inside = ~outside
    assert 0 < inside.sum() < inside.numel()
    steps = edit.settings.blend_steps
    for k, z in enumerate(seen, 1):
        assert torch.equal(z[0][outside], z[1][outside]) == (k in steps), k
    assert not torch.equal(seen[2][0][inside], seen[2][1][inside])


def test_the_source_row_is_the_reconstruction() -> None:
    """Equal prompts: guidance changes nothing, so the source denoises as without any edit, whatever the other rows do."""
    edit = editor(kind="sdxl", pixels=True, size=64, steps=20)
    removed, moved = edit.remove(PICTURE, BOX), edit.move(PICTURE, BOX, 0.3)
    clean = removed.trajectory.latents[0, 0]
    error = (removed.latents[0] - clean).abs().max()
    assert error < 0.1 * clean.abs().max()
    assert (moved.latents[0] - clean).abs().max() < 2 * error + 1e-3


def test_a_kept_trajectory_is_used_and_completed(tmp_path: Path) -> None:
    edit, calls = editor(), []
    kept = edit.invert(PICTURE)
    kept.save(tmp_path / "cat.safetensors")
    kept = Trajectory.load(tmp_path / "cat.safetensors")
    fresh = editor().remove(PICTURE, BOX).latents
    hook = edit.host.unet.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(edit.remove(PICTURE, BOX, trajectory=kept).latents, fresh)
    assert len(calls) == STEPS
    flipped = edit.flip(PICTURE, BOX, trajectory=kept)  # its layer is another picture
    hook.remove()
    assert len(calls) == 3 * STEPS
    assert flipped.trajectory.keys[0] == kept.keys[0]
    assert len(flipped.trajectory.keys) == 2


def test_prompts_differ_from_none() -> None:
    edit = editor()
    kept = edit.invert(PICTURE, prompt="a cat")
    same = edit.remove(PICTURE, BOX, trajectory=kept).latents
    assert torch.equal(edit.remove(PICTURE, BOX, trajectory=kept, prompt="a cat").latents, same)
    assert not torch.equal(edit.remove(PICTURE, BOX, trajectory=kept, prompt="a dog").latents, same)


def test_progress_is_diffusers_own(capsys: pytest.CaptureFixture[str]) -> None:
    edit = editor()
    edit.remove(PICTURE, BOX)
    assert not capsys.readouterr().err
    edit.host.pipeline.set_progress_bar_config(disable=False)
    edit.remove(PICTURE, BOX)
    assert capsys.readouterr().err.count(f"{STEPS}/{STEPS}") >= 2


def test_oblong_sizes() -> None:
    edited = editor(size=(32, 48)).move(PICTURE, BOX, 0.2)
    assert edited.latents.shape == (4, 4, 16, 24)


# Plans


def test_a_plan_from_json(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "cat.png")
    Image.fromarray(OTHER).save(tmp_path / "dog.png")
    content = {
        "background": {"image": "cat.png", "remove_mask": [{"box": [8, 8, 24, 24]}], "refine_mask": None},
        "layers": [
            {"mask": {"box": [8, 8, 24, 24]}, "dx": 0.2, "flip": "left-right"},
            {"image": "dog.png", "mask": {"polygon": [[2, 2], [20, 2], [11, 25]]}, "scale": 0.5},
        ],
    }
    (tmp_path / "plan.json").write_text(json.dumps(content))
    parts = decompose(EditPlan.load(tmp_path / "plan.json"), (32, 32), (16, 16))
    assert parts.reference == (0, 0, 0, 1, 2)
    assert parts.shifts == ((0.2, 0), (0, 0))
    assert parts.remove.sum() > 0
    triangle = Polygon(((2, 2), (20, 2), (11, 25)))
    layers = Layer(BOX, dx=0.2, flip="left-right"), Layer(triangle, OTHER, scale=0.5)
    by_hand = decompose(EditPlan(Background(PICTURE, BOX), layers), (32, 32), (16, 16))
    for a, b in zip(parts.pictures, by_hand.pictures, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "plan must be an object"),
        ({}, "plan lacks background"),
        ({"background": {}}, "background lacks image"),
        ({"background": {"image": "a", "removemask": 1}}, "unknown entry of background 'removemask'; did you mean"),
        ({"background": {"image": "a", "remove_mask": 3}}, "remove_mask must be a path"),
        ({"background": {"image": "a", "zoom": 0.5}}, "zoom must be two numbers"),
        ({"background": {"image": "a"}, "layers": [{}]}, "layer 0 lacks mask"),
        ({"background": {"image": "a"}, "layers": [{"mask": "m", "scale": 0}]}, "layer 0: scale=0"),
        ({"background": {"image": "a"}, "layers": [{"mask": "m", "dx": 1}]}, "layer 0: move: dx=1"),
        ({"background": {"image": "a"}, "layers": [{"mask": "m", "flip": "lr"}]}, "layer 0: flip='lr'"),
        ({"background": {"image": "a", "zoom": [0.5, 2]}}, "both scales must lie in"),
        ({"background": {"image": "a", "zoom": [0.5, 1], "pan": [0, 0.5]}}, "one of remove_mask, zoom and pan"),
    ],
)
def test_bad_plans(content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EditPlan.from_dict(content)


# Bad input


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (EditPlan(Background(PICTURE)), "the plan changes nothing"),
        (
            EditPlan(Background(PICTURE), (Layer(BOX), Layer(np.zeros((40, 48), bool)))),
            "mask of layer 1 has no foreground",
        ),
        (EditPlan(Background(PICTURE), (Layer(np.ones((48, 40), bool)),)), "mask of layer 0 is 48 x 40"),
        (EditPlan(Background(PICTURE), (Layer(BOX), Layer(np.ones((40, 48, 3), bool)))), "mask of layer 1 has shape"),
        (EditPlan(Background(PICTURE, np.ones((4, 4), bool))), "remove_mask is 4 x 4"),
        (EditPlan(Background(PICTURE, BOX, np.ones((4, 4), bool))), "refine_mask is 4 x 4"),
    ],
)
def test_what_a_decomposition_refuses(plan: EditPlan, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decompose(plan, (32, 32), (16, 16))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"mask_time": (0, 51)}, r"mask_time=\(0, 51\) must rise and lie inside 0..50"),
        ({"blend_time": (-1, 5)}, "blend_time"),
        ({"refine_time": (9, 5)}, "refine_time"),
        ({"prox": "l2"}, "prox='l2'"),
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"dilate_radius": -1}, "dilate_radius=-1"),
    ],
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DesignEditSettings(**options)


def test_windows_keep_their_share_of_the_steps() -> None:
    authors, fewer = DesignEditSettings(), DesignEditSettings(steps=10)
    assert (authors.mask_time, authors.blend_time, authors.refine_time) == ((0, 40), (0, 41), (0, 25))
    assert (authors.mask_steps, authors.refine_steps, authors.blend_steps) == (range(1, 40), range(1, 26), range(42))
    assert (fewer.mask_time, fewer.blend_time, fewer.refine_time) == ((0, 8), (0, 8), (0, 5))


def test_what_an_editor_refuses() -> None:
    edit = editor()
    with pytest.raises(ValueError, match="swap, second object: the mask has no foreground"):
        edit.swap(PICTURE, BOX, np.zeros((40, 48), bool))
    with pytest.raises(ValueError, match="invert the picture again"):
        edit.remove(PICTURE, BOX, trajectory=editor(steps=4).invert(PICTURE))
    with pytest.raises(ValueError, match=r"the trajectory has latents \(4, 8, 8\), the edit \(4, 16, 16\)"):
        edit.remove(PICTURE, BOX, trajectory=editor(size=16).invert(PICTURE))
    late = DesignEdit(edit.host.pipeline, DesignEditSettings(steps=STEPS, blend_time=(0, STEPS)))
    late.remove(PICTURE, BOX)
    with pytest.raises(ValueError, match="never be pasted"):
        late.move(PICTURE, BOX, 0.2)
    for size in (31, (32, 33)):
        with pytest.raises(ValueError, match="multiple of 2 pixels"):
            editor(size=size)
    with pytest.raises(TypeError, match="not supported; give a StableDiffusionXLPipeline"):
        DesignEdit(edit.host.unet)
    edit.host.pipeline.scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="supported: DDIMScheduler"):
        DesignEdit(edit.host.pipeline)

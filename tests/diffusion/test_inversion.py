"""DDIM inversion: the same as diffusers' own, exact where the noise is known, and kept in a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from heed.diffusion.denoise import Conditioning, Denoiser, classifier_free, denoise
from heed.diffusion.inversion import Trajectory, ddim, invert, invertible, picture_key

diffusers = pytest.importorskip("diffusers")
SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
NOTHING = Conditioning(torch.zeros(2, 1, 1))


class Field:
    """In the place of a UNet: what it predicts is a function of place and time."""

    dtype = torch.float32

    def __init__(self, constant: bool = False) -> None:
        self.constant = constant

    def __call__(self, z: Tensor, t: int, **_: Any) -> tuple[Tensor]:
        return (torch.full_like(z, 0.3) if self.constant else torch.sin(z + t / 300),)


def denoiser(**options: Any) -> Denoiser:
    return Denoiser(Field(**options))


@pytest.mark.parametrize("steps", [50, 10, 7])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to_one", [False, True])
def test_equals_the_inverse_scheduler_of_diffusers(steps: int, kind: str, to_one: bool) -> None:
    if to_one and kind == "sample":
        pytest.skip("diffusers' inverse divides 0 by 0 there")
    settings = SETTINGS | {"prediction_type": kind, "set_alpha_to_one": to_one}
    clean, field = torch.randn(2, 4, 3, 5), Field()
    path = invert(denoiser(), invertible(diffusers.DDIMScheduler(**settings), steps), clean, NOTHING)
    inverse, z = diffusers.DDIMInverseScheduler(**settings), clean
    inverse.set_timesteps(steps)
    assert path.shape == (steps + 1, 2, 4, 3, 5)
    for t, want in zip(inverse.timesteps, path[1:], strict=True):
        z = inverse.step(field(z, int(t))[0], t, z).prev_sample
        torch.testing.assert_close(z, want, rtol=1e-5, atol=1e-5)


def test_a_field_that_does_not_depend_on_the_latents_leads_exactly_back() -> None:
    scheduler = invertible(diffusers.DDIMScheduler(**SETTINGS, set_alpha_to_one=False), 20)
    clean = torch.randn(2, 4, 3, 5)
    path = invert(denoiser(constant=True), scheduler, clean, NOTHING)
    reached = []
    back = denoise(
        denoiser(constant=True),
        scheduler,
        path[-1],
        NOTHING,
        NOTHING,
        guide=classifier_free(7.5),
        after=lambda z, step, t: reached.append(z) or z,
    )
    torch.testing.assert_close(back, clean, rtol=1e-4, atol=1e-4)
    for step, z in enumerate(reached):
        torch.testing.assert_close(z, path[-2 - step], rtol=1e-4, atol=1e-4)


def test_any_scheduler_becomes_an_invertible_one() -> None:
    euler = diffusers.EulerDiscreteScheduler(**{k: v for k, v in SETTINGS.items() if k != "clip_sample"})
    made = invertible(ddim(euler), 50)
    assert made.timesteps.tolist() == list(range(980, -1, -20))
    torch.testing.assert_close(made.alphas_cumprod, euler.alphas_cumprod)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            diffusers.EulerAncestralDiscreteScheduler(),
            "EulerAncestralDiscreteScheduler cannot be inverted; supported: DDIM",
        ),
        (diffusers.DPMSolverMultistepScheduler(), "supported: DDIMScheduler"),
        (diffusers.DDIMScheduler(), "with clip_sample=True"),
        (diffusers.DDIMScheduler(clip_sample=False, thresholding=True), "with thresholding=True"),
    ],
)
def test_other_schedulers_are_refused(scheduler: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        invertible(scheduler, 10)


def test_the_pipelines_scheduler_is_not_touched() -> None:
    scheduler = diffusers.DDIMScheduler(**SETTINGS)
    invertible(scheduler, 10)
    assert scheduler.num_inference_steps is None
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps={steps}"):
            invertible(scheduler, steps)


def trajectory() -> Trajectory:
    return Trajectory(torch.randn(4, 2, 4, 3, 5), ("a", "b"), (666, 333, 0), "a cat")


def test_a_trajectory_survives_a_file(tmp_path: Path) -> None:
    kept = trajectory()
    kept.save(tmp_path / "kept.safetensors")
    read = Trajectory.load(tmp_path / "kept.safetensors")
    assert torch.equal(read.latents, kept.latents)
    assert (read.keys, read.timesteps, read.prompt) == (kept.keys, kept.timesteps, kept.prompt)


def test_trajectories_are_selected_and_joined() -> None:
    kept = trajectory()
    assert torch.equal(kept.select(["b", "a", "b"]).latents, kept.latents[:, [1, 0, 1]])
    both = kept.joined(Trajectory(torch.zeros(4, 1, 4, 3, 5), ("c",), kept.timesteps))
    assert both.keys == ("a", "b", "c")
    assert both.latents.shape[1] == 3


def test_what_is_no_trajectory_is_refused(tmp_path: Path) -> None:
    kept = trajectory()
    with pytest.raises(ValueError, match=r"3 steps has 4 latents.*invert the picture again"):
        Trajectory(kept.latents[:3], kept.keys, kept.timesteps)
    with pytest.raises(ValueError, match="2 pictures are inverted but 1 are named"):
        Trajectory(kept.latents, ("a",), kept.timesteps)
    with pytest.raises(FileNotFoundError, match="no trajectory"):
        Trajectory.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="holds no trajectory"):
        Trajectory.load(tmp_path / "text")


def test_keys_tell_pictures_apart() -> None:
    black, white = torch.zeros(4, 6, 3).byte().numpy(), torch.full((4, 6, 3), 255).byte().numpy()
    assert picture_key(black) == picture_key(black.copy())
    assert len({picture_key(black), picture_key(white), picture_key(black.reshape(6, 4, 3))}) == 3


def test_rows_are_checked() -> None:
    with pytest.raises(ValueError, match="rows_per_pass=0"):
        Denoiser(SimpleNamespace(), 0)
    scheduler = invertible(diffusers.DDIMScheduler(**SETTINGS), 2)
    with pytest.raises(ValueError, match="3 rows of latents need as many of conditioning, not 2 and 2"):
        denoise(denoiser(), scheduler, torch.zeros(3, 4, 2, 2), NOTHING, NOTHING, guide=classifier_free(1))

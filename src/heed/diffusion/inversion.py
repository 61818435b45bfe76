"""DDIM inversion with the whole trajectory kept: from the latents of a picture to the noise that makes it again.

    a_s, a_t = alphas_cumprod at s = t - 1000 / T and at t,   for t from the last timestep back to the first
    z_0 = (z - sqrt(1 - a_s) e) / sqrt(a_s)     e = eps(z, t, cond)                                    z (B, C, h, w)
    z   <- sqrt(a_t) z_0 + sqrt(1 - a_t) e

Each is the scheduler's step read backwards, with the noise that is predicted before the step instead of after it.
Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv 2010.02502.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save
from torch import Tensor

from heed.checkpoint import write_atomically
from heed.diffusion.denoise import Conditioning, Denoiser


def ddim(scheduler: Any) -> Any:
    """A DDIMScheduler that inverts, with the noise schedule and the prediction type of any diffusers scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        scheduler.config,
        clip_sample=False,
        thresholding=False,
        set_alpha_to_one=False,
        steps_offset=0,
        timestep_spacing="leading",
    )


def invertible(scheduler: Any, steps: int) -> Any:
    """A copy of the scheduler with `steps` timesteps set.

    Raises:
        ValueError: a scheduler without an inverse, or a number of steps it cannot take.
    """
    from diffusers import DDIMScheduler

    config = scheduler.config
    if not isinstance(scheduler, DDIMScheduler) or config.clip_sample or config.thresholding:
        said = type(scheduler).__name__
        for switch in ("clip_sample", "thresholding"):
            said += f" with {switch}=True" if getattr(config, switch, False) else ""
        raise ValueError(
            f"{said} cannot be inverted; supported: DDIMScheduler with clip_sample=False and thresholding=False. "
            "heed.diffusion.inversion.ddim(pipeline.scheduler) makes one with the same noise schedule"
        )
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"steps={steps} must lie in 1..{config.num_train_timesteps}")
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    return own


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    scheduler: Any,
    latents: Float[Tensor, "B C h w"],
    conditioning: Conditioning,
    tick: Callable[[], object] = lambda: None,
) -> Float[Tensor, "T1 B C h w"]:
    """The trajectory of B pictures, clean latents first, the noisiest last: (T + 1, B, C, h, w) float32.

    Args:
        denoiser: the UNet.
        scheduler: from `invertible`.
        latents: (B, C, h, w) float32, clean.
        conditioning: B rows; no guidance is used.
        tick: called after every step.
    """
    alphas, stride = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    path = [latents]
    for timestep in reversed(scheduler.timesteps.tolist()):
        before = timestep - stride
        a_s, a_t = (alphas[before] if before >= 0 else scheduler.final_alpha_cumprod), alphas[timestep]
        z = path[-1]
        output = denoiser(z, timestep, conditioning)
        clean, noise = _clean_and_noise(scheduler.config.prediction_type, output, z, float(a_s))
        path.append(a_t**0.5 * clean + (1 - a_t) ** 0.5 * noise)
        tick()
    return torch.stack(path)


def _clean_and_noise(kind: str, output: Tensor, z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """z = sqrt(alpha) clean + sqrt(1 - alpha) noise, from what the UNet predicts."""
    signal, spread = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "epsilon":
        return (z - spread * output) / signal, output
    if kind == "v_prediction":
        return signal * z - spread * output, signal * output + spread * z
    if kind == "sample":
        # At alpha = 1 there is no noise to speak of.
        return output, (z - signal * output) / spread if spread else torch.zeros_like(z)
    raise ValueError(f"prediction_type={kind!r} is unknown; known: epsilon, sample, v_prediction")


def picture_key(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    """What a trajectory recognises a picture by: its size and a digest of its pixels."""
    digest = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
    return f"{picture.shape[0]}x{picture.shape[1]}-{digest}"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Inverted pictures, kept for a second edit.

    Args:
        latents: (T + 1, B, C, h, w) float32, clean first.
        keys: B names of the pictures, from `picture_key`.
        timesteps: the T timesteps, from noisy to clean.
        prompt: the text the inversion was conditioned on.

    Raises:
        ValueError: latents that are not T + 1 for T timesteps, or not one per picture.
    """

    latents: Float[Tensor, "T1 B C h w"]
    keys: tuple[str, ...]
    timesteps: tuple[int, ...]
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.latents.ndim != 5 or len(self.latents) != self.steps + 1:
            raise ValueError(
                f"a trajectory of {self.steps} steps has {self.steps + 1} latents (T + 1, B, C, h, w), "
                f"not {tuple(self.latents.shape)}; invert the picture again"
            )
        if self.latents.shape[1] != len(self.keys):
            raise ValueError(f"{self.latents.shape[1]} pictures are inverted but {len(self.keys)} are named")

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def select(self, keys: Sequence[str]) -> Trajectory:
        """These pictures, in this order."""
        at = [self.keys.index(key) for key in keys]
        return Trajectory(self.latents[:, at], tuple(keys), self.timesteps, self.prompt)

    def joined(self, other: Trajectory) -> Trajectory:
        """The pictures of both."""
        latents = torch.cat([self.latents, other.latents.to(self.latents.device)], 1)
        return Trajectory(latents, self.keys + other.keys, self.timesteps, self.prompt)

    def save(self, path: str | Path) -> None:
        """Write it as safetensors."""
        about = {"keys": self.keys, "timesteps": self.timesteps, "prompt": self.prompt}
        content = {"latents": self.latents.cpu().contiguous()}
        write_atomically(Path(path), save(content, metadata={"heed": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` has written.

        Raises:
            ValueError: another file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no trajectory at {path}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["heed"])
            latents = load_file(path)["latents"]
            return cls(latents, tuple(about["keys"]), tuple(about["timesteps"]), about["prompt"])
        except (KeyError, TypeError, safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no trajectory; write one with Trajectory.save") from error

"""The diffusers pipeline an editor works in: pictures to latents and back, prompts to conditioning.

    z = scaling_factor * mean of q(z | 2 x / 255 - 1)        x (B, H, W, 3) uint8 -> z (B, 4, H/8, W/8) float32

The VAE runs in float32 whatever its dtype, as SDXL's needs; afterwards it has its own dtype again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from heed.diffusion.denoise import Conditioning
from heed.diffusion.masks import Size
from heed.errors import MissingExtra, unknown


class Host:
    """What editors need of StableDiffusionXLPipeline and StableDiffusionPipeline (SD 1.x, 2.x).

    Args:
        pipeline: a diffusers pipeline of one of the two classes.
        size: height and width in pixels that pictures are edited at, or one number for both; None for what the UNet was
            trained at (1024 for SDXL).

    Raises:
        TypeError: another pipeline.
        ValueError: a size that is no multiple of the VAE's factor, or a UNet whose input is not the VAE's latents.
    """

    def __init__(self, pipeline: Any, size: int | Size | None = None) -> None:
        try:
            from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
        except ImportError as error:
            raise MissingExtra("diffusers", "diffusion") from error
        if not isinstance(pipeline, StableDiffusionXLPipeline | StableDiffusionPipeline):
            raise TypeError(
                f"{type(pipeline).__name__} is not supported; give a StableDiffusionXLPipeline or a "
                "StableDiffusionPipeline, which .from_pipe(...) makes of the same parts"
            )
        self.pipeline: Any = pipeline
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
        channels = self.vae.config.latent_channels
        if self.unet.config.in_channels != channels:
            raise ValueError(
                f"the UNet takes {self.unet.config.in_channels} channels, the VAE gives {channels}: "
                "use the text-to-image UNet, not one for inpainting"
            )
        self.factor = pipeline.vae_scale_factor
        trained: int = self.unet.config.sample_size * self.factor
        self.size: Size = size if isinstance(size, tuple) else (size or trained, size or trained)
        if any(side < self.factor or side % self.factor for side in self.size):
            raise ValueError(f"size={self.size} must be a multiple of {self.factor} pixels along both axes")

    @property
    def latent_size(self) -> Size:
        return self.size[0] // self.factor, self.size[1] // self.factor

    @property
    def device(self) -> torch.device:
        return self.pipeline._execution_device

    @torch.no_grad()
    def encode(self, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Tensor, "B C h w"]:
        """Latents, the mean of the posterior and not a draw, one picture at a time for memory."""
        latents = []
        with self._float32_vae():
            for picture in pictures:
                x = torch.from_numpy(picture.copy()).to(self.device).float().permute(2, 0, 1)[None] / 127.5 - 1
                latents.append(self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """Pictures (H, W, 3) uint8."""
        pictures = []
        with self._float32_vae():
            for z in latents.float().split(1):
                x = self.vae.decode(z / self.vae.config.scaling_factor, return_dict=False)[0]
                x = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
                pictures.append(x[0].permute(1, 2, 0).cpu().numpy())
        return pictures

    @contextmanager
    def _float32_vae(self) -> Iterator[None]:
        dtype = self.vae.dtype
        if dtype == torch.float32:
            yield
            return
        self.vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            self.vae.to(dtype=dtype)

    @torch.no_grad()
    def embed(self, prompt: str) -> Conditioning:
        """One row of conditioning for a prompt."""
        if not self.is_xl:
            return Conditioning(self.pipeline.encode_prompt(prompt, self.device, 1, False)[0])
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        time_ids = self.pipeline._get_add_time_ids(
            self.size,
            (0, 0),
            self.size,
            dtype=embeds.dtype,
            text_encoder_projection_dim=self.pipeline.text_encoder_2.config.projection_dim,
        )
        return Conditioning(embeds, pooled, time_ids.to(self.device))


def load_pipeline(model: str, device: str = "auto", dtype: str = "auto") -> Any:
    """A pipeline by name, ready to edit with.

    Args:
        model: a local folder or the id of a repository on the Hub (safetensors only), or "tiny" for random weights whose
            latents are pixels, which show the mechanics without a download.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
        dtype: of the UNet and the text encoders: "auto" (float16 on a GPU, float32 on a CPU), "float32", "float16" or
            "bfloat16".

    Raises:
        ValueError: an unknown dtype.
        OSError: a model that is not there or holds no safetensors.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusion") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    dtypes["auto"] = torch.float32 if device == "cpu" else torch.float16
    if dtype not in dtypes:
        raise ValueError(unknown("dtype", dtype, dtypes))
    if model == "tiny":
        from heed.diffusion.tiny import tiny_pipeline

        return tiny_pipeline(pixels=True, latent_size=64).to(device)
    return DiffusionPipeline.from_pretrained(model, torch_dtype=dtypes[dtype], use_safetensors=True).to(device)

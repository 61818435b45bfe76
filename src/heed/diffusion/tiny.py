"""Pipelines too small to know anything: random weights made on the spot, to try an editor's mechanics without a download.

A random UNet denoises to nothing in particular. What editing does by arithmetic (rows, blending, shifting, order) is the
same as with trained weights; what a trained network would paint into a hole is not there.
"""

from __future__ import annotations

import math
import string
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.errors import MissingExtra, unknown

_TOKENS = 8  # of a prompt
_PIXEL_NOISE = 0.06


class PixelVAE(nn.Module):
    """Latents that are the picture itself, so that one can watch them: red, green, blue and their mean, `factor` smaller.

    Stands in for diffusers' AutoencoderKL.

    Args:
        factor: a power of two, pixels per latent cell along an axis.
    """

    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        levels = int(math.log2(factor)) + 1
        if factor < 1 or 2 ** (levels - 1) != factor:
            raise ValueError(f"factor={factor} must be a power of two")
        self.factor = factor
        self.config = SimpleNamespace(scaling_factor=1.0, latent_channels=4, block_out_channels=(4,) * levels)
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.gain.dtype

    @property
    def device(self) -> torch.device:
        return self.gain.device

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> SimpleNamespace:
        small = F.avg_pool2d(x, self.factor) * self.gain
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.cat([small, small.mean(1, keepdim=True)], 1)))

    def decode(self, z: Float[Tensor, "B 4 h w"], return_dict: bool = False) -> tuple[Float[Tensor, "B 3 H W"]]:
        return (F.interpolate(z[:, :3], scale_factor=self.factor, mode="nearest"),)


def tiny_pipeline(
    kind: Literal["sdxl", "sd"] = "sdxl", *, pixels: bool = False, latent_size: int = 16, seed: int = 0
) -> Any:
    """A StableDiffusionXLPipeline or StableDiffusionPipeline with random weights, in eval mode on the CPU.

    Args:
        kind: "sdxl" or "sd".
        pixels: latents are pixels (`PixelVAE`, 4 pixels per cell); otherwise a random AutoencoderKL, 2 per cell.
        latent_size: side of the latents the UNet says it was trained at; a multiple of 4.
        seed: of the weights.

    Raises:
        ValueError: an unknown kind, or a size that is no multiple of 4.
    """
    if kind not in ("sdxl", "sd"):
        raise ValueError(unknown("kind", kind, ("sdxl", "sd")))
    if latent_size < 4 or latent_size % 4:
        raise ValueError(f"latent_size={latent_size} must be a multiple of 4")
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusion") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        is_xl = kind == "sdxl"
        parts: dict[str, Any] = {
            "unet": _unet(is_xl, latent_size, deep=pixels),
            "vae": PixelVAE() if pixels else _vae(),
            "scheduler": diffusers.DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=0 if is_xl else 1,  # as their released pipelines have it
            ),
            "tokenizer": _tokenizer(),
        }
        if not is_xl:
            rest: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, text_encoder=_text_encoder(12), **rest)
        else:
            texts: dict[str, Any] = {"text_encoder": _text_encoder(6), "text_encoder_2": _text_encoder(6, projected=8)}
            pipeline = diffusers.StableDiffusionXLPipeline(
                **parts, **texts, tokenizer_2=_tokenizer(), add_watermarker=False
            )
    if pixels:  # little noise is predicted, so that the inversion of a picture leads back to it
        pipeline.unet.conv_out.weight.data *= _PIXEL_NOISE
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def _unet(is_xl: bool, side: int, deep: bool) -> Any:
    from diffusers import UNet2DConditionModel

    plain = 2 if deep else 1  # blocks without attention before it; pixels need smaller maps to attend on
    config: dict[str, Any] = {
        "sample_size": side,
        "block_out_channels": (8,) * plain + (16,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        "attention_head_dim": (2,) * plain + (4,),
        "transformer_layers_per_block": (1,) * plain + (2,),
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
    }
    text_time = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**config | (text_time if is_xl else {}))


def _vae() -> Any:
    from diffusers import AutoencoderKL

    levels: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(**levels, latent_channels=4, norm_num_groups=2)


def _vocabulary() -> dict[str, int]:
    """Letters and digits, inside and at the end of a word."""
    letters = [letter + end for letter in string.ascii_lowercase + string.digits for end in ("", "</w>")]
    return {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=_TOKENS)


def _text_encoder(width: int, projected: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_TOKENS,
        projection_dim=projected or width,
        bos_token_id=words["<|startoftext|>"],
        eos_token_id=words["<|endoftext|>"],
        pad_token_id=words["<|endoftext|>"],
    )
    return CLIPTextModel(config) if projected is None else CLIPTextModelWithProjection(config)

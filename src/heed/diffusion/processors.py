"""Attention processors that act in a window of steps, and putting them into a UNet for as long as an edit lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heed.diffusion.denoise import Position
from heed.engine.attend import attend
from heed.engine.patterns import Full


class StepWindowProcessor:
    """Self-attention of a diffusers `Attention`; inside the window a subclass changes queries, keys and values.

    Args:
        position: where the denoising loop stands, see `heed.diffusion.denoise.Denoiser.position`.
        steps: denoising steps, from 0, at which `change` is called.
    """

    def __init__(self, position: Position, steps: range) -> None:
        self.position = position
        self.steps = steps

    def change(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, tokens, width) of the rows `position.rows` -> what attends instead."""
        raise NotImplementedError

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "B N C"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "B N C"]:
        """As diffusers calls it.

        Raises:
            ValueError: cross-attention, a mask, fused projections, norms of the attention's own, or a batch that is not
                the one the position tells of.
        """
        for what, is_so in (
            ("text to attend to (put it on self-attention, the attn1 modules)", encoder_hidden_states is not None),
            ("attention_mask", attention_mask is not None),
            ("fused projections (call unet.unfuse_qkv_projections() first)", getattr(attn, "fused_projections", False)),
            ("a norm inside the attention", attn.group_norm is not None or attn.spatial_norm is not None),
        ):
            if is_so:
                raise ValueError(f"{type(self).__name__} does not support {what}")
        if len(self.position.rows) != len(hidden_states):
            raise ValueError(f"{len(hidden_states)} rows given where the position tells of {len(self.position.rows)}")
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if self.position.step in self.steps:
            q, k, v = self.change(q, k, v)
        out = attend(q, k, v, Full(), scale=attn.scale).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


@contextmanager
def self_attention(unet: Any, processor: Callable[[], Any]) -> Iterator[None]:
    """Every self-attention of the UNet's transformer blocks under a processor; afterwards the UNet is what it was.

    Args:
        unet: UNet2DConditionModel.
        processor: makes the processor of one module.
    """
    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: processor() if ".attn1." in name else old for name, old in before.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def layer_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a layer's tokens, from the grid of the latents, which UNets halve (rounding up).

    Args:
        tokens: of the layer.
        grid: height and width of the latents; None where tokens form a square.

    Raises:
        ValueError: tokens that are no square and no grid, or that no halving of the grid has.
    """
    if grid is None:
        side = int(tokens**0.5 + 0.5)
        if side * side != tokens:
            raise ValueError(f"{tokens} tokens form no square; give grid=(height, width) of the latents")
        return side, side
    rows, columns = grid
    while rows * columns > tokens:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise ValueError(f"{tokens} tokens are no halving of grid={grid}; give height and width of the latents")
    return rows, columns


def resized_mask(mask: Float[Tensor, "1 1 h w"], size: tuple[int, int]) -> Float[Tensor, "1 1 rows columns"]:
    """A latent mask at the size of a layer, bilinear and soft."""
    return torch.nn.functional.interpolate(mask, size, mode="bilinear", align_corners=False)

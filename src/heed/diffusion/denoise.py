"""The denoising loop that editors share: rows of latents, guided step by step, with hooks for what an editor changes.

    eps_u, eps_c = eps(z, t, uncond), eps(z, t, cond)       z (R, C, h, w), R rows: source, background, canvas, ...
    z <- after(DDIM step(guide(eps_u, eps_c), z), i, t)     for i = 0 .. T-1, t = timesteps[i]

The UNet sees 2R rows, the unconditional ones first, as in diffusers; `rows_per_pass` cuts them into passes for memory.
`Position` tells attention processors at which step the loop stands and which of the 2R rows a pass holds, so that no
processor counts its own calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Guide = Callable[[Tensor, Tensor, int], Tensor]  # eps_u, eps_c (R, C, h, w) and the timestep -> eps
After = Callable[[Tensor, int, int], Tensor]  # latents after the scheduler's step, the step i, the timestep -> latents


@dataclass
class Position:
    """Where a loop stands: the step, from 0, and the rows of the doubled batch that the UNet is being given."""

    step: int = 0
    rows: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a UNet is told besides the latents, for B rows.

    Args:
        embeds: (B, tokens, width) of the prompt.
        pooled: (B, width), of SDXL.
        time_ids: (B, 6) sizes and crop, of SDXL.
    """

    embeds: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B P"] | None = None
    time_ids: Tensor | None = None

    def rows(self, index: Sequence[int]) -> Conditioning:
        """These rows, in this order; a row may come more than once."""
        at = list(index)
        return Conditioning(*(None if x is None else x[at] for x in self._parts()))  # type: ignore[arg-type]

    def followed_by(self, other: Conditioning) -> Conditioning:
        """The rows of both."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return Conditioning(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.embeds, self.pooled, self.time_ids

    def __len__(self) -> int:
        return len(self.embeds)


class Denoiser:
    """The noise a diffusers UNet sees, in passes of `rows_per_pass` rows.

    Args:
        unet: UNet2DConditionModel.
        rows_per_pass: rows of latents in one call of the UNet; None for all at once. Fewer need less memory and give
            the same numbers up to rounding.

    Raises:
        ValueError: rows_per_pass < 1.
    """

    def __init__(self, unet: Any, rows_per_pass: int | None = None) -> None:
        if rows_per_pass is not None and rows_per_pass < 1:
            raise ValueError(f"rows_per_pass={rows_per_pass} must be 1 or more, or None for all rows at once")
        self.unet = unet
        self.rows_per_pass = rows_per_pass
        self.position = Position()

    def __call__(
        self, latents: Float[Tensor, "B C h w"], timestep: int, conditioning: Conditioning, step: int = 0
    ) -> Float[Tensor, "B C h w"]:
        """(B, C, h, w) float32 -> (B, C, h, w) float32; the UNet runs in its own dtype."""
        self.position.step = step
        rows, passes = range(len(latents)), []
        for start in range(0, len(latents), self.rows_per_pass or len(latents)):
            self.position.rows = rows[start : start + (self.rows_per_pass or len(latents))]
            passes.append(self._pass(latents[list(self.position.rows)], timestep, conditioning))
        return torch.cat(passes)

    def _pass(self, latents: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        part, dtype = conditioning.rows(self.position.rows), self.unet.dtype
        added = None
        if part.pooled is not None and part.time_ids is not None:
            added = {"text_embeds": part.pooled.to(dtype), "time_ids": part.time_ids}
        (noise,) = self.unet(
            latents.to(dtype),
            timestep,
            encoder_hidden_states=part.embeds.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return noise.float()


def classifier_free(scale: float) -> Guide:
    """eps_u + scale (eps_c - eps_u)"""
    return lambda uncond, cond, timestep: uncond + scale * (cond - uncond)


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    scheduler: Any,
    latents: Float[Tensor, "R C h w"],
    uncond: Conditioning,
    cond: Conditioning,
    *,
    guide: Guide,
    after: After = lambda latents, step, timestep: latents,
    tick: Callable[[], object] = lambda: None,
) -> Float[Tensor, "R C h w"]:
    """All rows from the noisiest latents to clean ones.

    Args:
        denoiser: the UNet.
        scheduler: diffusers scheduler whose timesteps are set; its `step` is deterministic.
        latents: (R, C, h, w) float32, at the first timestep.
        uncond, cond: R rows each.
        guide: joins the two predictions.
        after: changes the latents after every step.
        tick: called after every step, for a progress bar.

    Raises:
        ValueError: conditioning of another number of rows.
    """
    rows = len(latents)
    if len(uncond) != rows or len(cond) != rows:
        raise ValueError(f"{rows} rows of latents need as many of conditioning, not {len(uncond)} and {len(cond)}")
    both = uncond.followed_by(cond)
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        noise = denoiser(latents.repeat(2, 1, 1, 1), timestep, both, step)
        noise = guide(*noise.chunk(2), timestep)
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        latents = after(latents, step, timestep)
        tick()
    return latents

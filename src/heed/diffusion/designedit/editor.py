"""DesignEdit over diffusers' Stable Diffusion pipelines: invert, denoise the rows of a plan together, decode the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from heed.catalogue import provides
from heed.diffusion.denoise import Denoiser, denoise
from heed.diffusion.designedit import operations
from heed.diffusion.designedit.fusion import LayerFusion, ProximalGuidance
from heed.diffusion.designedit.keymask import KeyMaskedAttnProcessor
from heed.diffusion.designedit.layers import Decomposition, decompose
from heed.diffusion.designedit.plan import Background, EditPlan, Layer
from heed.diffusion.designedit.settings import DesignEditSettings
from heed.diffusion.host import Host
from heed.diffusion.inversion import Trajectory, invert, invertible, picture_key
from heed.diffusion.masks import Mask, Size
from heed.diffusion.pictures import Flip, Picture, read_picture, resize_picture
from heed.diffusion.processors import self_attention

OnStep = Callable[[int, Tensor], object]


@dataclass(frozen=True, eq=False)
class Edited:
    """What an edit gives.

    Args:
        image: the result, at the size of the picture that was given.
        latents: (R, C, h, w) of all rows: source, background, canvas, layers.
        trajectory: the inverted pictures, to be given to the next edit of the same ones.
        decomposition: masks, shifts and pictures that were used.
    """

    image: Image.Image
    latents: Float[Tensor, "R C h w"]
    trajectory: Trajectory
    decomposition: Decomposition


@provides("01-designedit")
class DesignEdit:
    """Edits pictures with a StableDiffusionXLPipeline or a StableDiffusionPipeline, without training.

        pipeline = StableDiffusionXLPipeline.from_pretrained(...).to("cuda")
        edit = DesignEdit(pipeline, scheduler=ddim(pipeline.scheduler))
        first = edit.move("cat.png", Box(100, 80, 300, 290), dx=0.2)
        second = edit.remove("cat.png", Box(100, 80, 300, 290), trajectory=first.trajectory)

    Nothing is random: the same call gives the same picture. Pictures are stretched to one size for the edit and the
    result is stretched back. The pipeline is what it was after every call.

    Args:
        pipeline: the diffusers pipeline; its progress bar, offloading and VAE tiling are used as they are set.
        settings: the numbers of the method.
        size: pixels (one number, or height and width) the edit runs at; None for what the UNet was trained at.
        scheduler: a DDIMScheduler; None for the pipeline's.
        rows_per_pass: rows of latents in one call of the UNet (an edit with F layers has 2 (3 + F)); None for all.

    Raises:
        TypeError: another pipeline.
        ValueError: a scheduler that cannot be inverted, settings or a size that do not fit.
    """

    def __init__(
        self,
        pipeline: Any,
        settings: DesignEditSettings | None = None,
        *,
        size: int | Size | None = None,
        scheduler: Any = None,
        rows_per_pass: int | None = None,
    ) -> None:
        self.host = Host(pipeline, size)
        self.settings = settings or DesignEditSettings()
        self.scheduler = invertible(scheduler or pipeline.scheduler, self.settings.steps)
        self.rows_per_pass = rows_per_pass
        Denoiser(self.host.unet, rows_per_pass)  # says what is wrong now rather than at the first edit

    # The operations: each is one plan.

    def remove(
        self, image: Picture, mask: Mask | Sequence[Mask], *, refine_mask: Mask | None = None, **options: Any
    ) -> Edited:
        """Remove what is under one mask or several. `options` (prompt, trajectory, on_step) as in `run`, here and below."""
        return self.run(operations.remove(image, _several(mask), refine_mask), **options)

    def move(
        self,
        image: Picture,
        mask: Mask,
        dx: float = 0.0,
        dy: float = 0.0,
        *,
        scale: float = 1.0,
        flip: Flip | None = None,
        refine_mask: Mask | None = None,
        **options: Any,
    ) -> Edited:
        """Move an object right by dx of the width and up by dy of the height; also resized and flipped if asked for."""
        return self.run(operations.move(image, mask, dx, dy, scale, flip, refine_mask), **options)

    def resize(self, image: Picture, mask: Mask, scale: float, **options: Any) -> Edited:
        """Resize an object about its centroid."""
        return self.move(image, mask, scale=scale, **options)

    def flip(self, image: Picture, mask: Mask, flip: Flip = "left-right", **options: Any) -> Edited:
        """Mirror an object about its centroid."""
        return self.move(image, mask, flip=flip, **options)

    def copy(
        self,
        image: Picture,
        mask: Mask,
        dx: float = 0.0,
        dy: float = 0.0,
        *,
        scale: float = 1.0,
        flip: Flip | None = None,
        **options: Any,
    ) -> Edited:
        """Paste an object a second time; the first stays."""
        return self.run(operations.copy(image, mask, dx, dy, scale, flip), **options)

    def swap(self, image: Picture, first: Mask, second: Mask, **options: Any) -> Edited:
        """Exchange two objects: the centroid of each goes where the other's was."""
        return self.run(operations.swap(image, first, second), **options)

    def zoom_out(self, image: Picture, height_scale: float, width_scale: float | None = None, **options: Any) -> Edited:
        """Show the picture smaller, in surroundings that are made up; one scale counts for both axes."""
        return self.run(operations.zoom_out(image, height_scale, width_scale), **options)

    def pan(self, image: Picture, dx: float = 0.0, dy: float = 0.0, **options: Any) -> Edited:
        """Move the contents right by dx of the width and up by dy of the height and make up what they leave."""
        return self.run(operations.pan(image, dx, dy), **options)

    def compose(
        self,
        image: Picture,
        layers: Sequence[Layer],
        *,
        remove_mask: Mask | Sequence[Mask] | None = None,
        refine_mask: Mask | None = None,
        **options: Any,
    ) -> Edited:
        """Paste layers, from this picture or others, the lowest first; letters of a text are layers too."""
        removed = None if remove_mask is None else _several(remove_mask)
        return self.run(EditPlan(Background(image, removed, refine_mask), tuple(layers)), **options)

    # What they all come to.

    def invert(self, *images: Picture, prompt: str = "") -> Trajectory:
        """Invert pictures once, to edit them more than once (as they are: resized or flipped layers differ)."""
        return self._inverted([resize_picture(read_picture(image), self.host.size) for image in images], prompt)

    @torch.no_grad()
    def run(
        self,
        plan: EditPlan,
        *,
        prompt: str | None = None,
        trajectory: Trajectory | None = None,
        on_step: OnStep | None = None,
    ) -> Edited:
        """Carry out a plan.

        Args:
            plan: the instruction.
            prompt: describes the result; None for the prompt of the inversion, which is empty unless `invert` was told.
            trajectory: from `invert` or an earlier edit; pictures that are not in it are inverted first.
            on_step: called after every step with its number, from 1, and the latents (R, C, h, w) of all rows.

        Raises:
            ValueError: what `decompose` refuses, layers that would never be pasted (blend_time ends at the last step),
                or a trajectory of another size, number of steps or schedule.
        """
        parts = decompose(plan, self.host.size, self.host.latent_size, self.settings)
        if parts.layers and self.settings.blend_steps.stop > self.settings.steps:
            raise ValueError(
                f"blend_time={self.settings.blend_time} ends at the last of {self.settings.steps} steps, so the layers "
                f"would never be pasted; its end must be below {self.settings.steps}"
            )
        trajectory = self._completed(trajectory, parts.pictures, prompt)
        latents = self.denoise(parts, trajectory, prompt, on_step)
        picture = self.host.decode(latents[parts.output_row : parts.output_row + 1])[0]
        self.host.pipeline.maybe_free_model_hooks()
        image = Image.fromarray(resize_picture(picture, parts.original_size))
        return Edited(image, latents, trajectory, parts)

    @torch.no_grad()
    def denoise(
        self,
        parts: Decomposition,
        trajectory: Trajectory,
        prompt: str | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "R C h w"]:
        """All rows of a decomposition, from noise to clean latents; arguments as in `run`."""
        rows, device = len(parts.reference), self.host.device
        names = [picture_key(picture) for picture in parts.pictures]
        inverted = trajectory.select([names[i] for i in parts.reference]).latents.to(device)
        remove = parts.remove.to(device)
        refine = None if parts.refine is None else parts.refine.to(device)
        source = self.host.embed(trajectory.prompt)
        target = source if prompt in (None, trajectory.prompt) else self.host.embed(prompt)
        denoiser = Denoiser(self.host.unet, self.rows_per_pass)
        guidance = ProximalGuidance(self.settings, inverted, remove)
        fusion = LayerFusion(remove, self.settings.blend_steps, [m.to(device) for m in parts.layers], parts.shifts)

        def processor() -> KeyMaskedAttnProcessor:
            windows = self.settings.mask_steps, refine, self.settings.refine_steps
            return KeyMaskedAttnProcessor(denoiser.position, rows + 1, remove, *windows, self.host.latent_size)

        def after(z: Tensor, step: int, timestep: int) -> Tensor:
            z = fusion(guidance.pull(z, step, timestep), step + 1)
            if on_step is not None:
                on_step(step + 1, z)
            return z

        progress = self.host.pipeline.progress_bar(total=self.settings.steps)
        with self_attention(self.host.unet, processor), progress as bar:
            return denoise(
                denoiser,
                self.scheduler,
                inverted[-1] * self.scheduler.init_noise_sigma,
                source.rows([0] * rows),
                target.rows([0] * rows),
                guide=guidance.guide,
                after=after,
                tick=bar.update,
            )

    def _completed(
        self, trajectory: Trajectory | None, pictures: Sequence[np.ndarray], prompt: str | None
    ) -> Trajectory:
        """The trajectory with every picture in it."""
        if trajectory is None:
            return self._inverted(pictures, prompt or "")
        timesteps = tuple(self.scheduler.timesteps.tolist())
        if trajectory.timesteps != timesteps:
            raise ValueError(
                f"the trajectory has {trajectory.steps} steps at {_short(trajectory.timesteps)}, the edit "
                f"{len(timesteps)} at {_short(timesteps)}; invert the picture again"
            )
        shape = (self.host.unet.config.in_channels, *self.host.latent_size)
        if trajectory.latents.shape[2:] != shape:
            raise ValueError(f"the trajectory has latents {tuple(trajectory.latents.shape[2:])}, the edit {shape}")
        missing = [picture for picture in pictures if picture_key(picture) not in trajectory.keys]
        return trajectory.joined(self._inverted(missing, trajectory.prompt)) if missing else trajectory

    @torch.no_grad()
    def _inverted(self, pictures: Sequence[np.ndarray], prompt: str) -> Trajectory:
        """Each different picture once."""
        different = {picture_key(picture): picture for picture in pictures}
        latents = self.host.encode(list(different.values()))
        conditioning = self.host.embed(prompt).rows([0] * len(different))
        with self.host.pipeline.progress_bar(total=self.settings.steps) as bar:
            denoiser = Denoiser(self.host.unet, self.rows_per_pass)
            path = invert(denoiser, self.scheduler, latents, conditioning, bar.update)
        return Trajectory(path, tuple(different), tuple(self.scheduler.timesteps.tolist()), prompt)


def _several(mask: Mask | Sequence[Mask]) -> tuple[Mask, ...]:
    return tuple(mask) if isinstance(mask, list | tuple) else (mask,)  # type: ignore[arg-type]


def _short(timesteps: tuple[int, ...]) -> str:
    return f"timesteps {timesteps[0]}..{timesteps[-1]}"

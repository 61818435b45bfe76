"""DesignEdit: the time of key-masked attention, and what an edit costs and keeps, without trained weights.

    python benchmarks/designedit.py [--threads 1] [--repeats 7] [--out docs/benchmarks/designedit.json]

The attention is SDXL's at batch 4, 1,024 tokens, 640 channels, 10 heads: ordinary (diffusers' own processor), key-masked
by heed, and key-masked with the softmax written out as the authors' patch has it. The edits run on a tiny random SDXL
pipeline: calls of the UNet, and how far the background row is from the source row outside the mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from common import interleaved, options, report
from heed.diffusion.denoise import Position
from heed.diffusion.designedit import DesignEdit, DesignEditSettings, KeyMaskedAttnProcessor
from heed.diffusion.masks import Box
from heed.diffusion.processors import resized_mask
from heed.diffusion.tiny import tiny_pipeline

BATCH, SIDE, DIM, HEADS = 4, 32, 640, 10


class WrittenOut:
    """Key masking before the projection, logits and softmax as tensors."""

    def __init__(self, mask: Tensor) -> None:
        self.kept = 1 - resized_mask(mask, (SIDE, SIDE)).flatten()[:, None]

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        keys = hidden_states.clone()
        keys[-1] *= self.kept
        q, k, v = (
            attn.head_to_batch_dim(y) for y in (attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(hidden_states))
        )
        weights = (q @ k.transpose(1, 2) * attn.scale).softmax(-1)
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


def attention_rows(repeats: int) -> list[list[object]]:
    x, mask = torch.randn(BATCH, SIDE**2, DIM), (torch.rand(1, 1, 128, 128) > 0.7).float()
    attn = Attention(DIM, heads=HEADS, dim_head=DIM // HEADS, bias=False).eval()
    masked = KeyMaskedAttnProcessor(Position(1, range(BATCH)), BATCH - 1, mask, range(1, 40))
    processors = {"diffusers, no mask": AttnProcessor2_0(), "heed, key-masked": masked, "written out": WrittenOut(mask)}

    def call(processor: object) -> Callable[[], Tensor]:
        def run() -> Tensor:
            attn.set_processor(processor)  # type: ignore[arg-type]
            with torch.inference_mode():
                return attn(x)

        return run

    runs = {name: call(processor) for name, processor in processors.items()}
    torch.testing.assert_close(runs["heed, key-masked"](), runs["written out"](), rtol=1e-3, atol=1e-4)
    times = interleaved(runs, repeats=repeats)
    base = times["diffusers, no mask"]
    return [["attention", name, seconds * 1e3, seconds / base, "", ""] for name, seconds in times.items()]


def edit_rows() -> list[list[object]]:
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    edit, calls = DesignEdit(pipeline, DesignEditSettings()), []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    picture, box = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), Box(10, 10, 30, 30)
    runs = {
        "remove": lambda **o: edit.remove(picture, box, **o),
        "move": lambda **o: edit.move(picture, box, 0.3, **o),
        "resize": lambda **o: edit.resize(picture, box, 1.4, **o),
        "flip": lambda **o: edit.flip(picture, box, **o),
        "copy": lambda **o: edit.copy(picture, box, 0.3, **o),
        "swap": lambda **o: edit.swap(picture, box, Box(40, 40, 60, 60), **o),
        "zoom out": lambda **o: edit.zoom_out(picture, 0.7, **o),
        "pan": lambda **o: edit.pan(picture, 0.2, **o),
    }
    rows: list[list[object]] = []
    kept = edit.invert(picture)
    for name, run in runs.items():
        calls.clear()
        steps: list[Tensor] = []
        edited = run(on_step=lambda _, z, steps=steps: steps.append(z))
        fresh = len(calls)
        calls.clear()
        run(trajectory=kept)
        outside = edited.decomposition.remove[0].eq(0).expand_as(steps[0][0])
        blended = steps[: edit.settings.blend_steps.stop - 1]
        change = max((z[1] - z[0]).abs()[outside].max().item() for z in blended)
        rows.append(["edit", name, "", "", f"{fresh}, {len(calls)} with the inversion kept", change])
    return rows


def main() -> None:
    given = options(__doc__)
    columns = [
        "what",
        "which",
        "ms",
        "times diffusers'",
        "UNet calls at T = 50",
        "background - source outside, steps 1-41",
    ]
    title = f"DesignEdit: attention of {BATCH} x {SIDE**2} tokens, {DIM} channels; edits on a tiny random SDXL"
    report(title, columns, attention_rows(given.repeats) + edit_rows(), given.out)


if __name__ == "__main__":
    main()

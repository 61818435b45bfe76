"""Every editor of the room, over both kinds of pipelines: a new one adds a line to EDITORS."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heed.diffusion.designedit import DesignEdit, DesignEditSettings
from heed.diffusion.masks import Box
from heed.diffusion.tiny import tiny_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 4
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)


def designedit(pipeline: Any, rows_per_pass: int | None) -> Tensor:
    edit = DesignEdit(pipeline, DesignEditSettings(steps=STEPS), rows_per_pass=rows_per_pass)
    edited = edit.move(PICTURE, Box(8, 8, 24, 24), 0.3)
    assert edited.image.size == (48, 40)
    return edited.latents


# name -> what edits with (pipeline, rows_per_pass) and gives latents
EDITORS: dict[str, Callable[[Any, int | None], Tensor]] = {"01-designedit": designedit}


def quiet(kind: str, **options: Any) -> Any:
    pipeline = tiny_pipeline(kind, **options)  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
@pytest.mark.parametrize("name", EDITORS)
def test_an_edit_leaves_the_pipeline_as_it_was_and_repeats(name: str, kind: str) -> None:
    pipeline, edit = quiet(kind), EDITORS[name]
    weights = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    processors, scheduler = dict(pipeline.unet.attn_processors), dict(pipeline.scheduler.config)
    trainable = [p.requires_grad for p in pipeline.unet.parameters()]
    random = torch.get_rng_state()
    first = edit(pipeline, None)
    assert torch.equal(edit(pipeline, None), first)
    assert torch.isfinite(first).all()
    assert first.grad_fn is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[key]) for key, value in pipeline.unet.state_dict().items())
    assert [p.requires_grad for p in pipeline.unet.parameters()] == trainable
    assert pipeline.unet.attn_processors == processors
    assert dict(pipeline.scheduler.config) == scheduler


@pytest.mark.parametrize("name", EDITORS)
def test_passes_of_any_size_give_the_same(name: str) -> None:
    whole = EDITORS[name](quiet("sdxl"), None)
    for rows in (1, 3):
        torch.testing.assert_close(EDITORS[name](quiet("sdxl"), rows), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", EDITORS)
def test_an_error_inside_leaves_the_pipeline_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = quiet("sd")
    processors = dict(pipeline.unet.attn_processors)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(pipeline.unet), "forward", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        EDITORS[name](pipeline, None)
    assert pipeline.unet.attn_processors == processors


@pytest.mark.parametrize("name", EDITORS)
def test_half_precision_keeps_its_dtype(name: str) -> None:
    pipeline = quiet("sdxl").to(torch.bfloat16)
    assert EDITORS[name](pipeline, None).dtype == torch.float32
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("name", EDITORS)
def test_a_released_pipeline_from_a_folder(name: str, tmp_path: Any) -> None:
    """As diffusers saves and loads it, safetensors only, and without a network."""
    from heed.diffusion.host import load_pipeline

    pipeline = quiet("sdxl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(tmp_path, safe_serialization=True)
        loaded = load_pipeline(str(tmp_path), "cpu")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(EDITORS[name](loaded, None), EDITORS[name](pipeline, None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", EDITORS)
def test_on_a_gpu(name: str) -> None:
    cpu = EDITORS[name](quiet("sdxl"), None)
    gpu = EDITORS[name](quiet("sdxl").to("cuda"), None)
    assert gpu.is_cuda
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-2, atol=1e-2)

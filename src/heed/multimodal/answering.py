"""Asking any image-text model of transformers: loading it, putting images and questions together, reading its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heed.errors import MissingExtra
from heed.hosts.loading import load_pretrained


def load_model(source: str | Path, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """An image-text model and its processor.

    Args:
        source: a folder written by `save_pretrained`, or an id on the Hub.
        device: "auto" for the accelerator where there is one, or "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "float16", "bfloat16", or "auto": as saved on an accelerator, float32 on the CPU.

    Returns:
        The model in evaluation mode, and the processor with padding on the left.

    Raises:
        ValueError: nothing there that transformers can load as an image-text model, or an unknown dtype.
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise MissingExtra("transformers", "multimodal") from error
    model, processor = load_pretrained(
        source, AutoModelForImageTextToText, AutoProcessor, "an image-text model", device=device, dtype=dtype
    )
    if not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"model={str(source)!r} has no processor for images and text; save its processor into the folder"
        )
    processor.tokenizer.padding_side = "left"
    return model, processor


def write_prompt(processor: Any, text: str) -> str:
    """A question about one image in the words of the model: its chat template, or LLaVA-1.5's form where it has none."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if type(processor).__name__.startswith("InstructBlip"):  # puts its image tokens there itself
        return text
    return f"USER: {getattr(processor, 'image_token', None) or '<image>'}\n{text} ASSISTANT:"


def prepare(model: nn.Module, processor: Any, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
    """What a model is called with, on its device and in its dtype.

    Args:
        model, processor: as `load_model` gives them.
        images: one PIL image per question.
        texts: the questions, without template.
    """
    prompts = [write_prompt(processor, text) for text in texts]
    batch = processor(images=list(images), text=prompts, return_tensors="pt", padding=True)
    like = next(model.parameters())
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def answer(model: Any, processor: Any, inputs: Mapping[str, Tensor], **options: Any) -> list[str]:
    """What a model writes, greedily unless told otherwise.

    Args:
        model, processor: as `load_model` gives them.
        inputs: as `prepare` gives them.
        options: for `model.generate`; max_new_tokens is 128 unless it is among them.
    """
    options = {"max_new_tokens": 128, "do_sample": False, **options}
    if not options["do_sample"]:  # a model's own settings for sampling would only give rise to warnings
        options |= {"temperature": None, "top_p": None, "top_k": None}
    written = model.generate(**inputs, **options)
    ids = inputs["input_ids"]
    length = ids.shape[1]
    if written.shape[1] >= length and torch.equal(written[: len(ids), :length], ids.to(written.device)):
        written = written[:, length:]  # the prompt is repeated before the answer
    return [text.strip() for text in processor.tokenizer.batch_decode(written, skip_special_tokens=True)]


def image_grid(model: nn.Module, inputs: Mapping[str, Tensor], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the first image's tokens, None where they have no places in the image.

    Args:
        model: the host.
        inputs: one prompt.
        tokens: image tokens in it. Of several views of an image (LLaVA-NeXT) the first, the whole image, is meant.
    """
    config: Any = model.config
    if hasattr(config, "qformer_config"):
        return None
    if "image_grid_thw" in inputs:
        merge = getattr(config.vision_config, "spatial_merge_size", 1)
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return rows // merge, columns // merge
    vision: Any = getattr(config, "vision_config", None)
    side = (
        vision.image_size // vision.patch_size if hasattr(vision, "patch_size") and hasattr(vision, "image_size") else 0
    )
    if side and side**2 <= tokens:
        return side, side
    side = int(tokens**0.5)
    return (side, side) if side**2 == tokens else None

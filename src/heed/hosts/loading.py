"""Loading a model of transformers and what goes with it, from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from heed.errors import unknown
from heed.hosts.quiet import no_progress_bars

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_source(source: str | Path) -> None:
    """ValueError for what is written as a path and is no folder."""
    path = Path(source).expanduser()
    if str(source).startswith(("/", ".", "~")) and not path.is_dir():
        raise ValueError(
            f"model={str(source)!r} is no folder; give one that save_pretrained wrote, or an id on the Hub"
        )


def load_pretrained(
    source: str | Path, model_class: Any, companion_class: Any, named: str, *, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, Any]:
    """A model and its processor or tokenizer.

    Args:
        source: a folder written by `save_pretrained`, or an id on the Hub.
        model_class, companion_class: of transformers, with `from_pretrained`.
        named: what the model should be, for messages, such as "an image-text model".
        device: "auto" for the accelerator where there is one, or "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "float16", "bfloat16", or "auto": as saved on an accelerator, float32 on the CPU.

    Returns:
        The model in evaluation mode, and its companion.

    Raises:
        ValueError: nothing there that transformers can load so, or an unknown dtype.
    """
    check_source(source)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(unknown("dtype", dtype, ("auto", *DTYPES)))
    if device == "auto":
        present = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if present is None else present.type
    kind = DTYPES.get(dtype, torch.float32 if torch.device(device).type == "cpu" else "auto")
    try:
        with no_progress_bars():
            model = model_class.from_pretrained(source, dtype=kind)
            companion = companion_class.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model={str(source)!r} cannot be loaded as {named} ({reason[:300]}); give a folder that save_pretrained "
            "wrote, with its processor's or tokenizer's files, or an id on the Hub"
        ) from error
    return model.to(device).eval(), companion

"""Images to analyse: a tensor, or a loader's batches with or without labels, as batches kept in memory.

Several passes over the same few hundred images are needed (pruning one head after another), and loaders may shuffle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Images (B, C, H, W), or batches of a loader: images, (images, labels) or {"pixel_values": ..., "labels": ...}.
Images = Tensor | Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) and their labels (B,), or None."""

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"] | None


def take_batches(
    images: Images, labels: Int[Tensor, " n"] | None = None, *, limit: int | None = None, batch_size: int = 32
) -> list[Batch]:
    """The first images, in batches.

    Args:
        images: (n, C, H, W), or an iterable of batches such as a DataLoader, whose batches are taken as they come.
        labels: (n,), beside a tensor of images.
        limit: at most so many images; None for all.
        batch_size: for a tensor of images.

    Raises:
        ValueError: there are no images, labels do not fit, or some batches have labels and others none.
    """
    if isinstance(images, Tensor):
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images; give one for every image")
        parts = zip(images.split(batch_size), labels.split(batch_size), strict=True) if labels is not None else None
        images = parts or images.split(batch_size)
    elif labels is not None:
        raise ValueError("labels are given beside a loader; let its batches be (images, labels)")
    batches, count = [], 0
    for item in images:
        batch = _batch(item)
        if limit is not None and count + len(batch.images) > limit:
            room = limit - count
            batch = Batch(batch.images[:room], None if batch.labels is None else batch.labels[:room])
        if len(batch.images):
            batches.append(batch)
            count += len(batch.images)
        if limit is not None and count >= limit:
            break
    if not batches:
        raise ValueError("there are no images to analyse; the loader is empty")
    if len({batch.labels is None for batch in batches}) > 1:
        raise ValueError("some batches have labels and others none; give labels for all images or for none")
    return batches


def _batch(item: Any) -> Batch:
    if isinstance(item, dict):
        item = item.get("pixel_values"), item.get("labels")
    images, labels = (item, None) if isinstance(item, Tensor) else (*item, None)[:2]
    if not isinstance(images, Tensor) or images.ndim != 4:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"a batch holds {what}; it should be images (B, C, H, W), or (images, labels)")
    return Batch(images, None if labels is None else torch.as_tensor(labels).long())

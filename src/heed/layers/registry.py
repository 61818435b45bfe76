"""Attention layers by name, for hosts that work on a grid of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from heed.catalogue import load_rooms
from heed.registry import Registry

LayerFactory = Callable[..., nn.Module]

# name -> factory(dim, num_heads, grid, **options) giving a module (B, H, W, C) -> (B, H, W, C).
# A factory chooses options that fit the grid (rows, columns) where the caller gives none.
layers: Registry[LayerFactory] = Registry("attention layer", load_rooms)


def create_layer(name: str, dim: int, num_heads: int, grid: tuple[int, int], **options: Any) -> nn.Module:
    """A drop-in replacement for self-attention on a grid of tokens.

    Args:
        name: see `layers.names()`.
        dim: channels C.
        num_heads: heads; must divide dim.
        grid: rows and columns of the token grid.
        options: the layer's own settings, such as kernel or window_size.

    Returns:
        A module that maps (B, H, W, C) to (B, H, W, C).
    """
    return layers.get(name)(dim, num_heads, grid, **options)

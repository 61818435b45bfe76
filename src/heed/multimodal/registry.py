"""Steering methods by name, for `heed ask` and `heed compare hallucination`.

An entry makes the method for a host: it gets the host and a few prompts, as a processor returns them, to learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from heed.catalogue import load_rooms
from heed.methods import Method
from heed.registry import Registry

PLAIN = "plain"  # the host as it is
Make = Callable[[nn.Module, Sequence[Mapping[str, Any]]], Method | None]

steering: Registry[Make] = Registry("steering method", load_rooms)


@steering.register(PLAIN)
def _plain(host: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> None:
    """No method."""

"""Checks of arguments that come one per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def positive_ints(name: str, values: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """`values` as a tuple of integers >= least, or a ValueError that names the offender."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={values!r}: {value!r} must be an integer >= {least}")
    return tuple(values)


def per_axis(name: str, value: Any, rank: int, *, kind: type = int, least: int = 1) -> tuple[Any, ...]:
    """One value per axis: a single value is repeated, a sequence must have `rank` entries."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name}={value!r} has {len(values)} entries for {rank} axes; give one value or one per axis")
    if kind is bool:
        for entry in values:
            if not isinstance(entry, bool):
                raise ValueError(f"{name}={value!r}: {entry!r} must be True or False")
        return values
    return positive_ints(name, values, least)


def check_tokens(name: str, grid: tuple[int, ...], tokens: int, what: str) -> None:
    if math.prod(grid) != tokens:
        raise ValueError(f"{name}: grid {grid} holds {math.prod(grid)} tokens, but there are {tokens} {what}")

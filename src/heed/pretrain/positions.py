"""Fixed sinusoidal positions of tokens on a grid (MAE, CroCo and their kin).

    w_i = 10000^(-i / (C/4)),  i = 0 .. C/4 - 1;     line(x) = [sin(x w), cos(x w)]          (C/2,)
    table(row, column) = [line(row), line(column)]   first="row", as in mmpretrain (ColorMAE)
                         [line(column), line(row)]   first="column", as in facebookresearch/mae and transformers

The two orders are not interchangeable: weights trained with one table need that table.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from heed.errors import unknown

First = Literal["row", "column"]


def sincos_positions(grid: tuple[int, int], dim: int, *, first: First = "row", prefix: int = 0) -> Float[Tensor, "N C"]:
    """A table of positions.

    Args:
        grid: rows and columns.
        dim: channels C, divisible by 4.
        first: which index the first half of the channels encodes.
        prefix: rows of zeros in front, for class tokens.

    Returns:
        (prefix + rows * columns, dim).
    """
    if dim % 4:
        raise ValueError(f"dim={dim}: sinusoidal positions need a number of channels that 4 divides")
    if first not in ("row", "column"):
        raise ValueError(unknown("order of positions", first, ("row", "column")))
    rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * rates for side in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], 1).float() for angles in (rows, columns))
    halves = [rows.repeat_interleave(grid[1], 0), columns.repeat(grid[0], 1)]
    table = torch.cat(halves if first == "row" else halves[::-1], 1)
    return torch.cat([torch.zeros(prefix, dim), table])

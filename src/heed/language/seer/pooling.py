"""Blocks of tokens: their names, how they are pooled, and one matrix per head for what was pooled (SeerAttention, card 22).

    pool(x)[i] = [max, min, avg over the tokens of block i]       x (B, H, T, d) -> (B, H, n, m d),  n = ceil(T / b)
    y_h = pool(x)_h W_h                                           W (H, m d, g)

Blocks are counted from a row's first token; the last one, and the first of a prompt in parts, may have fewer tokens, and
only those are pooled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown

POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "max": lambda x, dim: x.amax(dim),
    "min": lambda x, dim: x.amin(dim),
    "avg": lambda x, dim: x.mean(dim),
}
# What the queries of the decoding gate may be; the prefill gate pools them in one of the ways above.
DECODE_QUERIES = ("proj", "avgproj", "avg", "orig")
Tables = tuple[Float[Tensor, "#B n R"], Float[Tensor, "#B n R"]]


def poolings(kind: str, *, decode: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a gate's name says about queries and keys: "Qavg_Kmaxminavg" gives ("avg",), ("max", "min", "avg").

    Raises:
        ValueError: no such name.
    """
    of = "max|min|avg"
    found = re.fullmatch(f"Q({'|'.join(DECODE_QUERIES)}|(?:{of})+)_K((?:{of})+)", kind)
    if found is None:
        raise ValueError(unknown("gate type", kind, ("Qavg_Kmaxminavg", "Qmaxminavg_Kmaxmin", "Qproj_Kmaxminavg")))
    names = re.findall(of, found[1]), re.findall(of, found[2])
    if any(len(some) != len(set(some)) for some in names):
        raise ValueError(f"gate type {kind!r} names a pooling twice")
    if decode and found[1] not in DECODE_QUERIES:
        raise ValueError(unknown("gate type for decoding", kind, (f"Q{name}_K{found[2]}" for name in DECODE_QUERIES)))
    if decode:
        return (found[1],), tuple(names[1])
    if "".join(names[0]) != found[1]:
        raise ValueError(f"gate type {kind!r} is for decoding; a prompt's queries are pooled by max, min or avg")
    return tuple(names[0]), tuple(names[1])


@provides("22-seerattention")
def pool_blocks(
    x: Float[Tensor, "B H T D"], kinds: Sequence[str], block: int, lead: int = 0
) -> Float[Tensor, "B H n W"]:
    """Every block of tokens as one vector, several poolings side by side.

    Args:
        x: (B, H, T, d) queries or keys.
        kinds: of "max", "min", "avg", in the order in which they stand in the result.
        block: b, tokens per block.
        lead: so many tokens of the first block are missing.

    Returns:
        (B, H, ceil((lead + T) / b), len(kinds) * d)
    """
    head = min((block - lead) % block, x.shape[2])
    whole = head + (x.shape[2] - head) // block * block
    pieces = []
    if head:
        pieces.append(x[:, :, None, :head])
    if head < whole:
        pieces.append(x[:, :, head:whole].unflatten(2, (-1, block)))
    if whole < x.shape[2]:
        pieces.append(x[:, :, None, whole:])
    return torch.cat([torch.cat([POOLINGS[kind](piece, 3) for kind in kinds], -1) for piece in pieces], 2)


class HeadLinear(nn.Module):
    """A linear map without bias for every head: (..., H, n, in) to (..., H, n, out) with weights (H, in, out)."""

    def __init__(self, *shape: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Float[Tensor, "*B n i"]) -> Float[Tensor, "*B n o"]:
        return x.to(self.weight.dtype) @ self.weight


def check_size(name: str, value: object) -> None:
    """ValueError unless a size is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1")


def check_sizes(heads: int, key_heads: int, **sizes: int) -> None:
    """ValueError unless a gate can have these sizes."""
    for name, size in {"heads": heads, "key_heads": key_heads, **sizes}.items():
        check_size(name, size)
    if heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")


def check_tables(tables: Tables, blocks: int, width: int) -> None:
    """ValueError unless rotary tables fit so many places and the gate's width."""
    given, rotary = tables[0].shape[1:]
    if rotary > width:
        raise ValueError(f"a gate of width {width} is narrower than the host's rotary table, {rotary}; widen the gate")
    if given != blocks:
        raise ValueError(
            f"rotary tables for {given} places do not fit {blocks}; give one row for the start of each block"
        )

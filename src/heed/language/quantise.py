"""Rounds rows of keys or values to 2, 4 or 8 bits, and packs the codes without a gap.

    step = (max x - min x) / (2^b - 1),   code = round((x - min x) / step),   x~ = code * step + min x      x (B, N, C)

The minimum and maximum run over all tokens of a channel, over a token's channels ("token") or over groups of them. "Channel-
separable" divides every channel by c = sqrt(max |x|) over the tokens first, so that a token can have one step for channels of
different size; it stores 2 N + C parameters where groups of 32 channels have 2 N C / 32. He et al., "ZipCache: Accurate and
Efficient KV Cache Quantization with Salient Token Identification", NeurIPS 2024, arXiv 2405.14256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from heed.catalogue import provides
from heed.errors import unknown

Grouping = Literal["channel", "token", "group", "channel-separable"]
BITS = (2, 4, 8)


@provides("34-zipcache")
@dataclass(frozen=True)
class Quantised:
    """Packed codes and what turns them back into numbers; `quantise` makes them.

    Attributes:
        packed: (B, N, C bits / 8) uint8.
        low, step: minimum and step: (B, 1, C) per channel, (B, N, 1) per token, (B, N, C / group) per group. One row
            for the whole batch where it shares them.
        scale: (B, 1, C), which channels were divided by; None for 1.
        bits: of a code.
    """

    packed: UInt8[Tensor, "B N P"]
    low: Float[Tensor, "#B #N S"]
    step: Float[Tensor, "#B #N S"]
    scale: Float[Tensor, "#B 1 C"] | None
    bits: int

    def codes(self) -> UInt8[Tensor, "B N C"]:
        """The codes, one per byte."""
        return unpack(self.packed, self.bits)

    def dequantise(self) -> Float[Tensor, "B N C"]:
        """The numbers that the codes stand for."""
        codes = self.codes().to(self.low.dtype)
        shape, groups = codes.shape, self.low.shape[-1]
        if groups in (1, shape[-1]):  # broadcasts as it is
            x = codes.mul_(self.step).add_(self.low)
        else:
            x = codes.unflatten(-1, (groups, -1)).mul_(self.step[..., None]).add_(self.low[..., None]).flatten(-2)
        return x if self.scale is None else x.mul_(self.scale)


@provides("34-zipcache")
def quantise(
    x: Float[Tensor, "B N C"],
    bits: int,
    per: Grouping = "token",
    *,
    group: int = 32,
    scale: Float[Tensor, "#B 1 C"] | None = None,
    tokens: Bool[Tensor, "B N"] | None = None,
    shared: bool = False,
) -> Quantised:
    """Quantise and pack; there must be at least one token.

    Args:
        x: (B, N, C), N tokens of C channels.
        bits: 2, 4 or 8.
        per: what shares a minimum and a step: "channel", "token", "group" of `group` channels of a token, or
            "channel-separable", a token whose channels have been divided by `channel_scale`.
        group: channels of a group.
        scale: what to divide the channels by, in the place of `channel_scale`; for "channel-separable" only.
        tokens: (B, N), False where a row is none and must not count.
        shared: one minimum and step, and one scale, of a channel for the whole batch, as in the authors' code; by
            default every row of the batch has its own.

    Raises:
        ValueError: other bits or sharing, or channels that do not fill bytes or groups.
    """
    _check(x.shape[-1], bits, per, group)
    exact = x if x.dtype == torch.float64 else x.float()
    if per == "channel-separable":
        scale = channel_scale(x, tokens=tokens, shared=shared) if scale is None else scale
        exact = exact / scale.to(exact.dtype)
    low, high = _limits(exact, per, group, tokens, shared)
    # In the dtype they are stored in, so that rounding them costs nothing more. A constant row has codes 0.
    low, step = low.to(x.dtype), ((high - low) / (2**bits - 1)).to(x.dtype)
    step = step.masked_fill(step == 0, 1)
    grouped = exact.unflatten(-1, (-1, group)) if per == "group" else exact
    minimum, width = (low, step) if per != "group" else (low[..., None], step[..., None])
    codes = ((grouped - minimum) / width).round().clamp(0, 2**bits - 1)
    return Quantised(pack(codes.view(x.shape).to(torch.uint8), bits), low, step, scale, bits)


@provides("34-zipcache")
def channel_scale(
    x: Float[Tensor, "B N C"], *, tokens: Bool[Tensor, "B N"] | None = None, shared: bool = False
) -> Float[Tensor, "#B 1 C"]:
    """sqrt(max |x|) of every channel over the tokens, and over the batch if it is shared; 1 where all are 0."""
    size = x.abs()
    if tokens is not None:
        size = size.masked_fill(~tokens[..., None], 0)
    scale = size.amax((0, 1) if shared else 1, keepdim=True).sqrt()
    return scale.masked_fill(scale == 0, 1)


@provides("34-zipcache")
def pack(codes: UInt8[Tensor, "*B C"], bits: int) -> UInt8[Tensor, "*B P"]:
    """Byte j holds the codes j, j + P, j + 2 P ... with P = C bits / 8, the first in its lowest bits."""
    parts = codes.chunk(8 // bits, -1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << (i * bits)
    return packed


@provides("34-zipcache")
def unpack(packed: UInt8[Tensor, "*B P"], bits: int) -> UInt8[Tensor, "*B C"]:
    """The codes that `pack` packed."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)


def parameter_count(per: Grouping, tokens: int, channels: int, group: int = 32) -> int:
    """Minima, steps and scales of (tokens, channels) numbers."""
    counts = {
        "channel": 2 * channels,
        "token": 2 * tokens,
        "group": 2 * tokens * channels // group,
        "channel-separable": 2 * tokens + channels,
    }
    return counts[per]


def _limits(x: Tensor, per: Grouping, group: int, tokens: Tensor | None, shared: bool) -> tuple[Tensor, Tensor]:
    if per == "channel":
        over = (0, 1) if shared else 1
        if tokens is None:
            return x.amin(over, keepdim=True), x.amax(over, keepdim=True)
        none = ~tokens[..., None]
        low = x.masked_fill(none, torch.inf).amin(over, keepdim=True)
        high = x.masked_fill(none, -torch.inf).amax(over, keepdim=True)
        empty = low > high  # a row of the batch without tokens
        return low.masked_fill(empty, 0), high.masked_fill(empty, 0)
    if per == "group":
        low, high = x.unflatten(-1, (-1, group)).aminmax(dim=-1)
        return low, high
    low, high = x.aminmax(dim=-1, keepdim=True)
    return low, high


def _check(channels: int, bits: int, per: str, group: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits} cannot be packed; choose 2, 4 or 8")
    if per not in get_args(Grouping):
        raise ValueError(unknown("quantisation", per, get_args(Grouping)))
    if channels * bits % 8:
        raise ValueError(f"{channels} channels of {bits} bits do not fill whole bytes; use more bits, or a wider model")
    if per == "group" and channels % group:
        raise ValueError(f"group={group} does not divide the {channels} channels of a token")

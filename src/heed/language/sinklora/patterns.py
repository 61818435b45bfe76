"""Which tokens see which in S2-Attn and SF-Attn: groups of consecutive tokens, half of them shifted, and sinks.

    head h < S:    j <= i  and  floor(j / G) = floor(i / G)                          or  j <= i and j < sinks
    head h >= S:   j <= i  and  floor((j - G/2) / G) = floor((i - G/2) / G)          or  the same

G = int(ratio N); S = H/2 + int(returned (H - H/2)) heads are not shifted: `returned` is what SF-Attn gives back of the half
that S2-Attn shifts. LongLoRA's code without flash attention (`wrap`) rolls the sequence in the place of cutting its ends off:
the first G/2 tokens then come behind the last ones, and see them, which leaks the future. Chen et al., "LongLoRA", arXiv
2309.12307; Zhang, "SinkLoRA", arXiv 2406.05678, whose code has no SF-Attn: `returned` and sinks follow its text, and which
of the heads go back is heed's own reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from heed.catalogue import provides
from heed.engine.axis import Axis
from heed.engine.pattern import Pattern
from heed.engine.patterns import Causal
from heed.errors import unknown

Uneven = Literal["pad", "error"]
_TINY = 1e-9  # so that 10 * 0.3 is 3


@provides("70-sinklora")
@dataclass(frozen=True)
class Segments(Pattern):
    """Tokens see those of their own group that are not after them.

    Args:
        group: G, consecutive tokens in a group.
        shift: where the second group begins, 0 <= shift < group; the tokens before it are a shorter group of their own.
        wrap: put the first `shift` tokens behind the last ones, where they join the last group. They see the future.
        causal: False lets tokens see their whole group.
    """

    group: int
    shift: int = 0
    wrap: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        if self.group < 1 or not 0 <= self.shift < self.group:
            raise ValueError(f"Segments: group={self.group} and shift={self.shift} must satisfy 0 <= shift < group")

    def check(self, n: int, m: int) -> None:
        if n != m:
            raise ValueError(f"Segments: {n} queries and {m} keys must be the same tokens")

    def cuts(self, n: int) -> list[tuple[int, int]]:
        """Where each group begins, and how many of n tokens it has; counted after the roll where there is one."""
        first = 0 if self.wrap else self.shift
        starts = [0, *range(first or self.group, n, self.group)]
        return [(start, stop - start) for start, stop in zip(starts, [*starts[1:], n], strict=True)]

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        starts, lengths = torch.tensor(self.cuts(n)).unbind(1)
        first = starts.repeat_interleave(lengths)
        last = torch.arange(n) if self.causal else (starts + lengths - 1).repeat_interleave(lengths)
        order = torch.arange(n).roll(-self.shift) if self.wrap and self.shift else None
        return (Axis(first, last, n, order, order, pieces=tuple(lengths.tolist())),)


@provides("70-sinklora")
@dataclass(frozen=True)
class Sinks(Pattern):
    """The first `count` keys are seen by every query, and the first `count` queries see every key.

    In a decoder, `Causal() & Sinks(4)`, the second half adds nothing to what those queries see anyway.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"Sinks: count={self.count} must be >= 0")

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        last = torch.full((n,), min(self.count, m) - 1)
        last[: self.count] = m - 1
        return (Axis(torch.zeros(n).long(), last, m),)


@provides("70-sinklora")
@dataclass(frozen=True)
class HeadGroups:
    """How the heads of a layer divide the tokens; the defaults are those of S2-Attn.

    Args:
        ratio: G as a fraction of the tokens, in (0, 1].
        group: G itself, wherever it divides the number of tokens; the ratio decides elsewhere. 8192 in LongLoRA's
            supervised fine-tuning.
        returned: fraction of the shifted half of the heads that is not shifted after all; 1/2 in SF-Attn.
        sinks: so many first tokens are seen by all after them; 4 in SF-Attn.
        wrap: let the shifted heads roll the sequence, as LongLoRA does without flash attention. Leaks the future.
        uneven: what happens where groups do not divide the tokens: "pad" rounds G up and has a shorter last group, as if
            there were padding behind the tokens; "error" raises ValueError, as LongLoRA does.
    """

    ratio: float = 0.25
    group: int | None = None
    returned: float = 0.0
    sinks: int = 0
    wrap: bool = False
    uneven: Uneven = "pad"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must lie in (0, 1]; 0.25 makes four groups")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1, or None to follow the ratio")
        if not 0 <= self.returned <= 1:
            raise ValueError(f"returned={self.returned} must lie in [0, 1]; 0 is S2-Attn, 1 shifts no head")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be >= 0")
        if self.wrap and self.sinks:
            raise ValueError(f"wrap=True lets tokens see the future, which sinks={self.sinks} rule out; choose one")
        if self.uneven not in get_args(Uneven):
            raise ValueError(unknown("value of uneven", self.uneven, get_args(Uneven)))

    def group_size(self, tokens: int) -> int:
        """G for so many tokens.

        Raises:
            ValueError: the groups do not divide them, and `uneven` is "error".
        """
        if self.group is not None and tokens % self.group == 0:
            return self.group
        size = int(tokens * self.ratio + _TINY)
        if size and tokens % size == 0:
            return size
        if self.uneven == "error":
            raise ValueError(
                f"{tokens} tokens do not make groups of int({tokens} * {self.ratio}) = {size}; pad them, or choose "
                "uneven='pad'"
            )
        return math.ceil(tokens * self.ratio - _TINY)

    def unshifted(self, heads: int) -> int:
        """S, how many heads are not shifted: the first ones."""
        half = heads // 2
        return half + int(self.returned * (heads - half) + _TINY)

    def segments(self, heads: int, size: int, causal: bool = True) -> list[Segments]:
        """The groups of every head, of `size` tokens each."""
        still = self.unshifted(heads)
        plain, shifted = Segments(size, causal=causal), Segments(size, size // 2, self.wrap, causal)
        return [plain] * still + [shifted] * (heads - still)

    def with_sinks(self, segments: Segments) -> Pattern:
        """Groups, and the sinks beside them."""
        if not self.sinks:
            return segments
        return segments | (Causal() & Sinks(self.sinks) if segments.causal else Sinks(self.sinks))

    def patterns(self, heads: int, tokens: int, causal: bool = True) -> list[Pattern]:
        """What every head sees, as one of the engine's patterns."""
        return [self.with_sinks(segments) for segments in self.segments(heads, self.group_size(tokens), causal)]

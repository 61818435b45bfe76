"""How many times smaller ZipCache makes a cache, without making one.

    bits = u b_regular + (1 - u) b_salient + 16 (P_K + P_V + I) / (2 N C),    ratio = 16 / bits

P are the minima, steps and scales, in 16 bits each: 4 C for keys in two tables per channel, 2 N + C for channel-separable
values. The lists I of the regular tokens, u N G numbers of 16 bits, are left out in the paper; give `heads` to count them.
"""

from __future__ import annotations

from heed.catalogue import provides
from heed.language.quantise import Grouping, parameter_count


@provides("34-zipcache")
def compression_ratio(
    tokens: int,
    channels: int,
    *,
    salient_bits: int = 4,
    regular_bits: int = 2,
    regular: float = 0.4,
    keys: Grouping = "channel",
    values: Grouping = "channel-separable",
    group: int = 32,
    heads: int | None = None,
) -> float:
    """Size of a 16-bit cache in units of the compressed one, after a prompt.

    Args:
        tokens: N.
        channels: C, key-value heads times their width.
        salient_bits, regular_bits, regular: bits of the two kinds of tokens, and the fraction of the second.
        keys, values, group: how they are quantised, see `heed.language.quantise.quantise`.
        heads: key-value heads, to count the lists of regular tokens as heed stores them; None for the paper's formula.

    Raises:
        ValueError: no tokens or channels, or a fraction outside [0, 1].
    """
    if tokens < 1 or channels < 1:
        raise ValueError(f"tokens={tokens} and channels={channels} must be positive")
    if not 0 <= regular <= 1:
        raise ValueError(f"regular={regular} must be a fraction between 0 and 1")
    few = int(regular * tokens)
    tables = [count for count in (few, tokens - few) if count]
    parameters = 0
    for per in (keys, values):
        parameters += sum(parameter_count(per, count, channels, group) for count in tables)
        if per == "channel-separable":
            parameters -= (len(tables) - 1) * channels  # both tables share the scale
    lists = 0 if heads is None else few * heads
    mean = regular * regular_bits + (1 - regular) * salient_bits
    return 16 / (mean + 16 * (parameters + lists) / (2 * tokens * channels))

"""How many query heads each key-value head serves (card 46): from the norms of the keys, n (G,), to counts a (G,), sum a = H.

    n_g = sum over the batch of |k_bg|                      Frobenius norm over tokens and channels
    key-driven   a = round(H m / sum m),  m = (n - min n) / (max n - min n)
    evolving     a = round(H e / sum e),  e = |c - n| ("diff") or 0.9 n + 0.1 c ("ema"),  c the norms remembered

Rounding goes half to even, and then single heads are moved until the counts sum to H. The min-max of the key-driven rule
gives the weakest key head nothing unless the correction does: it prunes that head, and of two heads the stronger one
always takes all. Where every norm is the same the rules divide 0 by 0, which never ends in the authors' code; here the
split is then uniform.

Khan et al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", 2024 (arXiv 2408.08454).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.catalogue import provides

KINDS = ("diff", "ema")


def check_kind(kind: str) -> None:
    """Raise ValueError for a kind of evolving allocation that there is not."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of evolving allocation {kind!r}; known: {', '.join(KINDS)}")


@provides("46-kdgqa")
def key_norms(k: Float[Tensor, "B G N d"]) -> Float[Tensor, " G"]:
    """Norm of each key head over tokens and channels, summed over the batch; detached, in float32 or better."""
    precision = torch.promote_types(k.dtype, torch.float32)
    return torch.linalg.vector_norm(k.detach(), dim=(2, 3), dtype=precision).sum(0)


@provides("46-kdgqa")
def uniform_allocation(num_heads: int, num_kv_heads: int) -> Int[Tensor, " G"]:
    """num_heads // num_kv_heads queries for each; what remains goes to the first groups, one each."""
    each, rest = divmod(num_heads, num_kv_heads)
    return torch.tensor([each + (group < rest) for group in range(num_kv_heads)], device="cpu")


@provides("46-kdgqa")
def key_driven_allocation(norms: Float[Tensor, " G"], num_heads: int) -> Int[Tensor, " G"]:
    """KDGQA's rule: the stronger a key head is among the others, the more queries it serves.

    While the counts sum to too much, the first largest loses one; while to too little, the first smallest gains one.
    Everything stays on the norms' device and nothing waits for it but the check.

    Args:
        norms: (G,) from `key_norms`.
        num_heads: query heads H to hand out.

    Raises:
        ValueError: norms that are not finite.
    """
    _check_finite(norms)
    relative = (norms - norms.min()) / (norms.max() - norms.min())
    shares = relative / relative.sum() * num_heads
    even = uniform_allocation(num_heads, len(norms)).to(norms)
    counts = torch.where(shares.isfinite().all(), shares.round(), even)
    place = torch.arange(len(norms), device=norms.device)
    for _ in range(len(norms) // 2):  # rounding moves each count by at most one half
        excess = counts.sum() - num_heads
        counts = counts - ((excess > 0) & (place == counts.argmax())).to(counts)
        counts = counts + ((excess < 0) & (place == counts.argmin())).to(counts)
    return counts.long()


@provides("46-kdgqa")
def evolving_allocation(
    norms: Float[Tensor, " G"],
    cache: Float[Tensor, " G"],
    num_heads: int,
    kind: str = "diff",
    *,
    draws: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " G"]:
    """DGQA's rule: a key head serves more queries the more its norm has changed ("diff"), or the larger it has been ("ema").

    While the counts sum to too much, a random head loses one if it has one; while to too little, a random head gains one.

    Args:
        norms: (G,) now.
        cache: (G,) remembered.
        num_heads: query heads H to hand out.
        kind: "diff" or "ema".
        draws: the random heads in order, in the place of random numbers.
        generator: of the CPU, makes the random heads repeatable.

    Raises:
        ValueError: an unknown kind, norms that are not finite, or too few draws.
    """
    check_kind(kind)
    _check_finite(norms)
    change = (cache - norms).abs() if kind == "diff" else 0.9 * norms + 0.1 * cache
    shares = change / change.sum() * num_heads
    if not shares.isfinite().all():
        return uniform_allocation(num_heads, len(norms)).to(norms.device)
    counts = shares.round().long().tolist()
    heads = _random_heads(len(counts), generator) if draws is None else _given_heads(draws)
    while sum(counts) > num_heads:
        head = next(heads)
        counts[head] -= counts[head] > 0
    while sum(counts) < num_heads:
        counts[next(heads)] += 1
    return torch.tensor(counts, device=norms.device)


def _random_heads(count: int, generator: torch.Generator | None) -> Iterator[int]:
    while True:
        yield int(torch.randint(count, (), generator=generator, device="cpu"))


def _given_heads(draws: Iterable[int]) -> Iterator[int]:
    draws = list(draws)
    yield from draws
    raise ValueError(f"draws={draws} are too few for the corrections; give more, or none for random ones")


def _check_finite(norms: Tensor) -> None:
    # A look at the values, for which neither a compiled graph nor a tensor without data has a place.
    if not (torch.compiler.is_compiling() or norms.is_meta) and not norms.isfinite().all():
        raise ValueError(f"norms of the keys {norms.tolist()} are not finite; check the layer's input and weights")

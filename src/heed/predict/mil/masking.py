"""Stochastic top-K instance masking, STKIM (card 09): in training, some of the strongest instances are hidden at random.

    row of logits A (N,):  places = top-k'(A),  k' = min(top, instances of the bag)
    int(k' * drop) of the places, chosen at random:  A = -1e9;  softmax hands their share to all others

Every row (branch, head) chooses for itself. Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole
Slide Image Classification", ECCV 2024, arXiv 2311.07125.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heed.catalogue import provides

MASKED = -1e9  # logit of a masked instance; the lowest finite value where the dtype does not reach so far


@provides("09-acmil")
def mask_top_instances(
    logits: Float[Tensor, "*rows N"],
    top: int = 10,
    drop: float = 0.6,
    *,
    valid: Bool[Tensor, "*#rows N"] | None = None,
    draws: Float[Tensor, "*rows k"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*rows N"]:
    """Attention logits with some of each row's strongest entries at -1e9.

    Args:
        logits: (..., N), any attention logits.
        top: K, how many of the strongest are candidates; a row with fewer instances has fewer. 0 masks nothing.
        drop: share of the candidates that is masked, 0 to 1, rounded down.
        valid: False where an instance is padding; broadcasts to the logits.
        draws: (..., min(top, N)) uniform numbers in the order of the candidates, strongest first; the smallest ones
            are masked. None draws them.
        generator: where they are drawn from.

    Raises:
        ValueError: `top`, `drop` or the shape of `draws` is wrong.
    """
    chosen = choose_top_instances(logits, top, drop, valid=valid, draws=draws, generator=generator)
    return logits.masked_fill(chosen, max(MASKED, torch.finfo(logits.dtype).min))


@provides("09-acmil")
def choose_top_instances(
    scores: Float[Tensor, "*rows N"],
    top: int = 10,
    drop: float = 0.6,
    *,
    valid: Bool[Tensor, "*#rows N"] | None = None,
    draws: Float[Tensor, "*rows k"] | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "*rows N"]:
    """Which entries `mask_top_instances` masks, as a mask; the arguments are its own."""
    check_masking(top, drop)
    most = min(top, scores.shape[-1])
    if valid is not None:
        scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    places = scores.topk(most, -1).indices  # among equals, as torch.topk chooses
    if draws is None:
        device = scores.device if generator is None else generator.device
        draws = torch.rand(places.shape, generator=generator, device=device)
    elif draws.shape != places.shape:
        raise ValueError(f"draws {tuple(draws.shape)}: one is needed for each candidate, {tuple(places.shape)}")
    draws = draws.to(scores.device)
    hidden = torch.tensor([int(count * drop) for count in range(most + 1)], device=scores.device)
    if valid is None:
        chosen = draws.argsort(-1).argsort(-1) < hidden[most]
    else:
        candidates = valid.sum(-1, keepdim=True).clamp_max(most)
        # Padding among the candidates comes last in the order of the draws, and is never reached.
        draws = draws.masked_fill(torch.arange(most, device=scores.device) >= candidates, torch.inf)
        chosen = draws.argsort(-1).argsort(-1) < hidden[candidates]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, places, chosen)


def check_masking(top: int, drop: float) -> None:
    """ValueError for settings of the masking that make no sense."""
    if top < 0:
        raise ValueError(f"top={top}: how many instances are candidates must be at least 0")
    if not 0 <= drop <= 1:
        raise ValueError(f"drop={drop}: the share of candidates that is masked must lie in [0, 1]")

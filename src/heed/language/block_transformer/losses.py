"""Losses beside the cross entropy of tokens: between block embeddings, and by position in the block (card 15).

    h_i  state of the block decoder that predicts embedding e_{i + n}; both are multiplied by the target's mask
    mse          mean (h_i - e_{i+n})^2, in float32
    contrastive  -mean_i log softmax_j(h_i e_j / 0.07)_i      h, e of length 1, over all pairs of the batch

No gradient flows into the targets.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed.language.block_transformer.config import BlockLoss

_TEMPERATURE = 0.07


def block_loss(
    kind: BlockLoss, hidden: Float[Tensor, "B M D"], embeddings: Float[Tensor, "B N n D"], mask: Tensor | None
) -> Float[Tensor, ""]:
    """How far the block decoder's states are from the embeddings of the next blocks.

    Args:
        kind: "mse" or "contrastive".
        hidden: (B, N n, D).
        embeddings: (B, N, n, D).
        mask: (B, N), 0 for blocks of padding. They count as zeros in "mse", as the authors have it; "contrastive" leaves
            them out (in the authors' code a single one makes the loss NaN).
    """
    n = embeddings.shape[2]
    predicted, target = hidden[:, :-n].float(), embeddings[:, 1:].flatten(1, 2).detach().float()
    keep = target.new_ones(target.shape[:2])
    if mask is not None:
        keep = (mask[:, 1:] != 0).repeat_interleave(n, 1).to(target.dtype)
    if kind == "mse":
        return F.mse_loss(predicted * keep[..., None], target * keep[..., None])
    predicted, target = (x[keep != 0] / x[keep != 0].norm(dim=-1, keepdim=True) for x in (predicted, target))
    return -(predicted @ target.T / _TEMPERATURE).log_softmax(-1).diagonal().mean()


def by_position(losses: Float[Tensor, "*M L"]) -> Float[Tensor, " L"]:
    """Mean loss of each position in the block, float64; NaN entries do not count."""
    return losses.detach().double().reshape(-1, losses.shape[-1]).nanmean(0)

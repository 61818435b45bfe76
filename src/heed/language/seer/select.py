"""From the scores of a gate to the blocks that are visited (SeerAttention, card 22).

    threshold t      M = softmax(S) > t
    nz_ratio r       M = the k best of every row of S,  k = max(1, floor((1 - sqrt(1 - r)) n)): r of the causal triangle
    token_budget c   M = the floor(c / b) best of every row, for decoding

A threshold on shares makes long rows sparser by itself. The authors' kernels give NaN for a row of blocks that visits
none (0 with padding on the left); here such a row visits its diagonal block, which is heed's own choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heed.catalogue import provides
from heed.errors import unknown

Rule = Literal["threshold", "nz_ratio", "token_budget"]


@provides("22-seerattention")
@dataclass(frozen=True)
class BlockChoice:
    """How many blocks are visited.

    Args:
        method: "threshold" on the share that the gate gives a block, "nz_ratio", the fraction of a prompt's causal
            blocks, or "token_budget", tokens visited by a decoded one.
        value: of the threshold, ratio or budget. The authors use thresholds from 5e-4 to 5e-3 at 64 tokens per block and
            prompts of 8k to 128k, and budgets from 2048 to 4096. Below 0 everything is visited.
        last_dense: the last two blocks of queries of a prompt see everything before them, as the authors have it.

    Raises:
        ValueError: an unknown method, a threshold that is not below 1, a ratio outside (0, 1], a budget below 1.
    """

    method: Rule = "threshold"
    value: float = 0.0
    last_dense: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Rule):
            raise ValueError(unknown("method", self.method, get_args(Rule)))
        if self.method == "threshold" and not self.value < 1:
            raise ValueError(f"threshold={self.value} must be below 1, the share of all blocks together")
        if self.method == "nz_ratio" and not 0 < self.value <= 1:
            raise ValueError(f"nz_ratio={self.value} must be above 0 and at most 1")
        if self.method == "token_budget" and not (self.value >= 1 and self.value == int(self.value)):
            raise ValueError(f"token_budget={self.value} must be a whole number of tokens, at least 1")

    def of_prompt(self, scores: Float[Tensor, "B H m n"]) -> Bool[Tensor, "B H m n"]:
        """The blocks that a prompt's blocks of queries, the last m of n, visit.

        Raises:
            ValueError: the choice is a token budget, which is for decoding.
        """
        rows, columns = scores.shape[2:]
        if self.method == "threshold":
            chosen = scores.softmax(-1) > self.value
        elif self.method == "nz_ratio":
            chosen = _best(scores, max(1, int((1 - math.sqrt(1 - self.value)) * columns)))
        else:
            raise ValueError("a token_budget is for decoding; choose a prompt's blocks by threshold or nz_ratio")
        if self.last_dense:
            chosen[:, :, -2:] = True
        chosen = chosen.tril(columns - rows)
        own = F.pad(torch.eye(rows, dtype=torch.bool, device=scores.device), (columns - rows, 0))
        return chosen | (own & ~chosen.any(-1, keepdim=True))

    def of_token(self, scores: Float[Tensor, "B G N n"], block: int) -> Bool[Tensor, "B G N n"]:
        """The blocks that decoded tokens visit: those chosen and the last one, which the token itself is in.

        Raises:
            ValueError: the choice is an nz_ratio, which is for prompts.
        """
        if self.method == "threshold":
            chosen = scores.softmax(-1) > self.value
        elif self.method == "token_budget":
            chosen = _best(scores, min(int(self.value) // block, scores.shape[-1]))
        else:
            raise ValueError("an nz_ratio is for prompts; choose the blocks of a token by threshold or token_budget")
        chosen[..., -1] = True
        return chosen


def causal_blocks(rows: int, columns: int) -> int:
    """How many blocks causality allows to the last `rows` of `columns` blocks of queries."""
    return rows * (columns - rows) + rows * (rows + 1) // 2


def _best(scores: Tensor, number: int) -> Tensor:
    """Where the best of every row stand."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return chosen.scatter_(-1, scores.topk(number, -1).indices, True)

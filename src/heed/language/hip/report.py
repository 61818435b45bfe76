"""What HiP costs and what it keeps: counted products, the share of dense attention's mass, the blocks that it found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal
from heed.hosts.rules import repeat_heads
from heed.language.hip.attention import sparse_attention
from heed.language.hip.search import HiPBudget, Selection, block_ends, block_runs


@provides("57-hip")
@dataclass(frozen=True)
class HiPCost:
    """Work and memory of one head for a whole prompt.

    Args:
        search: products of a query and a key in the search: O(T log T).
        attention: those in attention itself: O(T).
        dense: those of dense causal attention, T (T + 1) / 2.
        indices: integers that the search leaves behind, T / block_q * M.
    """

    search: int
    attention: int
    dense: int
    indices: int

    @property
    def speedup(self) -> float:
        """Products of dense attention over all of HiP's; those of the search are not followed by values, and count half."""
        return self.dense / (self.search / 2 + self.attention)


@provides("57-hip")
def hip_cost(tokens: int, budget: HiPBudget) -> HiPCost:
    """Products that HiP computes for a prompt of so many tokens, without dense queries at its beginning.

    The authors score both children of every slot, 2 M per round; one of them has its parent's score, so here it is M, and
    M more for the first slots.
    """
    ends = block_ends(tokens, budget.block_q, 0, torch.device("cpu"))
    rows = ends.diff(prepend=ends.new_zeros(1))
    searching = ~budget.sees_all(ends)
    evaluations = (budget.rounds(ends) + 1) * searching
    per_evaluation = (rows // 2).clamp(min=1) * budget.slots * budget.block_k * (1 if budget.group == 1 else 2)
    attention = rows * torch.where(searching, budget.width, ends)
    return HiPCost(
        search=int((evaluations * per_evaluation).sum()),
        attention=int(attention.sum()),
        dense=tokens * (tokens + 1) // 2,
        indices=len(ends) * budget.slots,
    )


@provides("57-hip")
@torch.no_grad()
def kept_mass(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B G K D"],
    selection: Selection,
    scale: float | None = None,
) -> Float[Tensor, "B H Q"]:
    """How much of each query's dense attention falls on the keys that it sees with a selection, between 0 and 1.

    exp(logsumexp over the keys seen - logsumexp over all); quadratic in time, linear in memory.
    """
    some = k[..., :1]
    _, kept = sparse_attention(q, k, some, selection, scale=scale, return_lse=True)
    _, total = attend(q, k, some, Causal(k.shape[2] - q.shape[2]), scale=scale, return_lse=True)
    return (kept - total).exp()


@provides("57-hip")
@torch.no_grad()
def found_blocks(
    q: Float[Tensor, "B H Q D"], k: Float[Tensor, "B G K D"], selection: Selection
) -> tuple[Float[Tensor, "B H n"], Float[Tensor, " n"]]:
    """Share of the M best blocks (by the same scores, of all blocks) that the search found, and of a random choice.

    Quadratic in time: a study, not for long prompts. Where all blocks are chosen both are 1.
    """
    budget, device = selection.budget, q.device
    if budget.group > 1:
        raise ValueError(f"group={budget.group}: the blocks of a search in groups are not comparable; use group=1")
    k = repeat_heads(k, q.shape[1])
    shares, chance, block = [], [], 0
    ends = selection.ends.tolist()
    for begin, stop, size in block_runs(q.shape[2], budget.block_q):
        for at in range(begin, stop, size):
            count = int(selection.count[block])
            candidates = int(budget.candidates(torch.tensor(ends[block])))
            rows = q[:, :, at + 1 : at + size : 2] if size > 1 else q[:, :, at : at + 1]
            tokens = torch.arange(candidates * budget.block_k, device=device).clamp(max=ends[block] - 1)
            scores = (rows @ k[:, :, tokens].mT).amax(2).unflatten(-1, (candidates, budget.block_k)).amax(-1)
            best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)
            chosen = selection.index[:, :, block, :count] // budget.block_k
            shares.append(best.gather(-1, chosen).float().sum(-1) / max(count, 1))
            chance.append(count / max(candidates, 1))
            block += 1
    return torch.stack(shares, -1), torch.tensor(chance, device=device)

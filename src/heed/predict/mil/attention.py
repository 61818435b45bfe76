"""Attention over the instances of a bag: gated logits, branches with heads, and pooling by their softmax.

    gated       A = W_w (tanh(V h) * sigmoid(U h))                     h (B, N, D) -> A (B, K, 1, N), one row per branch
    multi-head  A = q_i W_k,i h^T / sqrt(D / H)                        A (B, K, H, N)
    pooling     F = softmax(A) h, or out(softmax(A) W_v h) and a norm  F (B, K, D)

A single query meets each key here, so W_k is applied to the query and W_v to the pooled instances: the same numbers for
N D H multiplications instead of N D^2. Gates: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance
Learning", ICML 2018, arXiv 1802.04712; branches: Zhang et al., ECCV 2024, arXiv 2311.07125.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides


def exact(x: Tensor) -> Tensor:
    """At least float32: logits of -1e9 and sums over thousands of instances are beyond half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hide_padding(logits: Float[Tensor, "B K H N"], valid: Bool[Tensor, "B N"] | None) -> Float[Tensor, "B K H N"]:
    """Logits with the lowest finite value where an instance is padding; a softmax gives it exactly 0."""
    if valid is None:
        return logits
    return logits.masked_fill(~valid[:, None, None], torch.finfo(logits.dtype).min)


@provides("09-acmil")
class GatedAttention(nn.Module):
    """Gated attention logits: one network, one output row per branch.

    Args:
        dim: width D of the instances.
        hidden: width of the gates.
        branches: rows of logits K.
    """

    def __init__(self, dim: int, hidden: int = 128, branches: int = 1) -> None:
        super().__init__()
        self.tanh = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, branches)

    def forward(self, h: Float[Tensor, "B N D"]) -> Float[Tensor, "B K 1 N"]:
        """Logits (B, K, 1, N), at least float32."""
        return exact(self.score(self.tanh(h).tanh() * self.gate(h).sigmoid())).mT[:, :, None]


@provides("09-acmil")
class HeadPooling(nn.Module):
    """Values pooled by weights that each head brings: norm(dropout(out(concat_h(a_h W_v,h h)))).

    Args:
        dim: width D.
        num_heads: H; must divide `dim`.
        dropout: after the output projection.
    """

    def __init__(self, dim: int, num_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, pooled: Float[Tensor, "B H D"]) -> Float[Tensor, "B D"]:
        """Features (B, D) of instances that were pooled by the weights of each head, a_h h."""
        per_head = self.v.weight.unflatten(0, (self.num_heads, -1))
        values = torch.einsum("bhc,hdc->bhd", pooled, per_head).flatten(1) + self.v.bias
        return self.norm(self.dropout(self.out(values)))


@provides("09-acmil")
class HeadBranch(HeadPooling):
    """A branch of multi-head attention: `HeadPooling` with keys that a learned query meets."""

    def __init__(self, dim: int, num_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads, dropout)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)

    def keys_met(self, query: Float[Tensor, " D"]) -> tuple[Float[Tensor, "H D"], Float[Tensor, " H"]]:
        """The key projection seen by the query: logits are h @ weight^T + bias, per head."""
        heads = (self.num_heads, -1)
        q = self.q(query).unflatten(0, heads)
        q = q * q.shape[1] ** -0.5
        weight = torch.einsum("hd,hdc->hc", q, self.k.weight.unflatten(0, heads))
        return weight, (q * self.k.bias.unflatten(0, heads)).sum(1)


@provides("09-acmil")
class HeadBranches(nn.Module):
    """K branches of multi-head attention, each with a query and projections of its own.

    Args:
        dim: width D.
        branches: K.
        num_heads: H; must divide `dim`.
        dropout: after each branch's output projection.
    """

    def __init__(self, dim: int, branches: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        # So near zero that every branch begins by looking at all instances alike.
        self.query = nn.Parameter(torch.empty(1, branches, dim).normal_(std=1e-6))
        self.branches = nn.ModuleList(HeadBranch(dim, num_heads, dropout) for _ in range(branches))

    def forward(self, h: Float[Tensor, "B N D"]) -> Float[Tensor, "B K H N"]:
        """Logits (B, K, H, N), at least float32."""
        met = [branch.keys_met(query) for branch, query in zip(self.branches, self.query[0], strict=True)]  # type: ignore[operator]
        weight, bias = (torch.stack(part) for part in zip(*met, strict=True))
        return exact(torch.einsum("bnc,khc->bkhn", h, weight) + bias[..., None])

    def features(self, pooled: Float[Tensor, "B K H D"]) -> Float[Tensor, "B K D"]:
        """What each branch makes of the instances that its heads pooled."""
        return torch.stack([branch(x) for branch, x in zip(self.branches, pooled.unbind(1), strict=True)], 1)

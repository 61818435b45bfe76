"""The gate of SeerAttention for prompts: which blocks of the attention map matter, from pooled queries and keys (card 22).

    Q = rope(pool(q) W_q)     q (B, H, T, d) before rope, W_q (H, m_q d, g), or no W_q: the single form
    K = rope(pool(k) W_k)     k (B, G, T, d) before rope, W_k (G, m_k d, g); (H, m_k d, g) in the single form
    S = Q K^T / sqrt(g)       (B, H, n, n) for blocks j <= i, rope at the first token of each block

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", NeurIPS 2025, arXiv 2410.13276.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.projections import rotate
from heed.hosts.rules import repeat_heads
from heed.language.seer.pooling import HeadLinear, Tables, check_sizes, check_tables, pool_blocks, poolings


@provides("22-seerattention")
class AttnGate(nn.Module):
    """Scores of the blocks of one attention layer.

    The single form (no map for queries, keys repeated before theirs) is used where queries are pooled in one way and
    the width is the head's, the double form elsewhere. Weights have the names and shapes of the authors'.

    Args:
        heads: H, query heads.
        key_heads: G, key-value heads; G divides H.
        head_dim: d.
        block: b, tokens per block.
        width: g, default d.
        kind: "Q" and "K" with what they are pooled by, in the order in which the poolings stand side by side.
        force_double: the double form in any case.
        std: of the weights' first values.

    Raises:
        ValueError: sizes below 1, heads that do not divide, or an unknown kind.
    """

    def __init__(
        self,
        heads: int,
        key_heads: int,
        head_dim: int,
        block: int = 64,
        width: int | None = None,
        kind: str = "Qavg_Kmaxminavg",
        force_double: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        width = head_dim if width is None else width
        check_sizes(heads, key_heads, head_dim=head_dim, block=block, width=width)
        self.query_pools, self.key_pools = poolings(kind)
        self.heads, self.key_heads, self.block, self.width = heads, key_heads, block, width
        self.two_maps = len(self.query_pools) > 1 or width != head_dim or force_double
        wide_q, wide_k = (len(pools) * head_dim for pools in (self.query_pools, self.key_pools))
        self.mask_linear_q = HeadLinear(heads, wide_q, width, std=std) if self.two_maps else None
        self.mask_linear_k = HeadLinear(key_heads if self.two_maps else heads, wide_k, width, std=std)

    def forward(
        self, q: Float[Tensor, "B H Q D"], k: Float[Tensor, "B G K D"], tables: Tables | None = None
    ) -> Float[Tensor, "B H m n"]:
        """Scores of the blocks of queries against those of keys, in float32; the lowest value where j > i.

        Args:
            q: (B, H, Q, d) queries before rotary embedding, the last Q of the K tokens.
            k: (B, G, K, d) keys before rotary embedding.
            tables: cosines and sines (B or 1, n, r) at the first token of every block of keys; r <= g channels are
                rotated. None for a host without rotary embedding.

        Returns:
            (B, H, m, n): m blocks hold the queries, of n = ceil(K / b) that hold the keys. The first may be a block of
            which the cache has the first tokens.

        Raises:
            ValueError: no token, more queries than keys, or tables that do not fit.
        """
        queries, keys = q.shape[2], k.shape[2]
        if not 0 < queries <= keys:
            raise ValueError(f"{queries} queries and {keys} keys: the queries must be the last tokens, at least one")
        first, lead = divmod(keys - queries, self.block)
        q = pool_blocks(q, self.query_pools, self.block, lead)
        k = pool_blocks(k, self.key_pools, self.block)
        if self.mask_linear_q is None:
            k = repeat_heads(k, self.heads)
            q = q.to(self.mask_linear_k.weight.dtype)
        else:
            q = self.mask_linear_q(q)
        k = self.mask_linear_k(k)
        if tables is not None:
            check_tables(tables, k.shape[2], self.width)
            q = rotate(q, *(table[:, first:] for table in tables))
            k = rotate(k, *tables)
        scores = (q @ repeat_heads(k, self.heads).mT * self.width**-0.5).float()
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
        return scores.masked_fill(future, torch.finfo(torch.float32).min)

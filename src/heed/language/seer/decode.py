"""SeerAttention-R: a gate for decoding, which says for every token which blocks of the cache matter, per key-value head.

    Q = rope(norm(sum over the heads of a group of q W_q))    q (B, H, N, d), W_q (G, H / G, d, g); or see `kind`
    K = rope(norm(pool(k) W_k))                               k (B, G, T, d), W_k (G, m d, g), rope at a block's start
    S = Q K^T / sqrt(g)                                       (B, G, N, n) for blocks before the token's own

Decoding keeps K for every block of the cache, and the keys of the block that is not yet full (`CompressedKeys`).
Gao et al., "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning", arXiv 2506.08889.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.projections import rotate
from heed.hosts.rules import repeat_heads
from heed.language.seer.pooling import HeadLinear, Tables, check_sizes, check_tables, pool_blocks, poolings

MASKED = -1e20  # the score of a block that a token must not be scored with
_EPS = 1e-6


@provides("22-seerattention")
class DecodeGate(nn.Module):
    """Scores of the blocks of keys of one attention layer, for single tokens; weights are named and shaped as the authors'.

    Args:
        heads: H, query heads.
        key_heads: G, key-value heads; G divides H.
        head_dim: d.
        block: b, tokens per block.
        width: g, default d. The authors' caches want g = d; here any will do.
        kind: what becomes of the queries of a group: "Qproj" (a map for each, then the sum), "Qavgproj" (mean, then a
            map), "Qavg" (mean), "Qorig" (each on its own, then the mean of the scores); and how keys are pooled.
        qk_norm: RMS norms after the maps, as for Qwen3.
        std: of the weights' first values.

    Raises:
        ValueError: sizes below 1, heads that do not divide, an unknown kind, or one without a map where g is not d.
    """

    def __init__(
        self,
        heads: int,
        key_heads: int,
        head_dim: int,
        block: int = 64,
        width: int | None = None,
        kind: str = "Qproj_Kmaxminavg",
        qk_norm: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        width = head_dim if width is None else width
        check_sizes(heads, key_heads, head_dim=head_dim, block=block, width=width)
        (self.queries,), self.key_pools = poolings(kind, decode=True)
        if self.queries in ("avg", "orig") and width != head_dim:
            raise ValueError(f"{kind} has no map for queries, so width={width} must be head_dim={head_dim}")
        self.heads, self.key_heads, self.block, self.width = heads, key_heads, block, width
        group = heads // key_heads
        shapes = {"proj": (key_heads, group, head_dim, width), "avgproj": (key_heads, head_dim, width)}
        self.attngate_linear_q = HeadLinear(*shapes[self.queries], std=std) if self.queries in shapes else None
        self.attngate_linear_k = HeadLinear(key_heads, len(self.key_pools) * head_dim, width, std=std)
        self.attngate_qnorm = nn.RMSNorm(width, eps=_EPS) if qk_norm else None
        self.attngate_knorm = nn.RMSNorm(width, eps=_EPS) if qk_norm else None

    def forward(
        self, q: Float[Tensor, "B H Q D"], k: Float[Tensor, "B G K D"], tables: Tables | None = None
    ) -> Float[Tensor, "B G Q n"]:
        """Scores of all blocks for all queries, in float32; -1e20 for a query's own block and those after it.

        Args:
            q: (B, H, Q, d) queries before rotary embedding, the last Q of the K tokens.
            k: (B, G, K, d) keys before rotary embedding.
            tables: cosines and sines (B or 1, K, r) of the tokens; r <= g. None for a host without rotary embedding.

        Raises:
            ValueError: no token, more queries than keys, or tables that do not fit.
        """
        queries, keys = q.shape[2], k.shape[2]
        if not 0 < queries <= keys:
            raise ValueError(f"{queries} queries and {keys} keys: the queries must be the last tokens, at least one")
        at_queries, at_blocks = None, None
        if tables is not None:
            at_queries = tables[0][:, keys - queries :], tables[1][:, keys - queries :]
            at_blocks = tables[0][:, :: self.block], tables[1][:, :: self.block]
        scores = self.scores(self.ask(q, at_queries), self.compress(k, at_blocks))
        own = torch.arange(keys - queries, keys, device=q.device)[:, None] // self.block
        return scores.masked_fill(torch.arange(scores.shape[-1], device=q.device) >= own, MASKED)

    def ask(self, q: Float[Tensor, "B H N D"], tables: Tables | None) -> Float[Tensor, "B P N W"]:
        """What queries (before rotary embedding) are compared with; one per group, or for "Qorig" one per head."""
        if self.queries != "orig":
            grouped = q.unflatten(1, (self.key_heads, -1))
            if self.queries == "proj":
                assert self.attngate_linear_q is not None  # this kind has one
                q = self.attngate_linear_q(grouped).sum(2)
            else:
                q = grouped.mean(2)
                q = q if self.attngate_linear_q is None else self.attngate_linear_q(q)
        if self.attngate_qnorm is not None:
            q = self.attngate_qnorm(q)
        return self._rotated(q, tables)

    def compress(self, k: Float[Tensor, "B G T D"], tables: Tables | None) -> Float[Tensor, "B G n W"]:
        """Every block of keys (before rotary embedding) as one; tables at the places where they are to be rotated."""
        k = self.attngate_linear_k(pool_blocks(k, self.key_pools, self.block))
        if self.attngate_knorm is not None:
            k = self.attngate_knorm(k)
        return self._rotated(k, tables)

    def scores(self, asked: Float[Tensor, "B P N W"], compressed: Float[Tensor, "B G n W"]) -> Float[Tensor, "B G N n"]:
        """All of them, also of blocks that are not before the token."""
        scores = asked @ repeat_heads(compressed, asked.shape[1]).mT.to(asked.dtype) * self.width**-0.5
        return scores.float().unflatten(1, (self.key_heads, -1)).mean(2)

    def _rotated(self, x: Tensor, tables: Tables | None) -> Tensor:
        if tables is None:
            return x
        check_tables(tables, x.shape[2], self.width)
        return rotate(x, *tables)


@provides("22-seerattention")
class CompressedKeys:
    """The blocks of a cache, each as one vector, kept up to date while tokens are decoded.

    A block that is not yet full counts as 0. One that fills while decoding is rotated as its last token is, whereas one
    of the prompt is rotated as its first, as the authors have it.

    Args:
        gate: what compresses.
        first_token: rotate a block that fills while decoding as its first token, like those of the prompt.

    Attributes:
        blocks: (B, G, n, g), n = ceil(tokens / b).
        tail: (B, G, t, d) keys before rotary embedding of the block that is not yet full, t < b.
        tokens: how many there are.
    """

    def __init__(self, gate: DecodeGate, *, first_token: bool = False) -> None:
        self.gate, self.first_token = gate, first_token
        self.tokens = 0
        self.blocks = self.tail = torch.empty(0)
        self._start: Tables | None = None

    def prefill(self, k: Float[Tensor, "B G T D"], tables: Tables | None) -> None:
        """Begin with the keys of a prompt, before rotary embedding, and the tables (B or 1, T, r) of its tokens."""
        block, self.tokens = self.gate.block, k.shape[2]
        whole = self.tokens // block * block
        self.tail = k[:, :, whole:].detach().clone()
        if tables is not None:
            self._start = tables[0][:, whole : whole + 1], tables[1][:, whole : whole + 1]
            tables = tables[0][:, :whole:block], tables[1][:, :whole:block]
        width = self.gate.width
        full = self.gate.compress(k[:, :, :whole], tables) if whole else self.gate.attngate_linear_k.weight
        self.blocks = full.detach() if whole else full.new_zeros(*k.shape[:2], 0, width)
        if self.tail.shape[2]:
            self.blocks = F.pad(self.blocks, (0, 0, 0, 1))

    def append(self, k: Float[Tensor, "B G 1 D"], tables: Tables | None) -> None:
        """One more key before rotary embedding, and the tables (B or 1, 1, r) of its token."""
        if self.tail.shape[2] == 0:
            self.blocks = F.pad(self.blocks, (0, 0, 0, 1))
            self._start = tables
        self.tail = torch.cat([self.tail, k.detach()], 2)
        self.tokens += 1
        if self.tail.shape[2] == self.gate.block:
            full = self.gate.compress(self.tail, self._start if self.first_token else tables)
            self.blocks = torch.cat([self.blocks[:, :, :-1], full.detach().to(self.blocks.dtype)], 2)
            self.tail = self.tail[:, :, :0]

"""Selective self-attention (card 18): every query and every value has a temperature of its own, so attention can be sharp
for one token and even for the next.

    q_i = tau_q[i] W_q x_i,   k_j = W_k x_j,   v_j = tau_v[j] W_v x_j
    y_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j

The products go through any fused kernel, since a factor on the query is a factor on its scores. See `heed.layers.temperature`
for tau. Zhang et al., NeurIPS 2024 (arXiv 2411.12892). In a trained language model, `heed.language.selective` adds the same
temperatures.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal, Full
from heed.layers.attention import check_heads
from heed.layers.registry import layers
from heed.layers.temperature import Selective, Which


@provides("18-selective-ssa")
class SelectiveAttention(nn.Module):
    """Self-attention with temperatures, a drop-in on sequences (B, N, C) and on grids (B, H, W, C).

    Args:
        dim: channels C.
        num_heads: query heads; must divide dim.
        kv_heads: key-value heads; must divide num_heads; default as many.
        causal: whether a token sees only itself and those before it; on a sequence.
        settings: which temperatures; default those of `Selective` with scores from Xavier's start.
        bias: whether the projections have biases.
        dropout: on the weights, in training.

    Positions count the tokens that a query sees: 1, 2, ... where attention is causal, else all of them (heed's own reading:
    the paper's models are causal).

    Raises:
        ValueError: heads that do not divide, or an input that does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        settings: Selective | None = None,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.causal, self.dropout = dim, num_heads, causal, dropout
        self.head_dim = check_heads(dim, num_heads)
        self.kv_heads = num_heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or num_heads % self.kv_heads:
            raise ValueError(f"num_heads={num_heads} is not a multiple of kv_heads={kv_heads}")
        self.settings = settings or Selective(scratch=True)
        self.q_proj = nn.Linear(dim, dim, bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias)
        self.o_proj = nn.Linear(dim, dim, bias)
        self.tau_query = self.settings.temperature("query", num_heads, self.head_dim, dim)
        self.tau_value = self.settings.temperature("value", self.kv_heads, self.head_dim, dim)
        self.tau_key = self.settings.temperature("key", self.kv_heads, self.head_dim, dim)

    def temperatures(
        self,
        x: Float[Tensor, "B N C"],
        positions: Int[Tensor, "#B N"],
    ) -> dict[Which, Float[Tensor, "B H N"]]:
        """tau (B, heads, N) of what has one.

        Args:
            x: (B, N, C).
            positions: (B or 1, N) from 1 on.
        """
        return self._temperatures(*self._project(x), x, positions)

    def _temperatures(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, positions: Tensor) -> dict[Which, Tensor]:
        found: dict[Which, tuple[nn.Module | None, Tensor]]
        found = {"query": (self.tau_query, q), "value": (self.tau_value, v), "key": (self.tau_key, k)}
        return {name: tau(vectors, positions, x) for name, (tau, vectors) in found.items() if tau is not None}

    def positions(self, tokens: int, key_mask: Bool[Tensor, "B N"] | None = None) -> Int[Tensor, "#B N"]:
        """(B or 1, N) how many tokens every query sees, at least 1; padding does not count."""
        real = (
            torch.ones(1, tokens, dtype=torch.bool, device=self.q_proj.weight.device) if key_mask is None else key_mask
        )
        seen = real.cumsum(-1) if self.causal else real.sum(-1, keepdim=True).expand(-1, tokens)
        return seen.clamp(min=1)

    def forward(
        self,
        x: Float[Tensor, "B ... C"],
        key_mask: Bool[Tensor, "B N"] | None = None,
        positions: Int[Tensor, "#B N"] | None = None,
    ) -> Float[Tensor, "B ... C"]:
        """Mix tokens.

        Args:
            x: (B, *layout, C), e.g. (B, N, C) or (B, H, W, C).
            key_mask: (B, N) bool, False where a token is padding.
            positions: (B or 1, N) from 1 on; default those of `positions`.
        """
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"SelectiveAttention takes (B, ..., {self.dim}), channels last; got {tuple(x.shape)}")
        if self.causal and x.ndim > 3:
            raise ValueError(
                f"causal attention is on a sequence (B, N, C), not on {tuple(x.shape)}; flatten the tokens"
            )
        tokens = x.flatten(1, -2)
        if positions is None:
            positions = self.positions(tokens.shape[1], key_mask)
        q, k, v = self._project(tokens)
        tau = {which: t[..., None].to(x.dtype) for which, t in self._temperatures(q, k, v, tokens, positions).items()}
        q, k, v = q * tau.get("query", 1), k * tau.get("key", 1), v * tau.get("value", 1)
        pattern = Causal() if self.causal else Full()
        out = attend(q, k, v, pattern, key_mask=key_mask, dropout=self.dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to q (B, H, N, d), k and v (B, G, N, d)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kv_heads={self.kv_heads}, causal={self.causal}"


@layers.register("selective")
def _selective(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # Where every query sees all tokens, a gain on ln n is one number for the layer: let it start where scores matter.
    options.setdefault("settings", Selective(scratch=True, gain=0.5 / math.log(max(2, grid[0] * grid[1]))))
    return SelectiveAttention(dim, num_heads, **options)  # type: ignore[arg-type]

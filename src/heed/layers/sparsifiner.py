"""Sparsifiner (card 17): a low-rank connectivity predictor says, per image, head and query, which keys attention keeps.

N tokens of which the first `prefix` (the class token) are no patches, h heads of width c, r = c // reduce_c,
K = N // reduce_n; q, k of every head (N, c):

    coef   = softmax(h^-1/2 * (q W_q) ((k W_k)^T W_down))           (N - prefix, K), its largest entries kept
    scores = coef |W_up|^T                                          (N - prefix, N), small entries of |W_up| left out
    keep the ceil(keep * N) largest of every row; prefix rows keep all
    y = softmax(c^-1/2 * q k^T over the kept pairs) v

Wei, Duke, Jiang, Aarabi, Taylor, Shkurti, "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers", CVPR 2023, arXiv 2303.13755. Parameter names are the authors'. Their code computes all pairs and masks
them; here only kept pairs are computed. Rows with equal scores keep the first keys, where the authors' choice is
arbitrary.

Queries that share a choice (`share` > 1) are heed's own addition: the same predictor decides for a run of that many patch
queries at once, from their mean. Their keys are gathered once and their scores are one matrix product, so that pairs saved
can become time saved; benchmarks/sparsifiner.py measures from which sizes on they do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full, Selected
from heed.engine.precision import no_autocast
from heed.layers.attention import check_heads
from heed.layers.registry import layers


class Connectivity(NamedTuple):
    """What a predictor says of R patch queries (or runs of queries that share a choice).

    scores (B, h, R, N); coefficients (B, h, R, K); index (B, h, R, slots) the kept keys, -1 for an empty slot; share, how
    many consecutive queries share a choice.
    """

    scores: Tensor
    coefficients: Tensor
    index: Tensor
    share: int

    @property
    def kept(self) -> Tensor:
        """(B, h, R, N) bool"""
        chosen = self.scores.new_zeros((*self.scores.shape[:3], self.scores.shape[3] + 1), dtype=torch.bool)
        return chosen.scatter_(3, self.index % chosen.shape[3], True)[..., :-1]  # -1 lands in the extra column


class AttentionTrace(NamedTuple):
    """One layer in full: output (B, N, C), mask (B, h, N, N) bool, the weights with and without it (B, h, N, N)."""

    output: Tensor
    mask: Tensor
    masked: Tensor
    unmasked: Tensor
    connectivity: Connectivity


@provides("17-sparsifiner")
class ConnectivityPredictor(nn.Module):
    """Which keys every patch query keeps; see the module for the equations. No gradient passes through the choice.

    While `reconstructing` is set and the module trains, scores are the raw low-rank product that is fitted to a
    teacher's attention: coefficients stay dense and W_up keeps its sign.

    Args:
        head_dim: width c of a head.
        num_heads: heads h; all share the parameters.
        num_tokens: N, prefix included; the weights fit this number only.
        keep: share of the keys that a query keeps, in (0, 1]; None selects by `score_threshold`.
        score_threshold: keep keys that score above this; for keep=None (the authors suggest 1e-4).
        reduce_n, reduce_c: K = N // reduce_n, r = c // reduce_c.
        coef_topk: coefficients that a query keeps; None selects by `coef_threshold`.
        coef_threshold: keep coefficients above this, 0 keeps all; for coef_topk=None.
        basis_threshold: entries of |W_up| up to this count as 0.
        shared_projection: W_up is W_down.
        prune_rows: tokens that a token mask has pruned keep no key at all as queries.
        prefix: tokens before the patches; they see every key.
        share: consecutive patch queries that share one choice; 1 is the authors' mechanism.

    Raises:
        ValueError: a setting outside its range, or factors that leave no width.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_tokens: int,
        *,
        keep: float | None = 0.25,
        score_threshold: float | None = None,
        reduce_n: int = 6,
        reduce_c: int = 2,
        coef_topk: int | None = 8,
        coef_threshold: float = 0.05,
        basis_threshold: float = 0.02,
        shared_projection: bool = False,
        prune_rows: bool = False,
        prefix: int = 1,
        share: int = 1,
    ) -> None:
        super().__init__()
        if (keep is None) == (score_threshold is None):
            raise ValueError(f"keep={keep} and score_threshold={score_threshold}: give one of them, to select keys by")
        if keep is not None and not 0 < keep <= 1:
            raise ValueError(f"keep={keep} must lie in (0, 1]; it is the share of keys that a query keeps")
        rank, width = head_dim // reduce_c, num_tokens // reduce_n
        if rank < 1 or width < 1:
            raise ValueError(
                f"reduce_c={reduce_c} and reduce_n={reduce_n} leave {rank} channels of {head_dim} and {width} basis "
                f"vectors for {num_tokens} tokens; at least 1 of each is needed"
            )
        if coef_topk is not None and not 1 <= coef_topk <= width:
            raise ValueError(
                f"coef_topk={coef_topk} must lie in 1..{width}; {num_tokens} tokens // reduce_n={reduce_n} make {width}"
            )
        if not 0 <= prefix < num_tokens or share < 1:
            raise ValueError(f"prefix={prefix} must lie in 0..{num_tokens - 1}, and share={share} be at least 1")
        self.num_heads = num_heads
        self.num_tokens = num_tokens
        self.keep = keep
        self.score_threshold = score_threshold
        self.coef_topk = coef_topk
        self.coef_threshold = coef_threshold
        self.basis_threshold = basis_threshold
        self.prune_rows = prune_rows
        self.prefix = prefix
        self.share = share
        self.reconstructing = False
        self.proj_c_q = nn.Linear(head_dim, rank)
        self.proj_c_k = nn.Linear(head_dim, rank)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, width))
        self.proj_back_n = None if shared_projection else nn.Parameter(torch.empty(num_tokens, width))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    @property
    def reconstructs(self) -> bool:
        """Whether scores are being fitted to a teacher, and attention runs unmasked."""
        return self.training and self.reconstructing

    @property
    def up(self) -> Tensor:
        """W_up (N, K)"""
        return self.proj_n if self.proj_back_n is None else self.proj_back_n

    def basis(self) -> Float[Tensor, "K N"]:
        """The K patterns over keys that scores are made of."""
        if self.reconstructs:
            return self.up.T
        return F.threshold(self.up.abs().T.contiguous(), self.basis_threshold, 0.0)

    def forward(
        self,
        q: Float[Tensor, "B h N c"],
        k: Float[Tensor, "B h N c"],
        token_mask: Bool[Tensor, "B P"] | None = None,
    ) -> Connectivity:
        """Choose keys.

        Args:
            q, k: (B, h, N, c) queries and keys.
            token_mask: (B, N - prefix) bool, False for patches that have been pruned; every image keeps the same number.

        Returns:
            Scores, coefficients and kept keys of the N - prefix patch queries.
        """
        if q.shape[2] != self.num_tokens or k.shape[2] != self.num_tokens:
            raise ValueError(
                f"{q.shape[2]} queries and {k.shape[2]} keys given; this predictor's weights are those of "
                f"{self.num_tokens} tokens"
            )
        active = None if token_mask is None else self._active(token_mask, len(q))
        with no_autocast(q):  # in half precision many scores would tie
            q, k = (x.to(self.proj_n.dtype) for x in (q, k))
            queries, keys = self.proj_c_q(run_means(q[:, :, self.prefix :], self.share)), self.proj_c_k(k)
            if token_mask is not None:
                queries = queries * token_mask[:, None, :, None]
                keys = keys * F.pad(token_mask, (self.prefix, 0), value=True)[:, None, :, None]
            coef = (self.num_heads**-0.5 * (queries @ (keys.mT @ self.proj_n))).softmax(-1)
            coef, scores = self._combine(coef, self.basis())
        return Connectivity(scores, coef, self._choose(scores.detach(), token_mask, active), self.share)

    def mask(self, found: Connectivity) -> Bool[Tensor, "B h N N"]:
        """The choice as a mask over all tokens; prefix rows are full."""
        kept = found.kept.repeat_interleave(self.share, 2)[:, :, : self.num_tokens - self.prefix]
        return F.pad(kept, (0, 0, self.prefix, 0), value=True)

    def _active(self, token_mask: Tensor, batch: int) -> int:
        """How many patches a token mask leaves in every image."""
        wanted = (batch, self.num_tokens - self.prefix)
        if token_mask.shape != wanted or token_mask.dtype != torch.bool:
            raise ValueError(f"token_mask must be bool {wanted}, not {token_mask.dtype} {tuple(token_mask.shape)}")
        if self.share > 1:
            raise ValueError(f"token_mask with share={self.share}: pruned tokens need share=1")
        counts = token_mask.sum(1)
        if (counts != counts[0]).any():
            raise ValueError(f"token_mask leaves {counts.tolist()} patches; every image must keep the same number")
        return int(counts[0])

    def _combine(self, coef: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Sparse coefficients, and the scores: with few coefficients a sum of as many basis rows per query."""
        if self.reconstructs:
            return coef, coef @ basis
        if self.coef_topk is None:
            coef = torch.where(coef > self.coef_threshold, coef, 0) if self.coef_threshold else coef
            return coef, coef @ basis
        index = largest(coef.detach(), self.coef_topk)
        few = coef.gather(-1, index)
        # 32-bit indices take the vectorised kernel.
        scores = F.embedding_bag(index.flatten(0, 2).int(), basis, per_sample_weights=few.flatten(0, 2), mode="sum")
        return torch.zeros_like(coef).scatter(-1, index, few), scores.view(*coef.shape[:3], -1)

    def _choose(self, scores: Tensor, token_mask: Tensor | None, active: int | None) -> Tensor:
        if token_mask is not None:
            scores = scores.masked_fill(~F.pad(token_mask, (self.prefix, 0), value=True)[:, None, None, :], -torch.inf)
        if self.keep is None:
            keys = torch.arange(scores.shape[-1], device=scores.device)
            index = torch.where(scores > (self.score_threshold or 0.0), keys, -1)
        else:
            budget = math.ceil(self.keep * scores.shape[-1])
            index = largest(scores, budget if active is None else min(budget, active))
        if self.prune_rows and token_mask is not None:
            index = index.masked_fill(~token_mask[:, None, :, None], -1)
        return index

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, keep={self.keep}, share={self.share}"


def largest(scores: Float[Tensor, "... M"], count: int) -> Int[Tensor, "... {count}"]:
    """Indices of the `count` largest entries of every row, in any order; of equal ones the first."""
    if torch.compiler.is_compiling():  # a compiled graph cannot look at values
        return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    values, index = scores.topk(count, -1, sorted=False)
    reached = scores >= values.amin(-1, keepdim=True)
    if int(reached.count_nonzero()) > index.numel():
        tied = reached.sum(-1) > count
        index[tied] = scores[tied].argsort(dim=-1, descending=True, stable=True)[..., :count]
    return index


def run_means(x: Tensor, size: int) -> Tensor:
    """Means over runs of `size` along the last axis but one; the last run may be shorter."""
    if size == 1:
        return x
    whole = x.shape[-2] // size * size
    means = [x[..., :whole, :].unflatten(-2, (-1, size)).mean(-2)]
    if whole < x.shape[-2]:
        means.append(x[..., whole:, :].mean(-2, keepdim=True))
    return torch.cat(means, -2)


@provides("17-sparsifiner")
class SparsifinerAttention(nn.Module):
    """Multi-head self-attention over the pairs that a `ConnectivityPredictor` keeps.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        num_tokens: N, prefix included.
        qkv_bias: whether the query, key and value projections have biases.
        proj_drop: dropout on the output while training.
        options: settings of the `ConnectivityPredictor`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.mask_predictor = ConnectivityPredictor(self.head_dim, num_heads, num_tokens, **options)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_attention(cls, attention: nn.Module, num_tokens: int, **options: Any) -> Self:
        """Take over the weights of timm's ViT attention (the modules themselves, not copies).

        Args:
            attention: a module with `qkv`, `proj`, `num_heads` and perhaps `q_norm`, `k_norm`, `proj_drop`.
            num_tokens: N of its host, prefix included.
            options: settings of the `ConnectivityPredictor`.

        Raises:
            ValueError: an attention that does more than that (gates, norms on its output, heads of another width).
        """
        extra = [
            name for name in ("norm", "gate") if not isinstance(getattr(attention, name, None), nn.Identity | None)
        ]
        if extra or not isinstance(getattr(attention, "qkv", None), nn.Linear):
            raise ValueError(
                f"{type(attention).__name__} cannot be converted: "
                + (f"it has {' and '.join(extra)}" if extra else "it has no joint projection `qkv`")
            )
        qkv, proj, heads = attention.qkv, attention.proj, attention.num_heads
        if qkv.out_features != 3 * qkv.in_features or proj.out_features != qkv.in_features:  # type: ignore[union-attr]
            raise ValueError(f"{type(attention).__name__} cannot be converted: its heads do not make up its channels")
        with torch.device("meta"):
            layer = cls(qkv.in_features, heads, num_tokens, **options)  # type: ignore[arg-type,union-attr]
        head_dim = layer.head_dim
        layer.mask_predictor = ConnectivityPredictor(head_dim, heads, num_tokens, **options)  # type: ignore[arg-type]
        layer.mask_predictor.to(qkv.weight)  # type: ignore[union-attr,call-overload]
        layer.qkv, layer.proj = qkv, proj  # type: ignore[assignment]
        for name in ("q_norm", "k_norm", "proj_drop"):
            if hasattr(attention, name):
                setattr(layer, name, getattr(attention, name))
        return layer

    def forward(
        self,
        x: Float[Tensor, "B ... C"],
        token_mask: Bool[Tensor, "B P"] | None = None,
        *,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "B ... C"]:
        """Mix tokens, computing kept pairs only.

        Args:
            x: (B, N, C), or (B, H, W, C) with prefix=0.
            token_mask: (B, N - prefix) bool, False for pruned patches, which take no part.
            attn_mask, is_causal: what timm's blocks pass; other masks than the predicted one are refused.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal: this layer predicts its own mask")
        return self.attend(x, token_mask)[0]

    def attend(
        self, x: Float[Tensor, "B ... C"], token_mask: Bool[Tensor, "B P"] | None = None, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and with `weights` the attention of the prefix rows (B, h, prefix, N), which is dense."""
        q, k, v = self._qkv(x, token_mask)
        prefix = self.mask_predictor.prefix
        if self.mask_predictor.reconstructs:
            y = attend(q, k, v, Full())
            first = attend(q[:, :, :prefix], k, v, Full(), return_weights=True)[1] if weights else None
            return self._out(y, x), first
        found = self.mask_predictor(q, k, token_mask)
        parts, first = [], None
        if prefix:
            head = attend(q[:, :, :prefix], k, v, Full(), return_weights=weights)
            head, first = head if isinstance(head, tuple) else (head, None)
            parts.append(head)
        parts.append(attend(q[:, :, prefix:], k, v, Selected(found.index, (self.mask_predictor.share, 1))))
        return self._out(torch.cat(parts, 2), x), first

    def trace(self, x: Float[Tensor, "B ... C"], token_mask: Bool[Tensor, "B P"] | None = None) -> AttentionTrace:
        """The layer computed densely, with everything that objectives and pictures ask for."""
        q, k, v = self._qkv(x, token_mask)
        found = self.mask_predictor(q, k, token_mask)
        mask = self.mask_predictor.mask(found)
        y, unmasked = attend(q, k, v, Full(), return_weights=True)
        masked = unmasked
        if not self.mask_predictor.reconstructs:
            index = torch.where(mask, torch.arange(mask.shape[-1], device=x.device), -1)
            y, masked = attend(q, k, v, Selected(index, (1, 1)), return_weights=True)
        return AttentionTrace(self._out(y, x), mask, masked, unmasked, found)

    @torch.no_grad()
    def macs(self, *, density: float | None = None, active: int | None = None) -> dict[str, float]:
        """Multiply-adds of one image's attention products, without qkv and proj.

        Args:
            density: share of basis entries that are not 0; default the measured one.
            active: tokens that take part after token pruning, prefix included; default all.

        Returns:
            "dense", what full attention over all tokens takes; "predictor", "up" and "attention", what this layer takes.
        """
        predictor = self.mask_predictor
        n, (rank, width) = active or predictor.num_tokens, (predictor.proj_c_q.out_features, predictor.proj_n.shape[1])
        if density is None:
            density = (predictor.basis() != 0).float().mean().item()
        coefs = predictor.coef_topk or width
        kept = min(1.0, predictor.keep or 1.0)
        queries = -(-n // predictor.share)
        return {
            "dense": 2.0 * predictor.num_tokens**2 * self.dim,
            "predictor": (n + queries) * (self.dim * rank + self.num_heads * rank * width),
            "up": self.num_heads * queries * coefs * n * density,
            "attention": 2.0 * kept * n**2 * self.dim,
        }

    def _qkv(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[-1] != self.dim or x.ndim < 3:
            raise ValueError(f"input {tuple(x.shape)}: this layer takes (B, N, {self.dim}), channels last")
        x = x.flatten(1, -2)
        if x.shape[1] != self.mask_predictor.num_tokens:
            raise ValueError(
                f"input of {x.shape[1]} tokens: this layer's predictor takes {self.mask_predictor.num_tokens}"
            )
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if token_mask is None or self.mask_predictor.reconstructs:
            return q, k, v
        self.mask_predictor._active(token_mask, len(x))
        active = F.pad(token_mask, (self.mask_predictor.prefix, 0), value=True)[:, None, :, None]
        return q * active, k * active, v * active

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))


@layers.register("sparsifiner")
def _sparsifiner(dim: int, num_heads: int, grid: tuple[int, int], **options: Any) -> nn.Module:
    tokens = grid[0] * grid[1]
    options.setdefault("reduce_n", min(6, tokens))
    options.setdefault("coef_topk", min(8, tokens // options["reduce_n"]))
    return SparsifinerAttention(dim, num_heads, tokens, prefix=0, **options)

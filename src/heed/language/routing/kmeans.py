"""Online k-means over the queries and keys of a head: distances to centroids, losses, and centroids that follow the tokens.

    dist[b, h, t, c] = -<x[b, h, t], mu[h, c]>,   z = argmin_c dist        x (B, H, T, d), mu (H, K, d)
    loss = beta * mean (x - sg mu_z)^2   ( + mean (sg x - mu_z)^2 where centroids learn by gradient)

    while training, by moving averages (rate = decay):
    n <- decay n + (1 - decay) sum [z = c];     m <- decay m + (1 - decay) sum_{z = c} x
    mu = m / ( (n + 1e-5) / (N + K 1e-5) * N ),   N = sum_c n

Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021, arXiv
2003.05997; losses and averages after van den Oord et al. (VQ-VAE), arXiv 1711.00937. n starts at 0 in the authors' code,
so that the centroids of the first steps are far too long; `initial_count=1` avoids it. Their n is dealt to heads by a
reshape that mixes heads; released centroids depend on it, and `fix_count=True` counts every head's own tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as replicas
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.precision import no_autocast

_EPS = 1e-5


@provides("08-routing")
class OnlineKMeans(nn.Module):
    """Centroids of the heads of one layer; `means`, `ema_count` and `ema_means` are saved.

    Args:
        heads: H, each with centroids of its own.
        dim: d, width of a head.
        clusters: K.
        beta: weight of the commitment loss.
        decay: of the moving averages.
        ema: whether centroids are moving averages; otherwise they are trained by gradient.
        fix_count: count the tokens of each head itself; the authors' code deals counts to heads by flat index.
        initial_count: what n starts at: 0 in the authors' code.

    Raises:
        ValueError: no clusters, or a decay outside [0, 1).
    """

    ema_count: Tensor
    ema_means: Tensor

    def __init__(
        self,
        heads: int,
        dim: int,
        clusters: int,
        *,
        beta: float = 1e-4,
        decay: float = 0.999,
        ema: bool = True,
        fix_count: bool = False,
        initial_count: float = 0.0,
    ) -> None:
        super().__init__()
        if clusters < 1:
            raise ValueError(f"clusters={clusters} must be at least 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must lie in [0, 1); 0.999 keeps a memory of about 1000 steps")
        self.beta, self.decay, self.ema, self.fix_count = beta, decay, ema, fix_count
        means = normalise(torch.randn(heads, clusters, dim))
        self.means = nn.Parameter(means, requires_grad=not ema)
        self.register_buffer("ema_count", torch.full((heads, clusters), float(initial_count)))
        self.register_buffer("ema_means", means.clone())

    def forward(
        self, x: Float[Tensor, "B H T d"], other: Float[Tensor, "B H S d"] | None = None
    ) -> tuple[list[Float[Tensor, "B H _ K"]], Float[Tensor, ""]]:
        """Distances of x, and of other tokens that share the centroids (keys next to queries), and the loss of both.

        The centroids move in training mode, after both distances have been taken. Where keys equal queries pass x alone: it
        counts for both in the loss, once in the averages.
        """
        tokens = [x] if other is None else [x, other]
        found = [self.distances(y) for y in tokens]
        nearest = [distance.argmin(-1) for distance in found]
        losses = [self._loss(y, near) for y, near in zip(tokens, nearest, strict=True)]
        if self.training and self.ema and not _recomputing():
            for y, near in zip(tokens, nearest, strict=True):
                self._update(y, near)
        return found, sum(losses, x.new_zeros(())) * (2 if other is None else 1)

    @torch.no_grad()
    def distances(self, x: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T K"]:
        """-<x, mu>; membership has no gradient."""
        with no_autocast(x):  # near ties would fall otherwise in half precision
            return -(x.to(self.means.dtype) @ self.means.transpose(-1, -2))

    def _loss(self, x: Tensor, nearest: Tensor) -> Tensor:
        heads = torch.arange(self.means.shape[0], device=x.device)[:, None]
        routed = self.means.to(x.dtype)[heads, nearest]
        commitment = self.beta * F.mse_loss(x, routed.detach())
        return commitment if self.ema else commitment + F.mse_loss(x.detach(), routed)

    @torch.no_grad()
    def _update(self, x: Float[Tensor, "B H T d"], nearest: Int64[Tensor, "B H T"]) -> None:
        heads, clusters = self.ema_count.shape
        x = x.to(self.means.dtype)
        hot = F.one_hot(nearest, clusters).to(x.dtype) * (x.abs().sum(-1, keepdim=True) > 0)
        count = hot.sum((0, 2)) if self.fix_count else hot.reshape(-1, heads, clusters).sum(0)
        with no_autocast(x):
            total = torch.einsum("bhtk,bhtd->hkd", hot, x)
        if replicas.is_available() and replicas.is_initialized():
            replicas.all_reduce(count)
            replicas.all_reduce(total)
        self.ema_count.lerp_(count, 1 - self.decay)
        self.ema_means.lerp_(total, 1 - self.decay)
        size = self.ema_count.sum(-1, keepdim=True)
        smoothed = (self.ema_count + _EPS) / (size + clusters * _EPS) * size
        # Where no token of any row was counted yet there is nothing to move to.
        self.means.copy_(torch.where(size[..., None] > 0, self.ema_means / smoothed[..., None], self.means))

    def extra_repr(self) -> str:
        heads, clusters, dim = self.means.shape
        return f"heads={heads}, clusters={clusters}, dim={dim}, decay={self.decay}, ema={self.ema}"


@provides("08-routing")
class HashedClusters(nn.Module):
    """Locality-sensitive hashing in the place of k-means, for comparison: signs of fixed orthogonal projections.

    bucket = sum_i 2^i [<x, p_i> > 0] with floor(log2 K) projections per head; distance -1 to a token's own bucket, else 0

    Args:
        heads, dim, clusters: as in `OnlineKMeans`; buckets beyond the largest power of two in K stay empty.
    """

    projections: Tensor

    def __init__(self, heads: int, dim: int, clusters: int) -> None:
        super().__init__()
        if clusters < 1:
            raise ValueError(f"clusters={clusters} must be at least 1")
        self.clusters = clusters
        bits = clusters.bit_length() - 1
        if bits > dim:
            raise ValueError(f"clusters={clusters} need {bits} orthogonal directions, but a head has {dim} channels")
        projections = torch.empty(heads, bits, dim)
        if bits and not projections.is_meta:
            projections = torch.linalg.qr(torch.randn(heads, dim, bits)).Q.transpose(1, 2).contiguous()
        self.register_buffer("projections", projections)

    def forward(
        self, x: Float[Tensor, "B H T d"], other: Float[Tensor, "B H S d"] | None = None
    ) -> tuple[list[Float[Tensor, "B H _ K"]], Float[Tensor, ""]]:
        """Distances as from `OnlineKMeans`; the loss is 0."""
        return [self.distances(y) for y in ((x,) if other is None else (x, other))], x.new_zeros(())

    @torch.no_grad()
    def distances(self, x: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T K"]:
        """-1 to the own bucket, 0 to others."""
        positive = (x @ self.projections.to(x.dtype).transpose(-1, -2)) > 0
        bucket = (positive * 2 ** torch.arange(positive.shape[-1], device=x.device)).sum(-1)
        return -F.one_hot(bucket, self.clusters).to(x.dtype)


@provides("08-routing")
def normalise(x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
    """(x - mean) / sqrt(var + 1e-6) over d: LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _recomputing() -> bool:
    """Whether a checkpointed forward pass runs again inside a backward pass, where tokens have been counted already."""
    return torch._C._current_graph_task_id() != -1

"""Routing attention as the PyTorch package has it (lucidrains/routing-transformer), which is not the authors' rule.

    dist = <x / |x|, mu>;  members[c] = the w most similar tokens, unordered       x (B, H, T, d), mu (H, K, d)
    S = d^-1/2 q k'^T,  k' = q / |q| where queries are shared                      rotated q, k and v
    S = -5e4 where a token meets itself (shared), hidden where the key's position is later
    out_t = sum over memberships / (their number + 1e-5)

    after a backward pass: mu <- decay mu + (1 - decay) normalise(sum of members), clusters without tokens stay

Next to it local heads: windows of `local_window` tokens see themselves and `local_radius` windows around, with rotations of
halves. Learned keys and values (`memory`) stand in front of every cluster. After Roy et al., arXiv 2003.05997, and Wang,
MIT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.engine.precision import no_autocast
from heed.language.routing.clustered import gather_members, scatter_mean
from heed.language.routing.local import memory_blocks

if TYPE_CHECKING:
    from heed.language.routing.package_config import PackageConfig

_SELF = -5e4
_INIT_ROUNDS = 10


@provides("08-routing")
class UnitKMeans(nn.Module):
    """Centroids compared by cosine; `means` and `initted` are saved.

    The first training batch initialises them by ten rounds of Lloyd's algorithm, as in the package; in evaluation mode
    they are never changed (the package initialises there, too).

    Args:
        heads, clusters, dim: H, K, d.
        decay: of the moving average.
        commitment: weight of the loss.
    """

    means: Tensor
    initted: Tensor

    def __init__(self, heads: int, clusters: int, dim: int, *, decay: float = 0.999, commitment: float = 1e-4) -> None:
        super().__init__()
        self.decay, self.commitment = decay, commitment
        self.register_buffer("means", F.normalize(torch.randn(heads, clusters, dim), dim=-1))
        self.register_buffer("initted", torch.tensor(False))
        self._found: Tensor | None = None  # mean of what the forward passes since the last update found
        self._passes = 0

    def forward(self, x: Float[Tensor, "B H T d"]) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, ""]]:
        """Similarities and the commitment loss; in training mode also what `update` moves to."""
        x = F.normalize(x.to(self.means.dtype), dim=-1)
        with torch.no_grad(), no_autocast(x):
            if self.training and not self.initted:
                self.means.copy_(self._first(x.detach()))
                self.initted.fill_(True)
            means = self.means
            similarity = x @ means.transpose(-1, -2)
            nearest = similarity.argmax(-1)
            if self.training:
                found = _lloyd(x.detach(), means, nearest)
                old = self._found if self._found is not None else found
                self._passes += 1
                self._found = old.lerp(found, 1 / self._passes)
        routed = means[torch.arange(means.shape[0], device=x.device)[:, None], nearest]
        return similarity, self.commitment * F.mse_loss(x, routed)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards what the forward passes since the last update found; nothing after none."""
        if self._found is not None:
            self.means.lerp_(self._found.to(self.means.dtype), 1 - self.decay)
        self._found, self._passes = None, 0

    def _first(self, x: Tensor) -> Tensor:
        heads, clusters, _ = self.means.shape
        tokens = x.transpose(0, 1).reshape(heads, -1, x.shape[-1])
        many = tokens.shape[1]
        chosen = torch.randperm(many)[:clusters] if many >= clusters else torch.randint(0, many, (clusters,))
        means = tokens[:, chosen.to(x.device)]
        for _ in range(_INIT_ROUNDS):
            means = _lloyd(x, means, (x @ means.transpose(-1, -2)).argmax(-1))
        return means


def _lloyd(x: Float[Tensor, "B H T d"], means: Float[Tensor, "H K d"], nearest: Int64[Tensor, "B H T"]) -> Tensor:
    """Unit directions of the sums of each cluster's tokens; a cluster without tokens keeps its mean."""
    hot = F.one_hot(nearest, means.shape[1]).to(x.dtype)
    total = torch.einsum("bhtk,bhtd->hkd", hot, x)
    return torch.where(hot.sum((0, 2))[..., None] > 0, F.normalize(total, dim=-1), means)


@provides("08-routing")
class PackageAttention(nn.Module):
    """Mixed-head attention of the package: local heads first, then routing heads.

    Args:
        config: see `PackageConfig`.
        local_heads: of `config.heads`.
        context: attend to another text instead, by routing heads only.

    Raises:
        ValueError: local heads or a causal config together with context.
    """

    def __init__(self, config: PackageConfig, local_heads: int, *, context: bool = False) -> None:
        super().__init__()
        c = config
        if context and (c.causal or local_heads):
            raise ValueError(
                f"causal={c.causal}, local_heads={local_heads}: a context needs causal=False and no local heads"
            )
        d, routed = c.width, c.heads - local_heads
        self.config, self.local_heads, self.routed_heads, self.context = c, local_heads, routed, context
        self.causal = c.causal
        self.share_qk = c.context_share_qk if context else c.shares
        if local_heads:
            self.local_to_qkv = nn.Linear(c.dim, 3 * local_heads * d)
        self.to_q = nn.Linear(c.dim, routed * d, bias=False)
        self.to_v = nn.Linear(c.dim, routed * d, bias=False)
        if not self.share_qk:
            self.to_k = nn.Linear(c.dim, routed * d, bias=False)
        if routed:
            memory = max(c.memory, 1 if self.causal and not self.share_qk else 0)
            self.kmeans = UnitKMeans(routed, c.clusters, d, decay=c.decay, commitment=c.commitment)
            self.mem_key = nn.Parameter(torch.randn(routed, c.clusters, memory, d))
            self.mem_value = nn.Parameter(torch.randn(routed, c.clusters, memory, d))
        self.to_out = nn.Linear(c.heads * d, c.dim, bias=False)
        self.drop = nn.Dropout(c.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "B T"] | None = None,
        memory: Float[Tensor, "B S D"] | None = None,
        memory_mask: Bool[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""]]:
        """Mix tokens; masks are True for tokens. T is a multiple of `local_window` where there are local heads."""
        if self.context != (memory is not None):
            raise ValueError("attention with context=True takes a memory, and only that does")
        loss, parts = x.new_zeros(()), list[Tensor]()
        if self.local_heads:
            q, k, v = (self._heads(t) for t in self.local_to_qkv(x).chunk(3, -1))
            parts.append(self._local(q, k, v, mask))
        if self.routed_heads:
            source = x if memory is None else memory
            q, v = self._heads(self.to_q(x)), self._heads(self.to_v(source))
            k = self._heads((self.to_q if self.share_qk else self.to_k)(source))
            if self.config.rotary and memory is None:
                q, k, v = (rotate_pairs(t) for t in (q, k, v))
            routed, loss = self._routed(q, k, v, mask, mask if memory is None else memory_mask)
            parts.append(routed)
        return self.drop(self.to_out(torch.cat(parts, 1).transpose(1, 2).flatten(2))), loss

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.width)).transpose(1, 2)

    def _routed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c, queries, keys = self.config, q.shape[2], k.shape[2]
        window = min(c.window, queries)
        key_window = min(c.context_window or c.window, keys) if self.context else window
        if self.share_qk and not self.context:
            similarity, loss = self.kmeans(q)
            k = F.normalize(k, dim=-1)
            index = key_index = _most_similar(similarity, window)
        else:
            similarity, loss = self.kmeans(torch.cat([q, k], 2))
            own, other = similarity.split((queries, keys), 2)
            index, key_index = _most_similar(own, window), _most_similar(other, key_window)
        hidden = torch.zeros(*index.shape, key_index.shape[-1], dtype=torch.bool, device=q.device)
        for m, at, axis in ((mask, index, -1), (key_mask, key_index, -2)):
            if m is not None:
                rows = m[:, None].expand(-1, at.shape[1], -1)[..., None]
                hidden = hidden | ~gather_members(rows, at).squeeze(-1).unsqueeze(axis)
        if self.causal:
            hidden = hidden | (index[..., None] < key_index[..., None, :])
        itself = index[..., None] == key_index[..., None, :] if self.share_qk else None
        keys_in, values_in = (
            torch.cat([learned.expand(q.shape[0], -1, -1, -1, -1).to(t.dtype), gather_members(t, key_index)], 3)
            for learned, t in ((self.mem_key, k), (self.mem_value, v))
        )
        queries_in, *grouped = (t.flatten(0, 1) for t in (gather_members(q, index), keys_in, values_in, hidden))
        y = self._attend(queries_in, *grouped, itself=None if itself is None else itself.flatten(0, 1))
        return scatter_mean(y.unflatten(0, q.shape[:2]), index, queries, 1e-5), loss

    def _local(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        size, batch, tokens = self.config.local_window, q.shape[0], q.shape[2]
        if tokens % size:
            raise ValueError(f"{tokens} tokens are not a multiple of local_window={size}; pad them, as the model does")
        if self.config.rotary:
            q, k = rotate_halves(q), rotate_halves(k)
        table = memory_blocks((tokens // size,), (self.config.local_radius,), self.causal).to(q.device)
        places = torch.arange(tokens, device=q.device).view(-1, size)
        beyond = places.new_full((1, size), tokens)  # positions after the last, which nobody is
        key_places = torch.cat([places, beyond])[table].flatten(1)
        hidden = (key_places == tokens)[:, None, :].expand(-1, size, -1)
        if self.causal:
            hidden = hidden | (places[..., None] < key_places[:, None, :])
        hidden = hidden[None]
        if mask is not None:
            seen = F.pad(mask.unflatten(1, (-1, size)), (0, 0, 0, 1))[:, table].flatten(2)
            seen = seen[:, :, None, :] & mask.unflatten(1, (-1, size))[..., None]
            hidden = (hidden | ~seen).repeat_interleave(q.shape[1], 0)
        q, k, v = (t.flatten(0, 1).unflatten(1, (-1, size)) for t in (q, k, v))
        # Beyond the edges the package has -1; only a row in which everything is hidden sees it.
        k, v = (F.pad(t, (0, 0, 0, 0, 0, 1), value=-1)[:, table].flatten(2, 3) for t in (k, v))
        return self._attend(q, k, v, hidden).flatten(1, 2).unflatten(0, (batch, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, itself: Tensor | None = None) -> Tensor:
        """Attention of every group (G, C) to its keys, after learned ones in front, which everybody sees."""
        lowest = -torch.finfo(q.dtype).max
        learned = k.shape[-2] - hidden.shape[-1]
        if not learned:
            # The package overwrites hidden scores: a row without others is a plain mean, whose weights have no gradient.
            blind = (hidden if itself is None else hidden & ~itself).all(-1, keepdim=True)
            q, hidden = q.masked_fill(blind, 0), hidden & ~blind
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, lowest)
        if itself is not None:
            bias = bias.masked_fill(itself, max(_SELF, lowest))
        dropout = self.config.attn_dropout if self.training else 0.0
        return attend(q, k, v, Full(), bias=F.pad(bias, (learned, 0)), dropout=dropout)


def _most_similar(similarity: Float[Tensor, "B H T K"], window: int) -> Int64[Tensor, "B H K w"]:
    return similarity.topk(window, 2).indices.transpose(2, 3)


def rotate_pairs(x: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T d"]:
    """Rotary positions on neighbouring channels."""
    sin, cos = (t.repeat_interleave(2, -1) for t in _angles(x))
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def rotate_halves(x: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T d"]:
    """Rotary positions on channels half the width apart."""
    sin, cos = (torch.cat([t, t], -1) for t in _angles(x))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _angles(x: Tensor) -> tuple[Tensor, Tensor]:
    rates = 1e4 ** (-torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32) / x.shape[-1])
    angles = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * rates
    return angles.sin().to(x.dtype), angles.cos().to(x.dtype)

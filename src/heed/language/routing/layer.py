"""One attention layer of mixed heads: routing, routing with strided members, strided and local, in this order.

    q = d^-1/2 x W_q,  k = x W_k,  v = x W_v        (B, H, T, d), feature h d + j of dim belongs to head h
    y = [routed_1 ... routed_r, local_1 ... local_l] M        M (d, d), one matrix for all heads
    out = merge(y) W_o                              (B, T, dim)

M was meant to mix heads; in the authors' code it acts on the last axis, inside every head, and released weights contain it.
Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021, arXiv 2003.05997.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.language.routing.cache import LayerCache
from heed.language.routing.clustered import RoutedHeads
from heed.language.routing.config import RoutingSettings
from heed.language.routing.local import LocalHeads, StridedHeads, from_blocks, grid_of, to_blocks

Heads = RoutedHeads | StridedHeads | LocalHeads


@provides("08-routing")
class RoutingAttention(nn.Module):
    """Self-attention or, with routing heads only, attention to a memory; for any block of any model.

    Args:
        settings: dim, heads, clusters and all else, see `RoutingSettings`.

    Attributes:
        routed, routed_strided, strided, local: the kinds of heads; None for a kind without heads.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        super().__init__()
        s = settings
        self.settings = s
        self.q, self.k, self.v, self.out = (nn.Linear(s.dim, s.dim, bias=False) for _ in range(4))
        self.mix = nn.Linear(s.head_dim, s.head_dim, bias=False)
        self.counts = (s.cluster_heads, s.cluster_strided_heads, s.strided_heads, s.local_heads)
        self.routed = RoutedHeads(s, s.cluster_heads) if s.cluster_heads else None
        self.routed_strided = RoutedHeads(s, s.cluster_strided_heads, strided=True) if s.cluster_strided_heads else None
        self.strided = StridedHeads(s) if s.strided_heads else None
        self.local = LocalHeads(s) if s.local_heads else None
        for linear in (self.q, self.k, self.v, self.out, self.mix):
            nn.init.xavier_uniform_(linear.weight, gain=0.2**0.5)

    def forward(
        self,
        x: Float[Tensor, "B *S D"],
        memory: Float[Tensor, "B M D"] | None = None,
        *,
        padding: Bool[Tensor, "B ..."] | None = None,
        token_bias: Float[Tensor, "B ..."] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "B *S D"], Float[Tensor, ""]]:
        """Mix tokens.

        Args:
            x: (B, T, D), or (B, *S, D) on a grid with as many axes as the block has.
            memory: (B, M, D) what to attend to instead of x.
            padding: True where a key (of x or memory) is padding.
            token_bias: added to the scores of keys in routing heads.
            cache: filled with what decoding needs, for `step`.

        Returns:
            The same shape as x, and the clustering loss, to be added to the training loss as it is.

        Raises:
            ValueError: a shape that does not fit; a memory together with shared queries, masking or local heads; fewer
                tokens than a cluster takes.
        """
        s = self.settings
        sizes = x.shape[1:-1]
        if x.shape[-1] != s.dim or len(sizes) != len(s.block):
            raise ValueError(
                f"RoutingAttention takes (B, {', '.join('T' * len(s.block))}, {s.dim}) for dim={s.dim} and blocks "
                f"{s.block}; got {tuple(x.shape)}"
            )
        if memory is not None:
            self._check_memory(memory)
        counts = grid_of(sizes, s.block)
        queries = to_blocks(x, s.block).flatten(1, 2)
        source = queries if memory is None else memory
        hidden, bias = (None if t is None else self._per_key(t, memory) for t in (padding, token_bias))
        q, k, v = self.project(queries, source)
        y, loss = list[Tensor](), x.new_zeros(())
        for _, heads, part in self._parts(q, k, v):
            if isinstance(heads, RoutedHeads):
                mixed, commitment = heads(*part, padding=hidden, token_bias=bias)
                loss = loss + commitment
            else:
                layout = (counts,) if isinstance(heads, LocalHeads) else ()
                mixed = heads(*part, *layout, padding=hidden)
            y.append(mixed)
        if cache is not None:
            self._remember(cache, *(t[:, :, : math.prod(sizes)] for t in (q, k, v)))
        y = self.merge(torch.cat(y, 1)).unflatten(1, (-1, math.prod(s.block)))
        return from_blocks(y, sizes, s.block), loss

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) and (B, S, D) to q, k and v (B, H, _, d), q scaled."""
        d = self.settings.head_dim
        q, k, v = (
            linear(t).unflatten(-1, (-1, d)).transpose(1, 2)
            for linear, t in ((self.q, x), (self.k, source), (self.v, source))
        )
        return q * d**-0.5, k, v

    def merge(self, y: Float[Tensor, "B H T d"]) -> Float[Tensor, "B T D"]:
        """From all heads' results to the layer's."""
        return self.out(self.mix(y).transpose(1, 2).flatten(2))

    def step(self, x: Float[Tensor, "B 1 D"], cache: LayerCache) -> Float[Tensor, "B 1 D"]:
        """The next token of a text, given the earlier ones in `cache`, which grows by it.

        Every cluster's members are chosen anew among the tokens that there are; see `heed.language.routing.decode`.

        Raises:
            ValueError: a layer that is not masked, or a cache that is full.
        """
        if not self.settings.masked:
            raise ValueError("step-by-step decoding needs masked=True")
        at, y = cache.length, list[Tensor]()
        counts = grid_of((cache.limit,), self.settings.block) if cache.grid is None else cache.grid
        for name, heads, (q, k, v) in self._parts(*self.project(x, x)):
            if isinstance(heads, RoutedHeads):
                q, k = heads.prepare(q, k)
                seen = cache.extend(name, k=k, v=v, **_distances(heads, q, k))
                index = heads.members(seen["from_queries"], cache.limit)
                keys = index if heads.share_qk else heads.members(seen["from_keys"], cache.limit)
                gathered = q[:, :, None].expand(-1, -1, index.shape[2], -1, -1)
                inside = (index[..., -1] == at)[..., None]  # members ascend, and nothing comes after this token
                each = heads.attend(gathered, seen["k"], seen["v"], keys).squeeze(3) * inside
                y.append((each.sum(2) / (inside.sum(2) + 1e-2))[:, :, None])
                continue
            seen = cache.extend(name, k=k, v=v)
            layout = (counts,) if isinstance(heads, LocalHeads) else ()
            y.append(heads.step(q, seen["k"], seen["v"], at, *layout))
        cache.length += 1
        return self.merge(torch.cat(y, 1))

    def _parts(self, *tensors: Tensor) -> Iterator[tuple[str, Heads, tuple[Tensor, ...]]]:
        """Every kind of heads that there is, by name, and its share of tensors (B, H, ...)."""
        kinds = {
            "routed": self.routed,
            "routed_strided": self.routed_strided,
            "strided": self.strided,
            "local": self.local,
        }
        shares = zip(*(t.split(self.counts, 1) for t in tensors), strict=True)
        for (name, heads), share in zip(kinds.items(), shares, strict=True):
            if heads is not None:
                yield name, heads, share

    def _remember(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Fill an empty cache with a text that was read in one pass."""
        for name, heads, (queries, keys, values) in self._parts(q, k, v):
            distances = {}
            if isinstance(heads, RoutedHeads):
                queries, keys = heads.prepare(queries, keys)
                distances = _distances(heads, queries, keys)
            cache.extend(name, k=keys, v=values, **distances)
        cache.length += q.shape[2]

    def _per_key(self, t: Tensor, memory: Tensor | None) -> Tensor:
        """A number per key, in the order of the keys."""
        if memory is not None:
            return t
        return to_blocks(t[..., None].float(), self.settings.block).flatten(1).to(t.dtype)

    def _check_memory(self, memory: Tensor) -> None:
        s = self.settings
        if s.share_qk:
            raise ValueError(
                "share_qk=True leaves no place for a memory: its keys would be the queries; use share_qk=False"
            )
        if s.masked:
            raise ValueError("masked=True has no meaning with a memory; use masked=False")
        if s.local_heads or s.strided_heads:
            raise ValueError("local and strided heads have no place in a memory; use routing heads only")
        if memory.ndim != 3 or memory.shape[-1] != s.dim:
            raise ValueError(f"memory {tuple(memory.shape)} must be (B, M, {s.dim})")


def _distances(heads: RoutedHeads, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    found = {"from_queries": heads.clusters.distances(q)}
    return found if heads.share_qk else found | {"from_keys": heads.clusters.distances(k)}

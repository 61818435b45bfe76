"""Routing heads: every cluster takes the w tokens nearest to its centroid, and these attend to each other.

    members[c] = the w tokens with the smallest dist[:, c], in the order of the text             (B, H, K, w)
    y[c] = softmax(q[members] k[members]^T + bias) v[members]   by `relative.attend_group`        (B, H, K, w, d)
    out_t = sum of y over the clusters t is in / (their number + 0.01)                            (B, H, T, d)

A token may be in several clusters or in none; in none it gets 0. With masking, a member sees no member after itself. Which
tokens are members depends on the whole text all the same, later tokens included: a full pass over a text is not strictly
causal, and step-by-step decoding (`decode.py`), which knows no later tokens, can choose other members. That is the authors'
rule. Roy et al., TACL 2021, arXiv 2003.05997.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from heed.catalogue import provides
from heed.language.routing.config import RoutingSettings
from heed.language.routing.kmeans import HashedClusters, OnlineKMeans, normalise
from heed.language.routing.relative import RelativePositions, attend_group, visible_bias

_EMPTY = 1e-2


@provides("08-routing")
def nearest_members(distances: Float[Tensor, "B H T K"], window: int) -> Int64[Tensor, "B H K w"]:
    """The `window` tokens with the smallest distance to each cluster, in ascending order; earlier tokens win ties.

    Raises:
        ValueError: a window of more tokens than there are.
    """
    _check_window(window, distances.shape[2])
    by_cluster = distances.transpose(2, 3).contiguous()
    tokens = by_cluster.shape[-1]
    if window == tokens:
        return torch.arange(tokens, device=distances.device).expand(by_cluster.shape)
    values, index = by_cluster.topk(window + 1, -1, largest=False)
    last = values[..., window - 1 : window]
    if (last < values[..., window:]).all():
        return index[..., :window].sort(-1).values
    # topk promises nothing about ties, and equal tokens in a text are common: the first layer sees no positions.
    below, equal = by_cluster < last, by_cluster == last
    keep = below | (equal & (equal.cumsum(-1) <= window - below.sum(-1, keepdim=True)))
    place = (keep.cumsum(-1) - 1).masked_fill(~keep, window)
    found = torch.zeros(*place.shape[:-1], window + 1, dtype=torch.long, device=place.device)
    return found.scatter_(-1, place, torch.arange(tokens, device=place.device).expand_as(place))[..., :window]


@provides("08-routing")
def strided_members(
    distances: Float[Tensor, "B H T K"], window: int, tokens: int | None = None
) -> Int64[Tensor, "B H K _"]:
    """Every (T // window)-th token in the order of distance, `window` at most, in ascending order.

    Args:
        distances: (B, H, T, K).
        window: w.
        tokens: T, where `distances` holds the first ones only (while decoding).
    """
    tokens = distances.shape[2] if tokens is None else tokens
    _check_window(window, tokens)
    order = distances.transpose(2, 3).contiguous().sort(stable=True, dim=-1).indices
    return order[..., :: tokens // window][..., :window].sort(-1).values


@provides("08-routing")
def gather_members(x: Shaped[Tensor, "B H T d"], index: Int64[Tensor, "B H K w"]) -> Shaped[Tensor, "B H K w d"]:
    """The rows of the members, of any dtype."""
    rows = x.reshape(-1, x.shape[-1]).index_select(0, _flat(index, x.shape[2]))
    return rows.view(*index.shape, x.shape[-1])


@provides("08-routing")
def scatter_mean(
    y: Float[Tensor, "B H K w d"], index: Int64[Tensor, "B H K w"], tokens: int, eps: float = _EMPTY
) -> Float[Tensor, "B H T d"]:
    """Sum over a token's memberships / (their number + eps)."""
    flat = _flat(index, tokens)
    size = index.shape[0] * index.shape[1] * tokens
    total = y.new_zeros(size, y.shape[-1]).index_add(0, flat, y.reshape(-1, y.shape[-1]))
    count = torch.bincount(flat, minlength=size).to(y.dtype)
    return (total / (count + eps)[:, None]).view(*index.shape[:2], tokens, y.shape[-1])


@provides("08-routing")
class RoutedHeads(nn.Module):
    """The routing heads of one layer: (B, H, T, d) queries, keys and values to (B, H, T, d) and the clustering loss.

    Args:
        settings: clusters, window, sharing, masking, k-means and relative positions.
        heads: H.
        strided: members are spread over all distances (`strided_members`) instead of being the nearest.
    """

    def __init__(self, settings: RoutingSettings, heads: int, *, strided: bool = False) -> None:
        super().__init__()
        s = settings
        self.window, self.share_qk, self.masked, self.dropout = s.window, s.share_qk, s.masked, s.attn_dropout
        self.strided = strided
        self.clusters: OnlineKMeans | HashedClusters
        if s.hash_items:
            self.clusters = HashedClusters(heads, s.head_dim, s.clusters)
        else:
            self.clusters = OnlineKMeans(
                heads, s.head_dim, s.clusters, beta=s.beta, decay=s.decay, ema=s.ema, fix_count=s.fix_count,
                initial_count=s.initial_count,
            )  # fmt: skip
        reach = s.reach("cluster_strided" if strided else "cluster")
        self.relative = None if reach is None else RelativePositions(reach, s.head_dim)
        if s.token_bias != "none":
            self.token_bias_weight = nn.Parameter(torch.ones(()), requires_grad=s.token_bias == "trained")

    def prepare(self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H S d"]) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are compared: normalised, and the keys the queries where these are shared."""
        q = normalise(q)
        return q, q if self.share_qk else normalise(k)

    def members(self, distances: Float[Tensor, "B H T K"], tokens: int | None = None) -> Int64[Tensor, "B H K _"]:
        """Members by distance; `tokens` is the length of the text where `distances` holds its beginning only."""
        if self.strided:
            return strided_members(distances, self.window, tokens)
        return nearest_members(distances, self.window if tokens is None else min(self.window, distances.shape[2]))

    def route(
        self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H S d"]
    ) -> tuple[Int64[Tensor, "B H K w"], Int64[Tensor, "B H K w"], Float[Tensor, ""]]:
        """Members among prepared queries, among prepared keys, and the loss; moves the centroids in training mode."""
        found, loss = self.clusters(q, None if self.share_qk else k)
        index = self.members(found[0])
        return index, index if self.share_qk else self.members(found[1]), loss

    def forward(
        self,
        q: Float[Tensor, "B H T d"],
        k: Float[Tensor, "B H S d"],
        v: Float[Tensor, "B H S d"],
        *,
        padding: Bool[Tensor, "B S"] | None = None,
        token_bias: Float[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, ""]]:
        """Route, attend inside clusters, and bring the results back.

        Args:
            q: scaled queries.
            k, v: keys (unused where queries are shared) and values.
            padding: True where a key is padding.
            token_bias: added to the scores of keys, times a scalar weight.
        """
        q, k = self.prepare(q, k)
        index, key_index, loss = self.route(q, k)
        y = self.attend(gather_members(q, index), k, v, key_index, padding=padding, token_bias=token_bias)
        return scatter_mean(y, index, q.shape[2]), loss

    def attend(
        self,
        q: Float[Tensor, "B H K L d"],
        k: Float[Tensor, "B H S d"],
        v: Float[Tensor, "B H S d"],
        index: Int64[Tensor, "B H K w"],
        *,
        padding: Bool[Tensor, "B S"] | None = None,
        token_bias: Float[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B H K L d"]:
        """Attention of gathered queries to the members of their clusters."""
        keys, values = (gather_members(x, index).flatten(0, 1) for x in (k, v))
        heads = index.shape[1]

        def per_member(x: Tensor) -> Tensor:
            rows = x[:, None].expand(-1, heads, -1)[..., None]
            return gather_members(rows, index).flatten(0, 1).squeeze(-1)

        hidden = None if padding is None else per_member(padding)
        bias = visible_bias(values, q.shape[-2], masked=self.masked, padding=hidden)
        if token_bias is not None:
            if not hasattr(self, "token_bias_weight"):
                raise ValueError(
                    "token_bias is given, but the settings have token_bias='none'; use 'fixed' or 'trained'"
                )
            bias = bias + self.token_bias_weight * per_member(token_bias)[..., None, :]
        dropout = self.dropout if self.training else 0.0
        return attend_group(q.flatten(0, 1), keys, values, bias, self.relative, dropout).view(q.shape)


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Row numbers in a (B * H * T, ...) view."""
    batch, heads = index.shape[:2]
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * tokens
    return (index + first).flatten()


def _check_window(window: int, tokens: int) -> None:
    if window > tokens:
        raise ValueError(
            f"window={window} tokens per cluster, but there are only {tokens}: give longer texts or a smaller window"
        )
